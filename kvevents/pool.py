"""The pool: sockets in, a worker for each publisher, index out."""

import threading
import time
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

import structlog

from indexer import Copies, Index, InvalidQuestion, LimitReached, Source, snapshots
from kvevents import position
from kvevents.apply import OnGap
from kvevents.endpoints import check_endpoint
from kvevents.errors import PoolClosed, SubscriptionError
from kvevents.hearing import LastHeard
from kvevents.message import FLEET_WIDE, Message, Publisher, publisher_of
from kvevents.queue import ShardQueue
from kvevents.shard import Shard
from kvevents.subscriber import Receiver, Subscription
from kvevents.trust import NO_EVENTS_YET
from kvevents.worker import Worker

POD_TIMEOUT_S = 60.0
SILENT_TIMEOUT_S = 3_600.0
QUEUE_MESSAGES = 262_144
QUEUE_BYTES = 512 * 1024 * 1024
_EXPIRE_EVERY_S = 1.0
_RECOVERY_S = 0.005

_ALWAYS = (
    "applied_total",
    "events_total",
    "gaps_total",
    "missing_total",
    "restarts_total",
    "rebuilds_total",
    "unreachable_total",
    "forgotten_total",
    "recovered_total",
    "replays_total",
    "replays_failed_total",
)
"""Counters that are there also before anything was counted."""


