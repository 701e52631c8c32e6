"""A source as bytes, and back: little-endian numbers, texts and columns of names and keys.

The compiled core writes and reads the same (`native/src/ledger/dump.rs`). It keeps 127 bits of XXH3 in the place of
byte digests, so that is what stands here for them. What is read may be anything: it is checked before it is used.
"""

import struct
import sys
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain
from typing import cast

import xxhash

from indexer.base import TIERS, Limits, Source
from indexer.errors import SnapshotError
from indexer.events import BlockStored, EngineHash
from indexer.groups import GroupSpec
from indexer.keys import BlockKey
from indexer.ledger import Ledger, Slot
from indexer.tracking import Tracked
from indexer.waiting import ParkedEvent, Place

_DIGEST = 1 << 127


def name_of(name: EngineHash) -> int:
    """Give the number that stands for a name in a snapshot; it is below 2**64 for names that are numbers."""
    return name if isinstance(name, int) else xxhash.xxh3_128_intdigest(name) | _DIGEST


class Writer:
    """Gathers bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def joined(self) -> bytes:
        """Give all of them."""
        return b"".join(self._parts)

    def number(self, kind: str, value: float) -> None:
        """Write a number in a format of `struct`."""
        self._parts.append(struct.pack("<" + kind, value))

    def blob(self, value: bytes) -> None:
        """Write bytes and how many they are."""
        self.number("Q", len(value))
        self._parts.append(value)

    def text(self, value: str) -> None:
        """Write a text."""
        self.blob(value.encode("utf-8", "surrogatepass"))

    def maybe(self, value: str | None) -> None:
        """Write a text that may be missing."""
        self.number("?", value is not None)
        if value is not None:
            self.text(value)

    def group(self, value: int | None) -> None:
        """Write a number that may be missing."""
        self.number("q", -1 if value is None else value)

    def name(self, name: EngineHash) -> None:
        """Write the name of a block."""
        self._parts.append(name_of(name).to_bytes(16, "little"))

    def names(self, names: list[EngineHash]) -> None:
        """Write names and how many they are."""
        self.number("Q", len(names))
        for name in names:
            self.name(name)

    def words(self, kind: str, values: Iterable[int]) -> None:
        """Write a column of numbers."""
        column = array(kind, values)
        if sys.byteorder == "big":
            column.byteswap()
        self._parts.append(column.tobytes())


class Reader:
    """Reads what a `Writer` wrote. Raises `SnapshotError` for what cannot be so."""

    def __init__(self, section: bytes) -> None:
        self._bytes = memoryview(section)
        self._at = 0

    def flaw(self, what: str) -> SnapshotError:
        """Make the error that says what is wrong, and where."""
        return SnapshotError(f"{what} at byte {self._at}")

    def take(self, length: int) -> memoryview:
        """Give the next bytes."""
        if length > len(self._bytes) - self._at:
            raise self.flaw(f"{length} bytes are said to follow, but {len(self._bytes) - self._at} do")
        self._at += length
        return self._bytes[self._at - length : self._at]

    def whole(self, kind: str) -> int:
        """Read a whole number in a format of `struct`."""
        return int(struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0])

    def flag(self) -> bool:
        """Read yes or no."""
        value = self.whole("B")
        if value > 1:
            raise self.flaw(f"expected 0 or 1, got {value}")
        return bool(value)

    def seconds(self) -> float:
        """Read a finite number."""
        (value,) = struct.unpack("<d", self.take(8))
        if not abs(value) < float("inf"):
            raise self.flaw("expected a finite number")
        return float(value)

    def count(self, width: int) -> int:
        """Read how many rows of `width` bytes follow."""
        count, left = self.whole("Q"), len(self._bytes) - self._at
        if count > left // width:
            raise self.flaw(f"{count} rows are said to follow, but {left} bytes do")
        return count

    def blob(self) -> bytes:
        """Read bytes."""
        return bytes(self.take(self.count(1)))

    def text(self) -> str:
        """Read a text."""
        try:
            return self.blob().decode()
        except UnicodeDecodeError:
            raise self.flaw("expected text in UTF-8") from None

    def maybe(self) -> str | None:
        """Read a text that may be missing."""
        return self.text() if self.flag() else None

    def group(self) -> int | None:
        """Read a number that may be missing."""
        value = self.whole("q")
        if not -1 <= value < 2**32:
            raise self.flaw(f"no number of 32 bits: {value}")
        return None if value < 0 else value

    def size(self) -> int:
        """Read a block size."""
        size = self.whole("I")
        if not size:
            raise self.flaw("a block size of 0")
        return size

    def name(self) -> int:
        """Read the name of a block."""
        name = int.from_bytes(self.take(16), "little")
        if 2**64 <= name < _DIGEST:
            raise self.flaw("no name of a block")
        return name

    def names(self) -> list[EngineHash]:
        """Read names."""
        return [self.name() for _ in range(self.count(16))]

    def words(self, kind: str, count: int) -> "array[int]":
        """Read a column of numbers."""
        column = array(kind)
        column.frombytes(self.take(column.itemsize * count))
        if sys.byteorder == "big":
            column.byteswap()
        return column

    def end(self) -> None:
        """Say that nothing more is expected."""
        if self._at != len(self._bytes):
            raise self.flaw("more than was expected")


def source_of(section: bytes) -> Source:
    """Give the source that a section is about."""
    reader = Reader(section)
    return Source(reader.text(), reader.whole("Q"))


def write_source(tracked: Tracked, *, is_bare: bool) -> bytes:
    """Write all that is known of a source. With the index locked."""
    out = Writer()
    out.text(tracked.source.pod)
    out.number("Q", tracked.source.rank)
    out.text(tracked.model)
    out.number("?", tracked.copies == "count")
    out.number("?", tracked.fleet_wide)
    out.number("Q", tracked.incarnation)
    out.text(tracked.reason)
    out.number("d", tracked.since)
    out.number("Q", 0 if tracked.last_seq is None else min(tracked.last_seq + 1, 2**64 - 1))
    out.number("?", is_bare)
    out.number("d", time.time())
    _write_ledger(out, tracked.ledger)
    return out.joined()


def _write_ledger(out: Writer, ledger: Ledger) -> None:
    out.number("?", ledger._conflicts)
    out.number("B", 0 if ledger._evicted is None else TIERS.index(ledger._evicted) + 1)
    out.number("Q", len(ledger.groups))
    for number, spec in ledger.groups.items():
        out.number("I", number)
        out.number("I", spec.block_size)
        out.number("Q", spec.tail or 0)
    out.number("Q", len(ledger.slots))
    for slot in ledger.slots.values():
        _write_slot(out, slot)
    out.number("Q", len(ledger._removed))
    for name, (key, size) in ledger._removed.items():
        out.name(name)
        out.number("Q", key)
        out.number("I", size)
    out.number("Q", ledger.waiting.dropped)
    parked = ledger.waiting.parked()
    out.number("Q", len(parked))
    for event in parked:
        _write_parked(out, event)
    unplaced = ledger.waiting.unplaced()
    out.number("Q", len(unplaced))
    for waiting, place, size in unplaced:
        out.name(waiting)
        out.text(place.medium)
        out.group(place.group)
        out.number("I", size)


def _write_slot(out: Writer, slot: Slot) -> None:
    out.text(slot.medium)
    out.group(slot.group)
    out.number("I", slot.block_size)
    named = [(name_of(name), key) for name, key in slot.held.items()]
    ints = [row for row in named if row[0] < _DIGEST]
    digests = [row for row in named if row[0] >= _DIGEST]
    out.number("Q", len(ints))
    out.words("Q", (name for name, _ in ints))
    out.words("Q", (key for _, key in ints))
    out.number("Q", len(digests))
    out.words("Q", chain.from_iterable((name % 2**64, name >> 64) for name, _ in digests))
    out.words("Q", (key for _, key in digests))
    out.number("Q", len(slot.copies))
    for name, copies in slot.copies.items():
        out.name(name)
        out.number("Q", copies)
    out.number("?", slot.seen is not None)
    if slot.seen is not None:
        now = time.monotonic()
        out.number("Q", len(slot.seen))
        for name, seen in slot.seen.items():
            out.name(name)
            out.number("d", max(0.0, now - seen))


def _write_parked(out: Writer, parked: ParkedEvent) -> None:
    event = parked.event
    out.names(event.block_hashes)
    out.name(0 if event.parent_block_hash is None else event.parent_block_hash)
    out.number("Q", len(event.token_ids))
    out.words("I", event.token_ids)
    out.number("I", event.block_size)
    out.text(event.medium)
    out.group(event.group_idx)
    out.maybe(event.kind)
    out.group(event.sliding_window)
    if event.lora is None:
        out.number("B", 0)
    elif isinstance(event.lora, str):
        out.number("B", 1)
        out.text(event.lora)
    else:
        out.number("B", 2)
        out._parts.append(event.lora.to_bytes(16, "little", signed=True))
    out.maybe(event.cache_salt)
    out.number("?", event.extras is not None)
    if event.extras is not None:
        out.number("Q", len(event.extras))
        for extra in event.extras:
            out.blob(extra)
    out.number("?", event.bare_images)
    out.maybe(event.model)
    out.names(parked.removed)


def read_head(reader: Reader) -> tuple[Tracked, bool, float]:
    """Read who a source is, whether its model's images come without places, and how many seconds ago that was so."""
    source = Source(reader.text(), reader.whole("Q"))
    model = reader.text()
    counted, fleet_wide = reader.flag(), reader.flag()
    tracked = Tracked(source, model, "count" if counted else "set", fleet_wide=fleet_wide)
    tracked.incarnation, tracked.reason, tracked.since = reader.whole("Q"), reader.text(), reader.seconds()
    after = reader.whole("Q")
    tracked.last_seq = after - 1 if after else None
    is_bare = reader.flag()
    return tracked, is_bare, max(0.0, time.time() - reader.seconds())


