"""When a builder says to Redis what it has to say: at once, or else when Redis answers again."""

import time
from collections import Counter
from contextlib import suppress

import structlog
from redis.exceptions import OutOfMemoryError

from indexer.errors import IndexUnavailable
from indexer.redis.builder import Builder
from indexer.redis.changes import Changes
from indexer.redis.directory import Directory
from indexer.redis.ownership import Ownership
from indexer.redis.records import SourceRecord
from indexer.redis.resuming import Resumer
from indexer.redis.rewriting import Rewriter
from indexer.tracking import Tracked

_BACKOFF_S = 0.05, 2.0


class Flusher:
    """Brings Redis to what one builder knows. One thread at a time.

    Nothing here raises `IndexUnavailable`: failures are counted in `counters`, and what Redis did not take waits. Where
    that would be more than `buffer_bytes`, the sources are written anew from their ledgers instead.
    """

    def __init__(
        self, builder: Builder, changes: Changes, directory: Directory, *, counters: Counter[str], buffer_bytes: int
    ) -> None:
        self._layout = builder.layout
        self._writer = builder.writer
        self._standing = builder.standing
        self._changes = changes
        self._directory = directory
        self._ownership = Ownership(builder)
        self._rewriter = Rewriter(builder, self._ownership, directory)
        self._resumer = Resumer(builder, self._ownership)
        self._counters = counters
        self._buffer_bytes = buffer_bytes
        self.retry_at = 0.0
        """Before this nothing is asked of Redis, by `time.monotonic`: it did not answer."""
        self._backoff = _BACKOFF_S[0]
        self._log = structlog.get_logger("indexer")

    def resume(self, tracked: Tracked) -> SourceRecord | None:
        """Go on with a source as Redis has it, see `Resumer.resume`, or have it written anew."""
        try:
            return self._resumer.resume(tracked)
        except IndexUnavailable as error:
            self._failed(error)
            # what is there is replaced when Redis answers
            self._standing.call_stale(tracked, is_claimed=False)
            return None

    def take_number(self, tracked: Tracked) -> int | None:
        """Take a number for a new slot of a source: -1 where that is to be written anew, None where all are in use."""
        if self._standing.is_unwritten(tracked):
            return -1
        if time.monotonic() < self.retry_at:
            self._standing.call_stale(tracked)
            return -1
        try:
            number = self._ownership.take_number(self._layout.of(tracked.model))
        except IndexUnavailable as error:
            self._failed(error)
            self._standing.call_stale(tracked)
            return -1
        return None if number < 0 else number

    def flush(self, *, look: bool = False) -> None:
        """Write what is due, or leave it for later; `look` whether Redis still has what we wrote, if nothing is due."""
        self._changes.settle()
        if time.monotonic() < self.retry_at:
            self._keep_within_bounds()
            return
        try:
            self._write(look=look)
            self._backoff = _BACKOFF_S[0]
        except IndexUnavailable as error:
            self._failed(error)

    def _write(self, *, look: bool) -> None:
        if self._writer.is_new_epoch:
            self._ownership.begin_epoch()
        self._directory.publish_due()
        while self._writer.is_due:
            written = self._writer.write_due()
            look = False
            if not self._writer.is_due:
                self._standing.note_published()
            self._ownership.judge(written)
        if look and self._writer.has_written:
            self._rewriter.note_models()
            self._ownership.judge(self._writer.look())
        self._ownership.mark_numbers()
        for tracked in self._standing.unshed():
            if self._writer.is_full:
                self._rewriter.shed(tracked)
        # later than what was due: in that may be what these sources were before
        for tracked in list(self._standing.stale.values()):
            self._counters["rewritten_total"] += self._rewriter.rewrite(tracked)
        for tracked in list(self._standing.gone.values()):
            self._rewriter.take_out(tracked)

    def _failed(self, error: IndexUnavailable) -> None:
        self._standing.call_unpublished_stale()
        self._counters["write_failures_total"] += 1
        self._log.warning("redis_write_failed", error=str(error), waiting_bytes=self._writer.due_bytes)
        self._writer.fail()
        if isinstance(error.__cause__, OutOfMemoryError) and not self._writer.is_full:
            with suppress(IndexUnavailable):
                self._writer.note_full()
        self.retry_at = time.monotonic() + self._backoff
        self._backoff = min(2 * self._backoff, _BACKOFF_S[1])
        self._keep_within_bounds()

    def _keep_within_bounds(self) -> None:
        if self._writer.due_bytes > self._buffer_bytes:
            self._writer.drop()
            self._ownership.call_all_stale()
