"""The index in Redis: one shared view for many builders and many scorers.

A builder keeps the ledgers of its sources in memory, as the index in this process does, and writes what they say to
Redis: the bits of each block, a record of each source, and each ledger as a log, from which a builder that was killed
goes on. What could not be written waits within bounds; where that is not enough, or where Redis lost what it had, the
source is written anew from its ledger. So a fault costs time, never truth.
"""

from collections.abc import Collection, Iterable

from indexer.base import Copies, Holding, Limits, Source, SourceStatus
from indexer.errors import IndexUnavailable
from indexer.ledger import Change, Slot
from indexer.prompt import Prompt
from indexer.redis.builder import Builder
from indexer.redis.changes import Changes
from indexer.redis.directory import Directory
from indexer.redis.flushing import Flusher
from indexer.redis.opening import opened
from indexer.redis.reader import Questions, ask
from indexer.redis.standing import Standing
from indexer.redis.sweep import Sweeper
from indexer.redis.writer import Writer
from indexer.tracking import Tracked, TrackingIndex


class RedisIndex(TrackingIndex):
    """An `Index` in Redis or Valkey, one server or a cluster. All methods may be called from any thread.

    `url` is ``redis://user:password@host:port/db``, ``rediss://``, ``valkey://``, ``valkeys://`` or ``unix://path``; or
    ``redis+cluster://user:password@host:port,host:port`` and so on, with some nodes of a cluster. Its options are
    ``prefix`` of all keys (``kvindex:``) and ``timeout`` in seconds (1.0). Nothing else in the database is touched.
    `buffer_bytes` bounds what waits while Redis does not answer.

    Questions raise `IndexUnavailable` when Redis does not answer. Events never do: what they say is written when it
    does again, at the latest with the next call of `expire`.
    """

    def __init__(self, url: str, limits: Limits | None = None, *, buffer_bytes: int = 64 * 1024 * 1024) -> None:
        super().__init__(limits)
        self._store, self._layout = opened(url)
        self._writer = Writer(self._store)
        self._standing = Standing(self._tracked)
        self._questions = Questions(self._layout, self._limits.block_sizes)
        self._sweeper = Sweeper(self._store, self._layout, self._writer)
        builder = Builder(self._store, self._layout, self._writer, self._standing)
        self._changes = Changes(builder)
        self._directory = Directory(builder, self._questions, self._bare_models)
        self._flusher = Flusher(
            builder, self._changes, self._directory, counters=self._counters, buffer_bytes=buffer_bytes
        )
        self._counters.update(dict.fromkeys(("write_failures_total", "rewritten_total", "swept_total"), 0))

    def __repr__(self) -> str:
        return f"RedisIndex({self._store.shown}, {len(self._tracked)} sources of its own)"

    # ---- questions

    def match(
        self,
        prompt: Prompt,
        *,
        pods: Collection[str] | None = None,
        block_size: int | None = None,
        holders_only: bool = False,
    ) -> list[Holding]:
        """Say what each source holds of a prompt, see `Index.match`. Raises `IndexUnavailable`."""
        question = self._questions.match(prompt, pods=pods, block_size=block_size, holders_only=holders_only)
        return ask(question, self._store.run)

    def block_size(self, model: str) -> int | None:
        """Give the usual block size of a model, see `Index.block_size`. Raises `IndexUnavailable`."""
        return ask(self._questions.block_size(model), self._store.run)

    def sources(self) -> list[SourceStatus]:
        """Describe all sources, those of other builders too, see `Index.sources`. Raises `IndexUnavailable`."""
        return ask(self._questions.sources(), self._store.run)

    def stats(self) -> dict[str, int]:
        """Give the counters and gauges of this builder, see `Index.stats`."""
        with self._lock:
            waiting = {
                "write_waiting_bytes": self._writer.due_bytes,
                "stale_sources": len(self._standing.stale),
                "lost_sources": len(self._standing.lost),
            }
            return self._gauges() | waiting

    def close(self) -> None:
        """Write what is due and give the connections back. The sources stay in Redis: another builder goes on."""
        with self._lock:
            self._flusher.retry_at = 0.0
            self._flusher.flush()
            self._tracked.clear()
            self._standing.clear_slots()
        self._store.close()

    # ---- events

    def register(
        self, source: Source, *, model: str, copies: Copies = "count", fleet_wide: bool = False, degraded: str = ""
    ) -> None:
        """Begin to follow a source, see `Index.register`; what another builder wrote of it is gone on with."""
        with self._lock:
            is_new = source not in self._tracked
            if source in self._standing.gone:
                self._flusher.flush()
            super().register(source, model=model, copies=copies, fleet_wide=fleet_wide)
            if is_new:
                if source in self._standing.gone:  # Redis still has what was forgotten
                    self._standing.call_stale(self._tracked[source], is_claimed=False)
                else:
                    record = self._flusher.resume(self._tracked[source])
                    if record is not None and record.bare_images:
                        self._bare_models.add(model)
                self._flusher.flush()
            if degraded and is_new:
                self.degrade(source, degraded)

    def expire(self) -> None:
        """Drop blocks that outlived their time, write what waits, and sweep a little, see `Index.expire`."""
        super().expire()
        with self._lock:
            self._flusher.flush(look=True)
        try:
            self.sweep()
        except IndexUnavailable:
            self._counters["write_failures_total"] += 1

    def _change(self, tracked: Tracked, changes: list[Change]) -> None:
        if not self._standing.is_unwritten(tracked):
            self._directory.note(tracked)
            self._changes.change(tracked, changes)

    def _take_slot(self, tracked: Tracked, slot: Slot) -> bool:
        number = self._flusher.take_number(tracked)
        if number is None:
            return False
        self._standing.add_slot(slot, number)
        self._layout_changed(tracked)
        slot.bit = 1 << max(number, 0)
        return True

    def _layout_changed(self, tracked: Tracked) -> None:
        if not self._standing.is_followed(tracked):
            self._standing.call_gone(tracked)
        self._directory.note(tracked, has_changed=True)

    def _trust_changed(self, tracked: Tracked) -> None:
        self._layout_changed(tracked)
        self._flusher.flush()

    def _applied(self, tracked: Tracked) -> None:
        if not self._standing.is_followed(tracked):
            return
        self._changes.settle()
        self._directory.note(tracked)
        if not self._standing.is_unwritten(tracked):
            self._changes.compact(tracked)
        self._flusher.flush()

    def _reclaim(self, tracked: Tracked, slots: Iterable[Slot]) -> None:
        """Leave slots to the sweep, in the step that takes them out of their source's record."""
        with self._lock:
            self._changes.settle()
            numbers = self._standing.drop_slots(slots)
            if self._standing.is_followed(tracked) and not self._standing.is_unwritten(tracked):
                self._directory.publish(tracked, numbers)
            else:  # they go when it is written anew, or leaves, with all that its record says
                self._standing.note_begun(tracked.source, numbers, self._writer.me)
            self._flusher.flush()

    def release(self, pod: str) -> None:
        """Stop following a pod and leave what it holds in Redis to the builder that follows it from now on."""
        with self._lock:
            self._flusher.flush()
            for source in [source for source in self._tracked if source.pod == pod]:
                tracked = self._tracked.pop(source)
                self._directory.release(source)
                self._standing.release(tracked)

    def sweep(self, budget: int = 16) -> int:
        """Take blocks that nobody sees any more out of Redis, see `Sweeper.sweep`. Raises `IndexUnavailable`."""
        done, swept = self._sweeper.sweep(budget)
        with self._lock:
            self._counters["swept_total"] += swept
        return done
