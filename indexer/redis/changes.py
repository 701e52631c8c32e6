"""What a ledger's changes are in Redis: bits of blocks, entries of logs. No I/O."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from indexer.events import EngineHash
from indexer.keys import BlockKey
from indexer.ledger import Change, Slot
from indexer.redis.builder import Builder
from indexer.redis.layout import Names, bit_of
from indexer.redis.log import log_blocks, log_copies
from indexer.redis.scripts import APPEND, AT_ONCE, HOLD, RELEASE, REPLACE
from indexer.redis.standing import Mirror
from indexer.redis.writer import Write
from indexer.tracking import Tracked

_ENTRY = 4096
"""Blocks in one entry of a log that is written anew."""

_LOG_SLACK = 1024
"""A log is written anew when it has twice the entries that its slot has blocks, and so many more."""


class _Merged(NamedTuple):
    """Changes of one slot that follow each other: the more at once, the cheaper each."""

    tracked: Tracked
    slot: Slot
    mirror: Mirror
    hashes: list[EngineHash]
    keys: list[BlockKey]
    held: bool


class Changes:
    """What the ledgers of one builder say, put behind what is due. One thread at a time."""

    def __init__(self, builder: Builder) -> None:
        self._layout = builder.layout
        self._writer = builder.writer
        self._standing = builder.standing
        self._merged: _Merged | None = None

    def change(self, tracked: Tracked, changes: Iterable[Change]) -> None:
        """Take changes of a source's ledger; those that may go on with the next ones wait for `settle`."""
        for slot, hashes, keys, held in changes:
            if not keys:
                self.settle()
                for write in copies_of(
                    self._layout.of(tracked.model), tracked, slot, self._standing.mirror(slot), hashes
                ):
                    self._writer.add(write)
                continue
            merged = self._merged
            if merged is None or merged.slot is not slot or merged.held is not held:
                self.settle()
                merged = self._merged = _Merged(tracked, slot, self._standing.mirror(slot), [], [], held)
            merged.hashes.extend(hashes)
            merged.keys.extend(keys)

    def settle(self) -> None:
        """Put the changes of a slot that followed each other behind what is due."""
        merged, self._merged = self._merged, None
        if merged is None or self._standing.is_unwritten(merged.tracked):
            return
        tracked, _, mirror, hashes, keys, held = merged
        mirror.logged += len(hashes)
        for write in (holds if held else releases)(self._layout.of(tracked.model), tracked, mirror, hashes, keys):
            self._writer.add(write)

    def compact(self, tracked: Tracked) -> None:
        """Have the logs of a source written anew that became too long."""
        for slot in tracked.ledger.slots.values():
            mirror = self._standing.mirror(slot)
            if mirror.logged > 2 * len(slot.held) + _LOG_SLACK:
                for write in whole_ledger(self._layout.of(tracked.model), tracked, slot, mirror.number):
                    self._writer.add(write)
                mirror.logged = len(slot.held)


def holds(
    names: Names, tracked: Tracked, mirror: Mirror, hashes: Sequence[EngineHash], keys: Sequence[BlockKey]
) -> Iterator[Write]:
    """Make the writes of blocks that a slot holds from now on."""
    number = mirror.number
    for part, places in names.divide(keys):
        for at in range(0, len(places), AT_ONCE):
            some = places[at : at + AT_ONCE]
            mine = [keys[place] for place in some]
            entry = log_blocks([hashes[place] for place in some], mine, held=True)
            first = part.blocks([key for key in mine if _count(mirror.keys, key, held=True)])
            values = bit_of(number), entry
            yield Write(tracked, part, HOLD, part.guard(number), [part.log(number), *first], values)


def releases(
    names: Names, tracked: Tracked, mirror: Mirror, hashes: Sequence[EngineHash], keys: Sequence[BlockKey]
) -> Iterator[Write]:
    """Make the writes of blocks that a slot holds no longer."""
    number = mirror.number
    for part, places in names.divide(keys):
        mine = [keys[place] for place in places]
        last = [key for key in mine if _count(mirror.keys, key, held=False)]
        guard, log = part.guard(number), part.log(number)
        for at in range(0, len(last), AT_ONCE):
            blocks = part.blocks(last[at : at + AT_ONCE])
            yield Write(tracked, part, RELEASE, guard, blocks, (bit_of(number),), frees=True)
        # a log may say too much, never too little: from it the bits are taken back
        entry = log_blocks([hashes[place] for place in places], mine, held=False)
        yield Write(tracked, part, APPEND, guard, [log], (entry,), frees=True)


def copies_of(
    names: Names, tracked: Tracked, slot: Slot, mirror: Mirror, hashes: Iterable[EngineHash]
) -> Iterator[Write]:
    """Make the writes of how many copies a slot has of some blocks."""
    for name in hashes:
        if name in slot.held:  # else it goes with a change that follows
            part = names.part_of(slot.held[name])
            entry = log_copies(name, slot.copies.get(name, 1))
            yield Write(tracked, part, APPEND, part.guard(mirror.number), [part.log(mirror.number)], (entry,))


def whole_ledger(names: Names, tracked: Tracked, slot: Slot, number: int) -> list[Write]:
    """Make the writes of a slot's whole ledger."""
    hashes, keys = list(slot.held), list(slot.held.values())
    divided = dict(names.divide(keys))
    writes = []
    for part in names.parts:
        mine = divided.get(part, [])
        entries = []
        for at in range(0, len(mine), _ENTRY):
            some = mine[at : at + _ENTRY]
            entries.append(log_blocks([hashes[n] for n in some], [keys[n] for n in some], held=True))
        entries += [
            log_copies(name, copies) for name, copies in slot.copies.items() if names.part_of(slot.held[name]) is part
        ]
        writes.append(Write(tracked, part, REPLACE, part.guard(number), [part.log(number)], (b"".join(entries),)))
    return writes


def _count(counts: dict[BlockKey, int], key: BlockKey, *, held: bool) -> bool:
    """Count the names of a key; say whether it is the first that came, or the last that went."""
    count = counts.get(key, 0) + (1 if held else -1)
    if count > 0:
        counts[key] = count
    else:
        counts.pop(key, None)
    return count == (1 if held else 0)
