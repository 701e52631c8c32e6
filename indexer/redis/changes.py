"""What is written to Redis of a builder's slots: their bits, their logs. No I/O."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from indexer.events import EngineHash
from indexer.keys import BlockKey
from indexer.ledger import Change, Slot
from indexer.redis.layout import Layout, Names, bit_of
from indexer.redis.log import log_blocks, log_copies
from indexer.redis.scripts import APPEND, AT_ONCE, HOLD, RELEASE, REPLACE
from indexer.redis.standing import Standing
from indexer.redis.writer import Write, Writer
from indexer.tracking import Tracked

_ENTRY = 4096
"""Blocks in one entry of a log that is written anew."""

_LOG_SLACK = 1024
"""A log is written anew when it has twice the entries that its slot has blocks, and so many more."""


class Mirror:
    """What is in Redis of a slot."""

    __slots__ = ("keys", "logged", "number", "published")

    def __init__(self, number: int, *, published: bool = False) -> None:
        self.number = number
        self.published = published
        """Whether the source's record has the number: from then on nobody takes it for lost."""
        self.keys: dict[BlockKey, int] = {}
        """How many names stand for each key."""
        self.logged = 0
        """Blocks mentioned in the log."""


class _Merged(NamedTuple):
    """Changes of one slot that follow each other: the more at once, the cheaper each."""

    tracked: Tracked
    slot: Slot
    mirror: Mirror
    hashes: list[EngineHash]
    keys: list[BlockKey]
    held: bool


class Mirrors:
    """What is in Redis of all slots of a builder. Changes of their ledgers are put behind what is due. One thread at a
    time.
    """

    def __init__(self, layout: Layout, writer: Writer, standing: Standing) -> None:
        self._layout = layout
        self._writer = writer
        self._standing = standing
        self._mirrors: dict[Slot, Mirror] = {}
        self._merged: _Merged | None = None
        self._fresh: list[Mirror] = []
        """Mirrors whose numbers are in no record yet."""

    def add(self, slot: Slot, number: int) -> None:
        """Begin with a new slot, under a number that is in no record yet; -1 where it has none yet."""
        mirror = self._mirrors[slot] = Mirror(number)
        self._fresh.append(mirror)

    def replace(self, slot: Slot, number: int) -> Mirror:
        """Begin again with a slot, under a number that the record to come, or that there is, has."""
        mirror = self._mirrors[slot] = Mirror(number, published=True)
        return mirror

    def drop(self, slots: Iterable[Slot]) -> list[int]:
        """Forget slots; give the numbers that they had."""
        gone = [self._mirrors.pop(slot) for slot in slots if slot in self._mirrors]
        return [mirror.number for mirror in gone if mirror.number >= 0]

    def clear(self) -> None:
        """Forget all slots."""
        self._mirrors.clear()

    def number(self, slot: Slot) -> int:
        """Give the number of a slot."""
        return self._mirrors[slot].number

    def numbers(self, tracked: Tracked) -> list[int]:
        """Give the numbers of a source's slots, -1 for those that have none yet."""
        return [self._mirrors[slot].number for slot in tracked.ledger.slots.values() if slot in self._mirrors]

    def are_published(self, tracked: Tracked) -> bool:
        """Whether a source's record has the numbers of all its slots."""
        return all(self._mirrors[slot].published for slot in tracked.ledger.slots.values())

    def note_published(self) -> None:
        """Hear that records with all numbers were written."""
        for mirror in self._fresh:
            mirror.published = True
        self._fresh.clear()

    def change(self, tracked: Tracked, changes: Iterable[Change]) -> None:
        """Take changes of a source's ledger; those that may go on with the next ones wait for `settle`."""
        for slot, hashes, keys, held in changes:
            if not keys:
                self.settle()
                for write in copies_of(self._layout.of(tracked.model), tracked, slot, self._mirrors[slot], hashes):
                    self._writer.add(write)
                continue
            merged = self._merged
            if merged is None or merged.slot is not slot or merged.held is not held:
                self.settle()
                merged = self._merged = _Merged(tracked, slot, self._mirrors[slot], [], [], held)
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
            mirror = self._mirrors[slot]
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
