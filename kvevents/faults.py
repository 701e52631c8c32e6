"""A network that misbehaves on demand, for tests: a TCP proxy that is slow, stands still, cuts or refuses.

It knows nothing of what it carries: ZMQ, Redis and HTTP go through it alike.
"""

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Literal, Self, TypeAlias

Direction: TypeAlias = Literal["both", "there", "back"]
"""What a fault is about: bytes to the target, bytes from it, or both."""

_CHUNK = 64 * 1024
_CHUNK_COST = 128
"""Bytes, about, that a chunk takes beside what is in it."""

_RESET_WHEN_CLOSED = struct.pack("ii", 1, 0)
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class _Way:
    """One direction of a connection: what was read from one socket and is not yet written to the other."""

    __slots__ = ("blocked", "chunks", "cost", "done", "ended", "held", "name", "sink", "source", "stalled")

    def __init__(self, name: Direction, source: socket.socket, sink: socket.socket, *, stalled: bool) -> None:
        self.name = name
        self.source = source
        self.sink = sink
        self.chunks: deque[tuple[float, memoryview, bool]] = deque()
        """When each is due, its bytes, and whether it stands for the end, which is a reset where it has bytes."""
        self.held = 0
        """Bytes in all chunks."""
        self.cost = 0
        """Bytes that the chunks take."""
        self.stalled = stalled
        self.blocked = False
        """The sink takes no more for now."""
        self.ended = False
        """Nothing more comes from the source."""
        self.done = False
        """The sink knows that, or is gone: nothing more is written to it."""

    def add(self, due: float, chunk: bytes, *, is_end: bool = False) -> None:
        self.chunks.append((due, memoryview(chunk), is_end))
        if not is_end:
            self.held += len(chunk)
            self.cost += len(chunk) + _CHUNK_COST

    def forget(self) -> None:
        """Drop all that is on its way, as it cannot be delivered any more."""
        self.chunks.clear()
        self.held = self.cost = 0
        self.done = True


class _Connection:
    """A client's socket, the one to the target that belongs to it, and both directions between them."""

    __slots__ = ("back", "client", "connecting", "target", "there")

    def __init__(self, client: socket.socket, target: socket.socket, stalled: set[Direction]) -> None:
        self.client = client
        self.target = target
        self.there = _Way("there", client, target, stalled="there" in stalled)
        self.back = _Way("back", target, client, stalled="back" in stalled)
        self.connecting = True

    @property
    def ways(self) -> tuple[_Way, _Way]:
        return self.there, self.back


