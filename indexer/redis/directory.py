"""What the directory of a model says of a builder's sources: their records, written when they changed. No I/O."""

import secrets
from collections.abc import Collection, Mapping
from typing import TypeAlias

from indexer.base import Source
from indexer.redis.builder import Builder
from indexer.redis.layout import Names, field_of
from indexer.redis.reader import Questions
from indexer.redis.records import SlotRecord, SourceRecord, encode_record
from indexer.redis.scripts import LEAVE, PUBLISH
from indexer.redis.standing import FULL
from indexer.redis.writer import Value, Write
from indexer.tracking import Tracked

_Outlook: TypeAlias = tuple[str, bool, list[bool]]


class Directory:
    """The records of one builder. A slot that a source no longer has is retired with the record that leaves it out.

    `bare_models` are models of which some source told images only by their places, see `SourceRecord.bare_images`. One
    thread at a time.
    """

    def __init__(self, builder: Builder, questions: Questions, bare_models: Collection[str]) -> None:
        self._layout = builder.layout
        self._writer = builder.writer
        self._standing = builder.standing
        self._questions = questions
        self._bare_models = bare_models
        self._due: dict[Source, Tracked] = {}
        """Sources whose record has to be written; with a new version where `_changed` has them too."""
        self._changed: set[Source] = set()
        self._shown: dict[Source, _Outlook] = {}
        """What else the records of sources say, see `_outlook`."""

    def note(self, tracked: Tracked, *, has_changed: bool = False) -> None:
        """Have a source's record written; `has_changed` where readers have to know at once that it is another."""
        self._due[tracked.source] = tracked
        if has_changed:
            self._changed.add(tracked.source)

    def publish_due(self) -> None:
        """Put the records that changed behind what is due."""
        for tracked in list(self._due.values()):
            if self._standing.is_followed(tracked) and not self._standing.is_unwritten(tracked):
                self.publish(tracked)
        self._due.clear()
        self._changed.clear()

    def publish(self, tracked: Tracked, gone: Collection[int] = ()) -> None:
        """Put a source's record behind what is due, and slots that it no longer has."""
        is_new = (
            tracked.source in self._changed
            or bool(gone)
            or self._shown.get(tracked.source) != _outlook(tracked, bare=tracked.model in self._bare_models)
        )
        if is_new:
            self._questions.forget(tracked.model)
        me = self._writer.me
        self._writer.add(self.record(tracked, dict.fromkeys(gone, me), is_new=is_new))
        self._due.pop(tracked.source, None)
        self._changed.discard(tracked.source)

    def note_written(self, tracked: Tracked) -> None:
        """Hear that a source's new record was written at once."""
        self._questions.forget(tracked.model)
        self._due.pop(tracked.source, None)
        self._changed.discard(tracked.source)

    def note_gone(self, tracked: Tracked) -> None:
        """Hear that a source was taken out."""
        self._questions.forget(tracked.model)
        self._shown.pop(tracked.source, None)

    def release(self, source: Source) -> None:
        """Leave the record of a source to another builder as it is."""
        self._due.pop(source, None)
        self._shown.pop(source, None)

    def record(self, tracked: Tracked, gone: Mapping[int, bytes], *, is_new: bool = True) -> Write:
        """Make the write of a source's record, which retires slots, each whose it was.

        `is_new` where readers have to know at once.
        """
        names = self._layout.of(tracked.model)
        keys, values = _retirement(names, gone)
        record = encode_record(self._record(tracked))
        owner = names.owner(tracked.source)
        keys += [names.home.guard(number) for number in self._standing.numbers(tracked)]
        # what readers see from then on has to be there; on one server it is, in the order in which it is written
        is_last = is_new and len(names.parts) > 1
        values = [field_of(tracked.source), record, _step() if is_new else 0, *values]
        return Write(tracked, names.home, PUBLISH, owner, keys, values, frees=True, is_last=is_last)

    def record_of_none(self, tracked: Tracked, gone: Mapping[int, bytes]) -> Write:
        """Make the write of a record without slots: Redis is too full for them."""
        names = self._layout.of(tracked.model)
        keys, values = _retirement(names, gone)
        record = encode_record(self._record(tracked, says=FULL))
        values = [field_of(tracked.source), record, _step(), *values]
        return Write(tracked, names.home, PUBLISH, names.owner(tracked.source), keys, values, frees=True)

    def departure(self, tracked: Tracked, gone: Mapping[int, bytes]) -> Write:
        """Make the write that takes a source out, and retires its slots."""
        names = self._layout.of(tracked.model)
        keys, values = _retirement(names, gone)
        values = [field_of(tracked.source), b"", _step(), *values]
        return Write(tracked, names.home, LEAVE, names.owner(tracked.source), keys, values, frees=True)

    def _record(self, tracked: Tracked, *, says: str = "") -> SourceRecord:
        """Make a source's record; one that says why nothing is in Redis of it has no slots."""
        ledger = tracked.ledger
        outlook = _outlook(tracked, bare=tracked.model in self._bare_models)
        degraded, bare, _ = self._shown[tracked.source] = outlook
        known = () if says else ledger.slots.values()
        slots = [
            SlotRecord(
                self._standing.mirror(slot).number,
                slot.medium,
                slot.group,
                slot.block_size,
                len(slot.held),
                slot.seen is not None,
            )
            for slot in known
        ]
        groups = [(number, spec.block_size, spec.tail) for number, spec in ledger.groups.items()]
        return SourceRecord(
            *tracked.source,
            tracked.incarnation,
            tracked.fleet_wide,
            tracked.copies,
            tracked.reason,
            says or degraded,
            tracked.since,
            bare,
            tracked.last_seq,
            self._writer.builder,
            groups,
            slots,
        )


def _retirement(names: Names, gone: Mapping[int, bytes]) -> tuple[list[bytes], list[Value]]:
    """Give the keys and the last values of a script that retires slots."""
    keys = [names.directory, names.version, names.retired, *map(names.home.guard, gone)]
    return keys, [secrets.token_hex(8), *(value for pair in gone.items() for value in pair)]


def _step() -> int:
    """Give what a version grows by: to one that it never was, also in a database that began empty since."""
    return 1 + secrets.randbelow(2**31)


def _outlook(tracked: Tracked, *, bare: bool) -> _Outlook:
    """Give what may change in a record while its layout stays."""
    return tracked.degraded(), bare, [slot.seen is not None for slot in tracked.ledger.slots.values()]
