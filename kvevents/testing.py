"""A publisher that speaks the engines' wire, and builders of their events, for tests, simulations and measurements.

`Publisher` sends what vLLM's ZMQ publisher sends (frames, sequence numbers, replay); `stored`, `removed` and `cleared`
build one event in the words of a dialect. `FullWorker` applies messages as a worker of `EventPool` does.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import msgspec
import structlog
import zmq

from indexer import Index
from kvevents.message import Message
from kvevents.message import Publisher as From
from kvevents.queue import ShardQueue
from kvevents.shard import Shard

Dialect: TypeAlias = Literal["vllm-map", "vllm-array", "vllm-0.9", "sglang"]
"""vLLM from 0.24 (maps), vLLM 0.23 (tagged arrays, all fields), vLLM 0.9 (short tagged arrays), SGLang (maps)."""

DIALECTS: tuple[Dialect, ...] = ("vllm-map", "vllm-array", "vllm-0.9", "sglang")

Framing: TypeAlias = Literal["new", "old"]
"""How replies to a replay request are framed: with the topic (vLLM from 0.26) or without it."""

Name: TypeAlias = int | bytes
"""An engine's name of a block, as it is on the wire."""

RawEvent: TypeAlias = dict[str, Any] | list[Any]
"""An event as it goes into msgpack."""

_END = b"\xff" * 8
_BIND_TIMEOUT_S = 5.0
_POLL_MS = 20


def stored(
    dialect: Dialect,
    hashes: Sequence[Name],
    parent: Name | None,
    tokens: Sequence[int],
    block_size: int,
    *,
    medium: str | None = "GPU",
    lora_name: str | None = None,
    lora_id: int | None = None,
    cache_salt: str | None = None,
    extra_keys: list[list[Any] | None] | None = None,
    group_idx: int | None = 0,
    kind: str | None = "full_attention",
    sliding_window: int | None = None,
) -> RawEvent:
    """Build the event of blocks that entered the cache.

    Fields that a dialect does not have are left out. vLLM's `extra_keys` are made from the adapter's name and, at a
    prompt's start, its salt, unless they are given.
    """
    names = _names(dialect, hashes)
    before = None if parent is None else _names(dialect, [parent])[0]
    basic = [names, before, list(tokens), block_size, lora_id]
    if dialect == "vllm-0.9":
        return ["BlockStored", *basic]
    if dialect == "sglang":
        event = dict(zip(_BASIC, basic, strict=True)) | {"type": "BlockStored", "medium": medium}
        return event | {k: v for k, v in (("lora_name", lora_name), ("cache_salt", cache_salt)) if v is not None}
    if extra_keys is None:
        salt = cache_salt if parent is None else None
        extra_keys = [
            [key for key in (lora_name, salt if number == 0 else None) if key is not None] or None
            for number in range(len(names))
        ]
    if dialect == "vllm-array":
        return ["BlockStored", *basic, medium, lora_name, extra_keys, group_idx, kind, sliding_window]
    event = {"type": "BlockStored"} | dict(zip(_BASIC, basic, strict=True)) | {"medium": medium, "lora_name": lora_name}
    rest = {
        "extra_keys": extra_keys,
        "group_idx": group_idx,
        "kv_cache_spec_kind": kind,
        "kv_cache_spec_sliding_window": sliding_window,
    }
    return event | {key: value for key, value in rest.items() if value is not None}


def removed(
    dialect: Dialect, hashes: Sequence[Name], *, medium: str | None = "GPU", group_idx: int | None = 0
) -> RawEvent:
    """Build the event of blocks of which one copy each left the cache."""
    names = _names(dialect, hashes)
    if dialect == "vllm-0.9":
        return ["BlockRemoved", names]
    if dialect == "vllm-array":
        return ["BlockRemoved", names, medium, group_idx]
    event: dict[str, Any] = {"type": "BlockRemoved", "block_hashes": names, "medium": medium}
    if dialect == "vllm-map" and group_idx is not None:
        event["group_idx"] = group_idx
    return event


def cleared(dialect: Dialect) -> RawEvent:
    """Build the event of a cache that was emptied."""
    return ["AllBlocksCleared"] if dialect in ("vllm-0.9", "vllm-array") else {"type": "AllBlocksCleared"}


_BASIC = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id")


def _names(dialect: Dialect, hashes: Sequence[Name]) -> list[Name]:
    if dialect != "sglang":
        return list(hashes)
    return [name - 2**64 if isinstance(name, int) and name >= 2**63 else name for name in hashes]