class Proxy:
    """Carries TCP connections to a target, and does to them what networks do.

    It listens on a free port of loopback; for each connection made to it, it makes one to `host` and `port`. What is on
    its way is bounded by `buffer_bytes` for each direction of each connection: past that the sender has to wait, as it
    would for a slow receiver. Where the target cannot be reached, the client's connection is reset.

    It starts at once; use it as a context manager or call `close`. All methods may be called from any thread, and what
    they say is true when they return. Raises `OSError` when no port is free.
    """

    def __init__(self, host: str, port: int, *, buffer_bytes: int = 4 * 1024 * 1024) -> None:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self._family, self._target = address[0], address[4]
        self._shown = f"{host}:{port}"
        self._buffer_bytes = buffer_bytes
        self._delay = 0.0
        self._stalled: set[Direction] = set()
        """Directions in which new connections are stalled from the beginning."""
        self._connections: set[_Connection] = set()
        # The lock is for all of the above and below, and all sockets; the thread gives it away only while it waits.
        self._lock = threading.Lock()
        self._closed = False
        # Never listens: it keeps the port while connections are refused.
        self._reserved = _bound(0)
        self._port: int = self._reserved.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.settimeout(0)
        self._selector.register(self._woken, _READ)
        self._listener: socket.socket | None = None
        self._listen()
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"Proxy({self.endpoint} to {self._shown}, {self.connections} connections)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        return self._port

    @property
    def endpoint(self) -> str:
        """The same as ZMQ names it, ``tcp://127.0.0.1:port``."""
        return f"tcp://127.0.0.1:{self._port}"

    @property
    def connections(self) -> int:
        """How many connections it carries now."""
        with self._lock:
            return len(self._connections)

    @property
    def held(self) -> int:
        """How many bytes are on their way now: read from one side and not written to the other."""
        with self._lock:
            return sum(way.held for connection in self._connections for way in connection.ways)

    def delay(self, seconds: float) -> None:
        """Deliver what is read from now on so much later, in each direction; 0 ends that.

        Bytes keep their order and their rate: many that were sent one after the other are late once, not one by one.
        """
        with self._changed():
            self._delay = seconds

    def stall(self, direction: Direction = "both", *, new_ones: bool = True) -> None:
        """Deliver nothing until `resume`, not even that a side closed its connection; all of it comes then.

        No connection is closed, and new ones are accepted. `direction` lets the other direction flow on: with "back",
        requests arrive and are done, but nobody hears of it. With `new_ones=False` only the connections that there are
        now are stalled: what was said on them comes after what is said on those that are made meanwhile.
        """
        with self._changed():
            self._take_waiting()
            directions: set[Direction] = {"there", "back"} if direction == "both" else {direction}
            if new_ones:
                self._stalled |= directions
            for connection in self._connections:
                for way in connection.ways:
                    way.stalled = way.stalled or way.name in directions

    def resume(self) -> None:
        """Deliver what was held by `stall`, and all that follows."""
        with self._changed():
            self._stalled.clear()
            for connection in self._connections:
                for way in connection.ways:
                    way.stalled = False

    def cut(self) -> None:
        """End all connections at once, with a reset to both sides; what was on its way is lost. New ones are taken."""
        with self._changed():
            # whoever has connected is one to be cut, whether it was noticed yet or not
            self._take_waiting()
            for connection in list(self._connections):
                self._end(connection, reset=True)

    def refuse(self) -> None:
        """Refuse new connections until `accept`; those that there are go on."""
        with self._changed():
            self._take_waiting()
            if self._listener is not None:
                self._selector.unregister(self._listener)
                self._listener.close()
                self._listener = None

    def accept(self) -> None:
        """Take new connections again, at the same port."""
        with self._changed():
            if self._listener is None:
                self._listen()

    def close(self) -> None:
        """Cut all connections and stop listening. May be called twice."""
        with self._lock:
            already, self._closed = self._closed, True
        if already:
            return
        self._awaken()
        self._thread.join()
        self._wake.close()

    # ---- the thread

    def _serve(self) -> None:
        try:
            timeout: float | None = None
            while True:
                ready = self._selector.select(timeout)
                with self._lock:
                    if self._closed:
                        return
                    for key, events in ready:
                        self._handle(key, events)
                    timeout = self._pump_all()
        finally:
            with self._lock:
                self._closed = True
                for connection in list(self._connections):
                    self._end(connection, reset=True)
                for own in (self._listener, self._reserved, self._woken):
                    if own is not None:
                        own.close()
                self._selector.close()

    def _handle(self, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._woken:
            with contextlib.suppress(BlockingIOError):
                while self._woken.recv(_CHUNK):
                    pass
        elif key.fileobj is self._listener:
            self._take_waiting()
        elif key.data in self._connections:  # else it ended since
            connection: _Connection = key.data
            is_client = key.fileobj is connection.client
            reads, writes = connection.ways if is_client else reversed(connection.ways)
            if events & _WRITE:
                writes.blocked = False
                connection.connecting = False
            if events & _READ:
                self._read(reads)

    def _read(self, way: _Way) -> None:
        due = time.monotonic() + self._delay
        try:
            chunk = way.source.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            way.ended = True
            way.add(due, b"reset", is_end=True)
            return
        if not chunk:
            way.ended = True
        if not way.done:  # else nobody is left to hear it
            way.add(due, chunk, is_end=way.ended)

    def _pump_all(self) -> float | None:
        """Deliver all that is due; give the seconds until something else is."""
        now, next_due = time.monotonic(), float("inf")
        for connection in list(self._connections):
            if self._pump(connection, now):
                for way in connection.ways:
                    if way.chunks and not way.blocked and not way.stalled:
                        next_due = min(next_due, way.chunks[0][0])
        return None if next_due == float("inf") else max(0.0, next_due - time.monotonic())

    def _pump(self, connection: _Connection, now: float) -> bool:
        """Deliver what is due on a connection; say whether it goes on."""
        for way in () if connection.connecting else connection.ways:
            while way.chunks and not way.blocked and not way.stalled and way.chunks[0][0] <= now:
                if not self._deliver(way):
                    self._end(connection, reset=True)
                    return False
        if all(way.done for way in connection.ways):
            self._end(connection, reset=False)
            return False
        for way, other in (connection.ways, connection.ways[::-1]):
            may_read = not connection.connecting and not way.ended and way.cost < self._buffer_bytes
            waits = other.blocked or (connection.connecting and way.source is connection.target)
            self._watch(way.source, (_READ if may_read else 0) | (_WRITE if waits else 0), connection)
        return True

    def _deliver(self, way: _Way) -> bool:
        """Write the first chunk of a direction; False where it is a reset."""
        due, chunk, is_end = way.chunks[0]
        if is_end:
            way.forget()
            if chunk:
                return False
            with contextlib.suppress(OSError):
                way.sink.shutdown(socket.SHUT_WR)
            return True
        try:
            sent = way.sink.send(chunk)
        except BlockingIOError:
            way.blocked = True
            return True
        except OSError:
            # Its other direction will say so too. What else the source sends is read and dropped.
            way.forget()
            return True
        way.held -= sent
        way.cost -= sent
        if sent < len(chunk):
            way.chunks[0] = due, chunk[sent:], False
        else:
            way.chunks.popleft()
            way.cost -= _CHUNK_COST
        return True

    # ---- sockets

    def _listen(self) -> None:
        self._listener = _bound(self._port)
        self._listener.listen(1024)
        self._listener.settimeout(0)
        self._selector.register(self._listener, _READ)

    def _take_waiting(self) -> None:
        """Accept all clients that wait for it, and connect each to the target."""
        while self._listener is not None:
            try:
                client, _ = self._listener.accept()
            except OSError:  # nobody waits any more, or who did has gone
                return
            target = socket.socket(self._family, socket.SOCK_STREAM)
            for end in (client, target):
                end.settimeout(0)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(client, target, self._stalled)
            self._connections.add(connection)
            # What does not work is said when the socket is written to: then it is readable and gives the error.
            target.connect_ex(self._target)
            self._watch(target, _WRITE, connection)

    def _watch(self, one: socket.socket, events: int, connection: _Connection) -> None:
        known = self._selector.get_map().get(one)
        if known is None:
            if events:
                self._selector.register(one, events, connection)
        elif not events:
            self._selector.unregister(one)
        elif known.events != events:
            self._selector.modify(one, events, connection)

    def _end(self, connection: _Connection, *, reset: bool) -> None:
        self._connections.discard(connection)
        for one in (connection.client, connection.target):
            self._watch(one, 0, connection)
            if reset:
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_WHEN_CLOSED)
            one.close()

    @contextlib.contextmanager
    def _changed(self) -> Iterator[None]:
        """Change what the thread works with, and let it see that."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the proxy is closed")
            yield
            self._awaken()

    def _awaken(self) -> None:
        with contextlib.suppress(BlockingIOError):  # then it has been told already
            self._wake.send(b"\0")


def _bound(port: int) -> socket.socket:
    """Make a socket of a port that several of this process share."""
    one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("127.0.0.1", port))
    except OSError:
        one.close()
        raise
    return one