def read_ledger(reader: Reader, ledger: Ledger, limits: Limits, age: float) -> list[Slot]:
    """Read into a new ledger, and give its slots, which are not yet in it: the index has to enter them."""
    ledger._conflicts = reader.flag()
    tier = reader.whole("B")
    if tier > len(TIERS):
        raise reader.flaw("no tier")
    ledger._evicted = TIERS[tier - 1] if tier else None
    for _ in range(reader.count(16)):
        number, size, tail = reader.whole("I"), reader.size(), reader.whole("Q")
        if number in ledger.groups:
            raise reader.flaw("a cache group is there twice")
        ledger.groups[number] = GroupSpec(size, tail or None)
    count = reader.count(1)
    if count > limits.max_slots_per_source:
        raise reader.flaw(f"{count} slots, more than Limits.max_slots_per_source")
    slots = [_read_slot(reader, age) for _ in range(count)]
    if len({(slot.medium, slot.group, slot.block_size) for slot in slots}) < count:
        raise reader.flaw("a slot is there twice")
    for _ in range(reader.count(28)):
        name = reader.name()
        ledger._removed[name] = (BlockKey(reader.whole("Q")), reader.size())
        if len(ledger._removed) > limits.remembered_blocks:
            ledger._removed.popitem(last=False)
    dropped = reader.whole("Q")
    for _ in range(reader.count(1)):
        ledger.waiting.put_back(_read_parked(reader))
    for _ in range(reader.count(1)):
        name, place = reader.name(), Place(reader.text(), reader.group())
        ledger.waiting.wait(name, place, reader.whole("I"), counted=True)
    ledger.waiting.dropped += dropped
    reader.end()
    return slots


