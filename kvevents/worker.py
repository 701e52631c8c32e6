"""One worker of a pool: the messages that wait for it, the publishers that it follows, and a thread between them."""

import threading
import time
from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from kvevents.message import Message
from kvevents.queue import ShardQueue
from kvevents.shard import Shard


class Worker:
    """A thread that applies what is in its queue, one publisher after the other, and outlives whatever that does.

    `follows` says whether a message is still wanted, the same for all messages of a publisher. About every `tick_s` the
    shard is given its tick, and then `on_tick` is called, both with the lock held; then `upkeep`, without.
    """

    def __init__(
        self,
        name: str,
        queue: ShardQueue,
        shard: Shard,
        *,
        follows: Callable[[Message], bool],
        on_tick: Callable[["Worker"], None],
        upkeep: Callable[[], None] | None,
        tick_s: float,
        log: FilteringBoundLogger,
    ) -> None:
        self.queue = queue
        self.shard = shard
        self.lock = threading.Lock()
        """Held by whoever uses the shard."""
        self._errors = 0
        self._follows = follows
        self._on_tick = on_tick
        self._upkeep = upkeep
        self._tick_s = tick_s
        self._log = log
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, once."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more messages; what waits is applied yet."""
        self.queue.close()

    def join(self) -> None:
        """Wait for the end of the thread, if it was started."""
        if self._thread.ident is not None:
            self._thread.join()

    def stats(self) -> dict[str, int]:
        """Give all counters and gauges of this worker, see `EventPool.stats`."""
        return {
            **self.shard.applier.counters,
            "worker_errors_total": self._errors,
            "dropped_held_total": self.shard.dropped_held,
            "dropped_queue_full_total": self.queue.dropped,
            "queue_depth": self.queue.messages,
            "queue_bytes": self.queue.bytes,
        }

    def _work(self) -> None:
        tick_at = time.monotonic() + self._tick_s
        while True:
            taken = self.queue.take(self._tick_s)
            if taken is None and self.queue.closed:
                return
            if taken is not None:
                publisher, messages = taken
                first = messages[0]
                try:
                    with self.lock:
                        if self._follows(first):
                            self.shard.apply(publisher, messages)
                except BaseException as error:  # noqa: BLE001  (a worker serves many pods: not even a panic of the core may end it)
                    self._errors += 1
                    self._log.error("apply_error", topic=first.topic[:80], first_seq=first.seq, error=repr(error))
                    self.shard.distrust(publisher.pod)
                self.queue.done()
            if time.monotonic() >= tick_at:
                try:
                    with self.lock:
                        self.shard.tick()
                        self._on_tick(self)
                    if self._upkeep is not None:
                        self._upkeep()
                except Exception as error:  # noqa: BLE001  (as above)
                    self._errors += 1
                    self._log.error("tick_error", error=repr(error))
                tick_at = time.monotonic() + self._tick_s
