"""Waiting for many ZMQ sockets at the cost of those that have something."""

import selectors

import zmq


class Readable:
    """Says which of many sockets to read. One thread.

    libzmq's own poll asks every socket at each call, with two system calls each: a fleet of 64 pods costs more than
    what its messages do. Here the system watches the descriptors through which libzmq tells that something changed. It
    tells so once: a socket that was named must be read until `zmq.Again`, or named to `again`. The same goes for one on
    which something was sent, as libzmq takes notice of what has come then (`ZMQ_FD` in zmq_getsockopt(3)).
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._again: set[zmq.Socket[bytes]] = set()

    def register(self, socket: "zmq.Socket[bytes]") -> None:
        """Begin to watch a socket; what it has already counts."""
        self._selector.register(socket.fileno(), selectors.EVENT_READ, socket)
        self._again.add(socket)

    def unregister(self, socket: "zmq.Socket[bytes]") -> None:
        """Watch a socket no longer. Before it is closed."""
        self._selector.unregister(socket.fileno())
        self._again.discard(socket)

    def again(self, socket: "zmq.Socket[bytes]") -> None:
        """Name a socket at the next `wait` in any case, which then does not wait."""
        self._again.add(socket)

    def wait(self, timeout_ms: int | None) -> "set[zmq.Socket[bytes]]":
        """Give the sockets that may have something, after at most so many milliseconds, or as long as it takes."""
        timeout = 0.0 if self._again else None if timeout_ms is None else timeout_ms / 1000
        ready = {key.data for key, _ in self._selector.select(timeout)} | self._again
        self._again.clear()
        return ready

    def close(self) -> None:
        """Watch nothing any more."""
        self._selector.close()