class EventPool:
    """Receives the events of many pods and applies them to an index.

    Each publisher belongs to one worker, chosen by the pod's name, so that the events of one source are applied in
    order; different sources go on independently. `workers` is the number of threads, `model` and `copies` hold for pods
    whose subscription and topic do not say. `queue_messages` and `queue_bytes` bound what waits, over all workers: past
    them `submit` waits, while messages from sockets push out the oldest of the busiest publisher, counted, and the
    source is called degraded for the gap.

    A subscribed pod that is not connected for `pod_timeout_s` is not scored until it is again; after the same time once
    more what it held is forgotten. Pods that connect to a bound endpoint are known by their messages alone: for them
    `silent_timeout_s` holds.

    Use it as a context manager, or call `start` and `close`. All methods may be called from any thread.
    """

    def __init__(
        self,
        index: Index,
        *,
        workers: int = 4,
        model: str = "",
        copies: Copies = "count",
        on_gap: OnGap = "keep",
        pod_timeout_s: float = POD_TIMEOUT_S,
        silent_timeout_s: float = SILENT_TIMEOUT_S,
        queue_messages: int = QUEUE_MESSAGES,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        if workers < 1:
            raise SubscriptionError(f"workers: expected at least 1, got {workers}")
        for name, seconds in (("pod_timeout_s", pod_timeout_s), ("silent_timeout_s", silent_timeout_s)):
            if not seconds > 0:
                raise SubscriptionError(f"{name}: expected seconds above 0, got {seconds}")
        self._pod_timeout_s = pod_timeout_s
        self._silent_timeout_s = silent_timeout_s
        self._index = index
        self._copies: Copies = copies
        self._log = structlog.get_logger("kvevents")
        self._workers = [
            Worker(
                f"kvevents-worker-{number}",
                ShardQueue(queue_messages // workers, queue_bytes // workers),
                Shard(index, model=model, copies=copies, log=self._log, on_gap=on_gap, ask=self._ask),
                follows=self._follows,
                on_tick=self._judge_reach,
                upkeep=None if number else index.expire,
                tick_s=_EXPIRE_EVERY_S,
                log=self._log,
            )
            for number in range(workers)
        ]
        self._started = False
        self._receiver: Receiver | None = None
        self._subscribed: dict[str, set[str]] = {}
        self._submitted = 0
        self._lock = threading.Lock()
        self._closed = False
        self._pause = threading.Event()
        """Never set: to wait a moment."""

    def __repr__(self) -> str:
        waiting = sum(worker.queue.messages for worker in self._workers)
        return f"EventPool({len(self._workers)} workers, {len(self._subscribed)} pods, {waiting} messages waiting)"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the workers. May be called twice."""
        with self._lock:
            if self._closed:
                raise PoolClosed("the pool was closed; make a new one")
            if self._started:
                return
            self._started = True
        for worker in self._workers:
            worker.start()

    def close(self) -> None:
        """Stop receiving, apply what was received, end all threads. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()

    def subscribe(
        self,
        pod: str,
        endpoint: str,
        *,
        replay: str | None = None,
        model: str = "",
        topic: str = "",
        copies: Copies | None = None,
    ) -> None:
        """Connect to the publisher of a pod (of one rank of it) and follow it.

        `endpoint` is what the pod publishes at, `tcp://10.0.0.7:5557`; `topic` a prefix of the topics to hear. The pod
        is known as `pod`, whatever its topics say. `replay` is where its replay socket is: there all that the engine
        said lately is asked for when it is connected, and whatever is missing later. Without it a gap shows as a
        degraded source. `copies="set"` is for engines that announce blocks again without copying them (vLLM's report
        mode "full").

        Raises `SubscriptionError` for an endpoint that cannot be used or that is subscribed already, and for more pods
        than the index follows.
        """
        if not pod:
            raise SubscriptionError("pod: expected the name that the router uses, got ''")
        check_endpoint(endpoint)
        if replay is not None:
            check_endpoint(replay)
        with self._lock:
            endpoints = self._subscribed.setdefault(pod, set())
            if endpoint in endpoints:
                raise SubscriptionError(f"endpoint {endpoint!r} is subscribed for pod {pod!r} already")
            first = not endpoints
            endpoints.add(endpoint)
        worker = self._worker(pod)
        try:
            with worker.lock:
                worker.shard.follow(Publisher(pod, endpoint), replays=replay is not None, model=model)
                if first and model:  # before it can say of which rank it is
                    self._index.register(
                        Source(pod),
                        model=model,
                        copies=copies or self._copies,
                        fleet_wide=pod in FLEET_WIDE,
                        degraded=NO_EVENTS_YET,
                    )
            self._open().add(
                Subscription(endpoint, pod=pod, model=model, topic=topic, copies=copies or "", replay=replay)
            )
        except (SubscriptionError, LimitReached) as error:
            with self._lock:
                endpoints.discard(endpoint)
                if not endpoints:
                    self._subscribed.pop(pod, None)
            if first:
                with worker.lock:
                    worker.shard.forget(pod, keep=False)
            if isinstance(error, LimitReached):
                raise SubscriptionError(f"pod {pod!r}: {error}") from error
            raise

    def bind(self, endpoint: str, *, topic: str = "", model: str = "") -> str:
        """Open an endpoint that pods connect to; give its address, with the port where 0 asked for any.

        The topics, `kv@<pod>@<model>`, say who is who. Raises `SubscriptionError` when the endpoint cannot be bound.
        """
        check_endpoint(endpoint, bind=True)
        return self._open().add(Subscription(endpoint, topic=topic, model=model, bind=True))

    def unsubscribe(self, pod: str, *, keep: bool = False) -> None:
        """Stop following a pod and forget all its blocks. Unknown pods are fine.

        `keep` leaves the blocks in an index that is shared, to the builder that follows the pod from now on.
        """
        with self._lock:
            known = self._subscribed.pop(pod, None)
            receiver = self._receiver
        if known is not None and receiver is not None:
            receiver.remove(pod)
        worker = self._worker(pod)
        worker.queue.discard(pod)
        with worker.lock:
            worker.shard.forget(pod, keep=keep)

    def recount(self, source: Source, keys: Collection[int]) -> bool:
        """Count one copy of each of these blocks of a source, between its events, see `Index.recount`.

        Says no where the index cannot do it, or somebody else follows the source.
        """
        with self._worker(source.pod).lock:
            try:
                return self._index.recount(source, keys)
            except InvalidQuestion:
                return False

    def snapshot(self) -> Iterator[snapshots.Part]:
        """Give all that is known, a part for each pod, as it is at one moment; the others' events flow on meanwhile.

        With `indexer.snapshots.write_snapshot` it becomes a file, with `frames` a stream. Raises `InvalidQuestion` for
        an index that is not in this process: what it knows outlives the process anyway.
        """
        index = self._index
        if not isinstance(index, snapshots.SnapshotIndex):
            raise InvalidQuestion(f"{index!r} is kept elsewhere: there is nothing to take a snapshot of")
        return self._parts(index)

    def _parts(self, index: snapshots.SnapshotIndex) -> Iterator[snapshots.Part]:
        statuses = {status.source: status for status in self._index.sources()}
        models = {source: status.model for source, status in statuses.items()}
        by_pod: dict[str, list[Source]] = {}
        for source in index.followed():
            by_pod.setdefault(source.pod, []).append(source)
        for pod, sources in by_pod.items():
            worker = self._worker(pod)
            with worker.lock:
                part = position.part_of(worker.shard.positions(pod, models), sources, index)
            yield part

    def load(self, parts: Iterable[snapshots.Part]) -> int:
        """Go on from a snapshot, before the pool starts; give how many sources it had.

        Pods that are subscribed with a replay endpoint are asked what they said since, and are `behind` until then;
        without one they are `unsure`. Those that nobody subscribes are forgotten as if they could not be reached.

        Raises `SnapshotError` when it cannot be used; nothing is known then. Raises `InvalidQuestion` where the index
        is not in this process, or not empty.
        """
        index = self._index
        if not isinstance(index, snapshots.SnapshotIndex):
            raise InvalidQuestion(f"{index!r} is kept elsewhere: a snapshot cannot be loaded into it")
        if self._started or index.followed():
            raise InvalidQuestion("a snapshot is loaded before anything is followed, and before the pool starts")
        try:
            for part in parts:
                known = position.load_part(part, index)
                self._worker(known.pod).shard.restore(known)
        except BaseException:
            for pod in {source.pod for source in index.followed()}:
                self._worker(pod).shard.forget(pod, keep=False)
            raise
        index.settle()
        return len(index.followed())

    def submit(self, message: Message) -> None:
        """Take a message as if it had come from a socket; waits while the queue is full.

        Raises `PoolClosed` when the pool does not run.
        """
        if self._closed or not self._started:
            raise PoolClosed("the pool does not run; use it as a context manager or call start()")
        with self._lock:
            self._submitted += 1
        publisher = publisher_of(message)
        self._worker(publisher.pod).queue.put(publisher, message)

    def drain(self, timeout: float = 5.0) -> None:
        """Return when all that was received before this call has been applied.

        Raises `TimeoutError` after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            if self._receiver is not None:
                self._receiver.settle()
            queues = [worker.queue for worker in self._workers]
            marks = [queue.mark() for queue in queues]
            for queue, mark in zip(queues, marks, strict=True):
                if not queue.join(mark, max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"{queue.messages} messages still wait after {timeout} s")
            if not any(shard.is_recovering for shard in self._shards()):
                return
            if time.monotonic() >= deadline:
                raise TimeoutError(f"messages that were asked for again have not come after {timeout} s")
            self._pause.wait(_RECOVERY_S)

    def stats(self) -> dict[str, int]:
        """Give all counters and gauges of the pool. Names that end in ``_total`` are counters."""
        totals: Counter[str] = Counter(received_total=self._submitted)
        for worker in self._workers:
            totals.update(worker.stats())
        if self._receiver is not None:
            totals.update(dict(self._receiver.counters))
            totals.update(self._receiver.replay_counters())
        for name in _ALWAYS:
            totals[name] += 0
        return dict(totals)

    def sequences(self) -> dict[Source, int]:
        """Give the sequence number applied last, for each source."""
        return {source: seq for shard in self._shards() for source, seq in list(shard.applier.sequences.items())}

    def heard(self) -> dict[Source, LastHeard]:
        """Say for each source when it was heard last, and how often."""
        return {source: last for shard in self._shards() for source, last in shard.applier.heard().items()}

    def connected(self) -> dict[str, bool]:
        """Say for each subscribed pod whether its publishers are connected."""
        return {} if self._receiver is None else self._receiver.connected()

    def unheard(self) -> dict[str, str]:
        """Give the pods whose topic filter does not let through what they publish, with the topic of that."""
        return {} if self._receiver is None else self._receiver.unheard()

    def awaited(self) -> dict[str, str]:
        """Say for each pod of which it is not known yet what it holds what is missing: ``connection`` or ``replay``.

        One that cannot be reached for `pod_timeout_s` is not awaited any longer.
        """
        pods = {pod: "replay" for shard in self._shards() for pod in shard.catching_up()}
        for publisher, seconds in ({} if self._receiver is None else self._receiver.unreachable()).items():
            if seconds < self._pod_timeout_s:
                pods[publisher.pod] = "connection"
            else:
                pods.pop(publisher.pod, None)
        return pods

    def _open(self) -> Receiver:
        with self._lock:
            if self._closed:
                raise PoolClosed("the pool was closed; make a new one")
            if self._receiver is None:
                self._receiver = Receiver(self._receive, self._has_room, self._log)
            return self._receiver

    def _worker(self, pod: str) -> Worker:
        return self._workers[zlib.crc32(pod.encode()) % len(self._workers)]

    def _shards(self) -> list[Shard]:
        return [worker.shard for worker in self._workers]

    def _has_room(self, pod: str) -> bool:
        return self._worker(pod).queue.has_room

    def _ask(self, publisher: Publisher, replay: int, start: int) -> None:
        receiver = self._receiver
        if receiver is not None:
            receiver.replay(publisher, replay, start)

    def _judge_reach(self, worker: Worker) -> None:
        """Tell a worker which of its publishers cannot be reached, and for how many times as long as they may."""
        receiver, shard = self._receiver, worker.shard
        bound = set() if receiver is None else receiver.bound()
        unreachable = {p: seconds / self._silent_timeout_s for p, seconds in shard.applier.silences(bound).items()}
        left = shard.not_followed(bound)
        for publisher, seconds in {**left, **({} if receiver is None else receiver.unreachable())}.items():
            if self._worker(publisher.pod) is worker:
                unreachable[publisher] = seconds / self._pod_timeout_s
        shard.hear_unreachable(unreachable, bound | {publisher.endpoint for publisher in left})

    def _receive(self, messages: Sequence[Message]) -> None:
        """Take what came from sockets: at once for each worker, which is woken once."""
        shares: dict[Worker, list[tuple[Publisher, Message]]] = {}
        for message in messages:
            publisher = publisher_of(message)
            shares.setdefault(self._worker(publisher.pod), []).append((publisher, message))
        for worker, share in shares.items():
            worker.queue.put_all(share)

    def _follows(self, message: Message) -> bool:
        """Say no for what was on its way when its pod was unsubscribed: it must not bring the pod back.

        The answer is the same for all messages of a publisher.
        """
        return message.pod is None or not message.endpoint or message.endpoint in self._subscribed.get(message.pod, ())