class Publisher:
    """Publishes batches of events the way an engine does.

    `endpoint` is bound, or connected to with `connect=True` (for subscribers that bind); port 0 takes any. `replay`
    is the endpoint of the replay socket, which answers from the last `buffer_steps` batches. `rank=None` sends batches
    without a rank, as vLLM 0.9.0 did. Past `hwm` waiting messages a slow subscriber loses some, without a word.

    It starts at once; use it as a context manager or call `close`. All methods may be called from any thread.
    Raises `zmq.ZMQError` when an endpoint cannot be used.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        replay: str | None = None,
        topic: bytes = b"",
        rank: int | None = 0,
        buffer_steps: int = 10_000,
        framing: Framing = "new",
        connect: bool = False,
        hwm: int = 100_000,
        context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
    ) -> None:
        self.topic = topic
        self.rank = rank
        self.framing: Framing = framing
        self._endpoint = endpoint
        self._replay_endpoint = replay
        self._connect = connect
        self._hwm = hwm
        self._own_context = context is None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context() if context is None else context
        self._ring: deque[tuple[int, bytes]] = deque(maxlen=buffer_steps)
        self.answers_at_most: int | None = None
        """How many batches it sends for a replay before it falls silent, without an end; None: all, and the end."""
        self.answer_delay_s = 0.0
        """How long it waits before it answers."""
        self._next = 0
        self._subscribers = 0
        # One lock for the publishing socket, its counters and the ring; the replay socket belongs to its thread alone.
        self._lock = threading.Lock()
        self._socket: zmq.Socket[bytes] | None = None
        self._stop: zmq.Socket[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._pause = threading.Event()
        """Set while it is closed."""
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Publisher({self._endpoint}, next seq {self._next})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        """Where it publishes, with the real port."""
        return self._endpoint

    @property
    def replay(self) -> str | None:
        """Where it answers replay requests, with the real port; None when it does not."""
        return self._replay_endpoint

    @property
    def buffer_steps(self) -> int:
        """How many batches it keeps for replays. May be set at any time; the oldest then go."""
        return self._ring.maxlen or 0

    @buffer_steps.setter
    def buffer_steps(self, count: int) -> None:
        with self._lock:
            self._ring = deque(self._ring, maxlen=count)

    @property
    def last_seq(self) -> int:
        """The number of the last batch, -1 before the first."""
        return self._next - 1

    @property
    def subscribers(self) -> int:
        """How many subscriptions there are now; one for each topic of each subscriber."""
        with self._lock:
            self._count()
            return self._subscribers

    def wait_for_subscribers(self, count: int = 1, timeout: float = 5.0) -> None:
        """Return when there are at least `count` subscriptions.

        Raises `TimeoutError` after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                self._count()
                if self._subscribers >= count:
                    return
                left = deadline - time.monotonic()
                if left <= 0 or self._socket is None:
                    raise TimeoutError(f"{self._subscribers} of {count} subscribers at {self._endpoint}")
                self._socket.poll(min(_POLL_MS, int(left * 1000) + 1))

    def publish(self, events: Sequence[Any], *, lost: bool = False) -> int:
        """Send a batch of events; give its sequence number.

        `lost` keeps the batch for replay but does not send it, as if it had been dropped on the way.
        """
        batch: list[Any] = [time.time(), list(events)]
        return self.send(msgspec.msgpack.encode(batch if self.rank is None else [*batch, self.rank]), lost=lost)

    def send(self, payload: bytes, *, lost: bool = False, seq: int | None = None) -> int:
        """Send a payload as it is; give its sequence number.

        `seq` is the number it is to have. One that is not higher than the last begins anew, as a restarted engine does,
        on the same connections: nothing from before can be replayed.
        """
        with self._lock:
            if self._socket is None:
                raise RuntimeError("the publisher is closed")
            if seq is None:
                seq = self._next
            elif seq < self._next:
                self._ring.clear()
            self._next = seq + 1
            self._ring.append((seq, payload))
            if not lost:
                self._socket.send_multipart((self.topic, seq.to_bytes(8, "big"), payload))
            if seq % 64 == 0:
                self._count()
            return seq

    def restart(self) -> None:
        """Begin anew as a restarted engine does: same endpoints, connections cut, seq from 0, nothing to replay."""
        self._shut()
        with self._lock:
            self._ring.clear()
            self._next = 0
            self._subscribers = 0
        self._open()

    def close(self) -> None:
        """Close all sockets; what is not sent yet is dropped. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._shut()
        if self._own_context:
            self._context.term()

    def _open(self) -> None:
        self._pause.clear()
        socket = self._context.socket(zmq.XPUB)
        socket.linger = 0
        socket.sndhwm = self._hwm
        # Plain XPUB tells only of the first subscriber to a topic; to count them one must hear of all.
        socket.setsockopt(zmq.XPUB_VERBOSER, 1)
        with self._lock:
            self._socket = socket
        if self._connect:
            socket.connect(self._endpoint)
        else:
            self._endpoint = _bind(socket, self._endpoint)
        if self._replay_endpoint is None:
            return
        router = self._context.socket(zmq.ROUTER)
        router.linger = 0
        router.sndhwm = 2 * ((self._ring.maxlen or 0) + 1)
        try:
            self._replay_endpoint = _bind(router, self._replay_endpoint)
        except zmq.ZMQError:
            router.close(0)
            raise
        address = f"inproc://stop-{id(router)}"
        stop, stopped = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        stop.bind(address)
        stopped.connect(address)
        self._stop = stop
        self._thread = threading.Thread(target=self._serve, args=(router, stopped), name="replay", daemon=True)
        self._thread.start()

    def _shut(self) -> None:
        self._pause.set()
        if self._thread is not None and self._stop is not None:
            self._stop.send(b"")
            self._thread.join()
            self._stop.close(0)
            self._thread = self._stop = None
        with self._lock:
            if self._socket is not None:
                self._socket.close(0)
                self._socket = None

    def _count(self) -> None:
        if self._socket is None:
            return
        while True:
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            if message[:1] == b"\x01":
                self._subscribers += 1
            elif message[:1] == b"\x00":
                self._subscribers -= 1

    def _serve(self, router: "zmq.Socket[bytes]", stopped: "zmq.Socket[bytes]") -> None:
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(stopped, zmq.POLLIN)
        while stopped not in (ready := dict(poller.poll())):
            if router in ready:
                self._answer(router, router.recv_multipart())
        router.close(0)
        stopped.close(0)

    def _answer(self, router: "zmq.Socket[bytes]", request: list[bytes]) -> None:
        if len(request) != 3 or len(request[2]) != 8:
            return  # an engine logs it and stays silent
        peer, start = request[0], int.from_bytes(request[2], "big")
        with self._lock:
            batches = [(seq, payload) for seq, payload in self._ring if seq >= start]
        old, most = self.framing == "old", self.answers_at_most
        self._pause.wait(self.answer_delay_s)
        for seq, payload in batches[:most]:
            number = seq.to_bytes(8, "big")
            router.send_multipart([peer, b"", number, payload] if old else [peer, b"", self.topic, number, payload])
        if most is not None:
            return
        router.send_multipart([peer, b"", _END, b""] if old else [peer, b"", b"", _END, b""])


class FullWorker:
    """A worker of an `EventPool` whose queue is filled before it works, in the thread of whoever calls `work`.

    For measurements: what it takes to apply events, without the time to receive them. `model` is that of all messages.
    """

    def __init__(self, index: Index, messages: Sequence[Message] = (), *, model: str) -> None:
        self._queue = ShardQueue(sys.maxsize, sys.maxsize)
        self._shard = Shard(index, model=model, copies="count", log=structlog.get_logger("kvevents"))
        self.fill(messages)

    def fill(self, messages: Sequence[Message]) -> None:
        """Put messages into the queue."""
        for message in messages:
            self._queue.put(From(message.pod or "", message.endpoint), message)

    def work(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Apply what is in the queue, or so much of it until it is `enough`; that is asked between two takes."""
        while (taken := self._queue.take(0)) and not enough():
            self._shard.apply(*taken)
            self._queue.done()


def _bind(socket: "zmq.Socket[bytes]", endpoint: str) -> str:
    """Bind; a port that was closed a moment ago (restart) may need some tries until the system has let it go."""
    deadline = time.monotonic() + _BIND_TIMEOUT_S
    pause = threading.Event()
    fixed = not endpoint.endswith(":0")
    while True:
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or not fixed or time.monotonic() >= deadline:
                raise
            pause.wait(_POLL_MS / 1000)
        else:
            return socket.get_string(zmq.LAST_ENDPOINT)