def _read_slot(reader: Reader, age: float) -> Slot:
    slot = Slot(reader.text(), reader.group(), reader.size())
    ints = reader.count(16)
    held = dict(zip(reader.words("Q", ints), reader.words("Q", ints), strict=True))
    digests = reader.count(24)
    words = iter(reader.words("Q", 2 * digests))
    names = [low | high << 64 for low, high in zip(words, words, strict=True)]
    held.update(zip(names, reader.words("Q", digests), strict=True))
    if len(held) < ints + digests or any(name < _DIGEST for name in names):
        raise reader.flaw("a block is named twice, or by what is no name")
    slot.held = cast("dict[EngineHash, BlockKey]", held)
    for _ in range(reader.count(24)):
        name, copies = reader.name(), reader.whole("Q")
        if copies < 2:
            raise reader.flaw("less than two copies")
        slot.copies[name] = copies
    slot.seen = None
    if reader.flag():
        slot.seen, now = OrderedDict(), time.monotonic()
        for _ in range(reader.count(24)):
            name = reader.name()
            slot.seen[name] = now - reader.seconds() - age
    return slot


def _read_parked(reader: Reader) -> ParkedEvent:
    hashes, parent = reader.names(), reader.name()
    tokens = reader.words("I", reader.count(4))
    size, medium, group = reader.size(), reader.text(), reader.group()
    kind, window = reader.maybe(), reader.group()
    lora: str | int | None = None
    match reader.whole("B"):
        case 0:
            pass
        case 1:
            lora = reader.text()
        case 2:
            lora = int.from_bytes(reader.take(16), "little", signed=True)
        case _:
            raise reader.flaw("no adapter")
    salt = reader.maybe()
    extras = [reader.blob() for _ in range(reader.count(8))] if reader.flag() else None
    event = BlockStored(
        block_hashes=hashes,
        parent_block_hash=parent,
        token_ids=tokens,
        block_size=size,
        medium=medium,
        group_idx=group,
        kind=kind,
        sliding_window=window,
        lora=lora,
        cache_salt=salt,
        extras=extras,
        bare_images=reader.flag(),
        model=reader.maybe(),
    )
    parked = ParkedEvent(event)
    parked.removed = reader.names()
    return parked
