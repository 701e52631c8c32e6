"""Sources that are not written as they change: written anew from their ledgers, or taken out of Redis."""

from collections.abc import Iterable, Sequence

import structlog

from indexer.base import Source
from indexer.errors import IndexUnavailable
from indexer.ledger import Slot
from indexer.redis.builder import Builder
from indexer.redis.changes import copies_of, holds
from indexer.redis.directory import Directory
from indexer.redis.layout import MAX_SLOTS, Names, field_of
from indexer.redis.ownership import Ownership
from indexer.redis.records import decode_records
from indexer.redis.writer import Write, builder_of
from indexer.tracking import Tracked

_AT_A_TIME = 64
"""Script calls in one round trip, where a source is written anew."""


class Rewriter:
    """Brings what Redis has of a builder's sources to what their ledgers say, each at once. One thread at a time."""

    def __init__(self, builder: Builder, ownership: Ownership, directory: Directory) -> None:
        self._store, self._layout, self._writer, self._standing = builder
        self._ownership = ownership
        self._directory = directory
        self._log = structlog.get_logger("indexer")

    def rewrite(self, tracked: Tracked) -> bool:
        """Write a source anew from its ledger, under new slot numbers; the old ones are swept.

        Says no where it is another builder's by now. Raises `IndexUnavailable`; then it is to be written anew still.
        """
        names = self._layout.of(tracked.model)
        self._standing.call_stale(tracked)
        if not self._keep(tracked):
            return False
        numbers = [number for number in self._standing.numbers(tracked) if number >= 0]
        self._standing.note_begun(tracked.source, numbers, self._writer.me)
        old = self._recorded(names, tracked.source)
        self._standing.shed.discard(tracked.source)  # where this fails, what is written by then has to go
        for slot in tracked.ledger.slots.values():
            self._write_slot(tracked, slot)
        self.note_models()
        self._write_now([self._directory.record(tracked, old)])
        self._standing.call_written(tracked.source)
        self._directory.note_written(tracked)
        return True

    def shed(self, tracked: Tracked) -> None:
        """Take a source that Redis has no room for out of it, until there is: what it has of it is out of date.

        Raises `IndexUnavailable`.
        """
        if not self._keep(tracked):
            return
        recorded = self._recorded(self._layout.of(tracked.model), tracked.source)
        written = self._writer.write([self._directory.record_of_none(tracked, recorded)])
        if written.unheld or written.refused:
            return
        self._log.warning("redis_full", pod=tracked.source.pod, rank=tracked.source.rank)
        self._standing.call_shed(tracked.source)
        self._directory.note_written(tracked)

    def take_out(self, tracked: Tracked) -> None:
        """Take a forgotten source out of Redis: from one step to the next nobody sees its blocks.

        One that is followed again meanwhile stays, as it is to be written anew. Raises `IndexUnavailable`.
        """
        if not self._standing.follows(tracked.source):
            recorded = self._recorded(self._layout.of(tracked.model), tracked.source)
            departure = self._directory.departure(tracked, recorded)
            self._ownership.judge(self._writer.write([departure]))  # refused: it is another's by now, or gone already
            self._directory.note_gone(tracked)
            self._standing.call_left(tracked.source)
        self._standing.gone.pop(tracked.source, None)

    def note_models(self) -> None:
        """Say which models there are; in a cluster that may get lost while all else stays.

        Raises `IndexUnavailable`.
        """
        models = {self._layout.of(tracked.model).tag: tracked.model for tracked in self._standing.followed}
        self._store.run([("HSET", self._layout.models, tag, name.encode()) for tag, name in models.items()], full=True)

    def _keep(self, tracked: Tracked) -> bool:
        """Make a stale source this builder's own again, unless another builder follows it now."""
        is_mine = self._ownership.claim(tracked, by_force=tracked.source in self._standing.unclaimed)
        if not is_mine:
            self._standing.stale.pop(tracked.source)
            self._standing.lost.add(tracked.source)
        return is_mine

    def _recorded(self, names: Names, source: Source) -> dict[int, bytes]:
        """Give the slots that Redis has of a source, each with whose it is."""
        (value,) = self._store.run([("HGET", names.directory, field_of(source))])
        records = decode_records({b"": value} if value else {})
        numbers = [slot.number for record in records for slot in record.slots]
        guards = self._store.run([("GET", names.home.guard(number)) for number in numbers])
        found = zip(numbers, guards, strict=True)
        known = {number: guard for number, guard in found if builder_of(guard) == records[0].builder}
        return known | self._standing.begun(source)

    def _write_slot(self, tracked: Tracked, slot: Slot) -> None:
        """Write the blocks of a slot under a new number."""
        names = self._layout.of(tracked.model)
        number = self._ownership.take_number(names)
        if number < 0:
            raise IndexUnavailable(f"{self._store.shown}: all {MAX_SLOTS} slots of {tracked.model!r} are in use")
        mirror = self._standing.replace_slot(slot, number)
        self._standing.note_begun(tracked.source, [number], self._writer.me)
        slot.bit = 1 << number
        mirror.logged = len(slot.held)
        self._write_now(holds(names, tracked, mirror, list(slot.held), list(slot.held.values())))
        self._write_now(copies_of(names, tracked, slot, mirror, slot.copies))

    def _write_now(self, writes: Iterable[Write]) -> None:
        """Write something at once, all of it. Raises `IndexUnavailable`."""
        some: Sequence[Write] = list(writes)
        for at in range(0, len(some), _AT_A_TIME):
            written = self._writer.write(some[at : at + _AT_A_TIME])
            if written.lost:
                self._ownership.start_over(written.lost)
            if written.unheld:
                raise IndexUnavailable(f"{self._store.shown}: there is no memory for more")
            if written.lost or written.refused:
                source = some[0].tracked.source
                raise IndexUnavailable(f"{self._store.shown}: source {source} was taken over while it was written")
