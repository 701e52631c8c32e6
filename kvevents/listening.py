"""Frames as they come from publishers, undecoded, and what becomes of the connections: for lookers-on."""

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeAlias

import zmq
from zmq.utils.monitor import recv_monitor_message

from kvevents.endpoints import check_endpoint
from kvevents.errors import SubscriptionError
from kvevents.subscriber import MAX_MESSAGE_BYTES, new_context

_BURST = 512
_RECEIVE_MESSAGES = 10_000
_KEEP_BYTES = 256 * 1024 * 1024

LinkEvent: TypeAlias = Literal["refused", "reached", "agreed", "mismatched", "lost"]
"""A connection was refused, was made, speaks ZMQ with a publisher, speaks something else, ended."""

_LINK_EVENTS: dict[int, LinkEvent] = {
    zmq.EVENT_CONNECT_RETRIED: "refused",
    zmq.EVENT_CONNECTED: "reached",
    zmq.EVENT_HANDSHAKE_SUCCEEDED: "agreed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "mismatched",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "mismatched",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "mismatched",
    zmq.EVENT_DISCONNECTED: "lost",
}


class Heard(NamedTuple):
    """One message as it came."""

    endpoint: str
    frames: list[bytes]
    arrival: float
    """When, in seconds since the epoch."""


class LinkChange(NamedTuple):
    """Something became of a connection."""

    endpoint: str
    event: LinkEvent
    arrival: float


class Listener:
    """Subscribes to publishers, and gives what comes. A context manager; one thread at a time.

    Raises `SubscriptionError` for an endpoint that cannot be used.
    """

    def __init__(self, endpoints: Sequence[str], *, topic: str = "") -> None:
        for endpoint in endpoints:
            check_endpoint(endpoint)
        self._context = new_context()
        self._poller = zmq.Poller()
        self._sockets: dict[zmq.Socket[bytes], tuple[str, bool]] = {}
        """Each socket's endpoint, and whether it is a monitor."""
        try:
            for endpoint in endpoints:
                self._open(endpoint, topic)
        except zmq.ZMQError as error:
            self.close()
            raise SubscriptionError(
                f"endpoint {endpoint!r}: {error.strerror}; expected like tcp://10.0.0.7:5557"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all sockets. May be called twice."""
        if not self._context.closed:
            self._context.destroy(0)

    def receive(self, timeout: float) -> Iterator[Heard | LinkChange]:
        """Give what has come, after at most `timeout` seconds: nothing, or a burst."""
        for socket, _ in self._poller.poll(int(timeout * 1000)):
            endpoint, is_monitor = self._sockets[socket]
            for _ in range(_BURST):
                try:
                    if is_monitor:
                        event = _LINK_EVENTS.get(recv_monitor_message(socket, zmq.NOBLOCK)["event"])
                        if event is not None:
                            yield LinkChange(endpoint, event, time.time())
                    else:
                        yield Heard(endpoint, socket.recv_multipart(zmq.NOBLOCK), time.time())
                except zmq.Again:
                    break

    def _open(self, endpoint: str, topic: str) -> None:
        socket = self._context.socket(zmq.SUB)
        socket.linger = 0
        socket.rcvhwm = _RECEIVE_MESSAGES
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        monitor = socket.get_monitor_socket()
        for one, is_monitor in ((socket, False), (monitor, True)):
            self._sockets[one] = endpoint, is_monitor
            self._poller.register(one, zmq.POLLIN)
        socket.subscribe(topic)
        socket.connect(endpoint)


class ReplayAnswer(NamedTuple):
    """What a replay socket answered."""

    messages: list[tuple[int, bytes]]
    """Numbers and payloads, the first of them, as many as were wanted."""
    received: int
    """How many came."""
    first: int | None
    last: int | None
    is_complete: bool
    """Whether its end came, in time."""
    is_reached: bool
    """Whether something was connected to at all."""
    topic: bytes | None = None
    """The topic of the last message; None where the answer names none, as vLLM's up to 0.25 do."""


def ask_replay(
    endpoint: str, start: int = 0, *, timeout: float = 3.0, keep: int = 10_000, keep_bytes: int = _KEEP_BYTES
) -> ReplayAnswer:
    """Ask a publisher's replay socket for all it has from a number on, and wait for the end of the answer.

    `timeout` is how long it may say nothing, in seconds; ten times that is as long as all of it may take. At most
    `keep` messages with `keep_bytes` of payload are kept. Raises `SubscriptionError` for an endpoint that cannot be
    used.
    """
    check_endpoint(endpoint)
    messages: list[tuple[int, bytes]] = []
    count, first, last = 0, None, None
    is_reached = False
    topic: bytes | None = None
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        with socket.get_monitor_socket() as monitor:
            try:
                socket.connect(endpoint)
            except zmq.ZMQError as error:
                socket.disable_monitor()
                raise SubscriptionError(
                    f"replay endpoint {endpoint!r}: {error.strerror}; expected like tcp://10.0.0.7:5558"
                ) from error
            socket.send_multipart([b"", start.to_bytes(8, "big")])
            is_complete = False
            until = time.monotonic() + 10 * timeout
            while not is_complete and time.monotonic() < until and socket.poll(int(timeout * 1000)):
                frames = socket.recv_multipart()
                is_reached = True
                if len(frames) < 2 or len(frames[-2]) != 8:
                    break
                is_complete = not frames[-1]
                if not is_complete:
                    seq = int.from_bytes(frames[-2], "big")
                    topic = frames[-3] if len(frames) > 3 else None
                    first, last, count = seq if first is None else first, seq, count + 1
                    # the first that is too much is the last: what is kept has no holes
                    keep_bytes -= len(frames[-1])
                    if len(messages) < keep and keep_bytes >= 0:
                        messages.append((seq, frames[-1]))
            while monitor.poll(0):
                is_reached |= recv_monitor_message(monitor)["event"] == zmq.EVENT_CONNECTED
            socket.disable_monitor()
    return ReplayAnswer(messages, count, first, last, is_complete, is_reached, topic)
