"""What is written to Redis of a slot: its bits, its log. No I/O."""

from collections.abc import Iterable, Iterator, Sequence

from indexer.events import EngineHash
from indexer.keys import BlockKey
from indexer.ledger import Slot
from indexer.redis_layout import Names, bit_of
from indexer.redis_log import log_blocks, log_copies
from indexer.redis_scripts import APPEND, AT_ONCE, HOLD, RELEASE, REPLACE
from indexer.redis_writer import Write
from indexer.tracking import Tracked

_ENTRY = 4096
"""Blocks in one entry of a log that is written anew."""


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
