"""What an index looks like in Redis: names of keys. No I/O.

The blocks of a model are divided by their keys into *parts*. What belongs to a part lies in one hash slot of a cluster,
so that a script may change it in one step; a single server has one part. With each part lie

* ``b<block key>``: a string of bits, one for each slot that holds the block;
* ``l<model>.<slot>``: the ledger of a slot, as a log: what its engine's hashes stand for;
* ``g<model>.<slot>``: the guard of a slot: the builder whose it is;
* ``t<model>``: slots whose blocks are to be taken out there, and how far that is;
* ``w<model>.<builder>``: how often a builder wrote there.

With the first part of a model, its home, lie

* ``d<model>``: a hash with a record of each source; ``v<model>``: the version of all of them;
* ``n<model>``: a string of bits, one for each slot number in use;
* ``r<model>``: slots that are to be swept; ``s<model>``: the lock of whoever sweeps;
* ``o<model>.<source>``: the builder that follows a source.

``models`` is a hash of all models, by the tag that stands for them in other keys; ``builders`` and ``leases`` say who
is there, and which pods are whose for how long. Numbers of slots are given out per model, as only sources of one model
ever hold the same blocks: so bits stay few.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import xxhash

from indexer.base import Source
from indexer.keys import BlockKey

MAX_SLOTS = 65_536
"""Slots of one model; a block's string is at most an eighth of this long."""

PARTS = 16
"""Into how many parts a model is divided in a cluster; at most 16."""

_MODELS_KNOWN = 4096


class Packed(NamedTuple):
    """A command as it goes over the wire, and one of its keys."""

    key: bytes
    content: bytes


class Part:
    """Names of what lies with one part of a model's blocks."""

    __slots__ = ("_block", "_lead", "dying", "tag")

    def __init__(self, lead: bytes, tag: bytes) -> None:
        self.tag = tag
        self._lead = lead
        self._block = lead + b"b"
        self.dying = lead + b"t" + tag

    def log(self, slot: int) -> bytes:
        """Name the ledger of a slot."""
        return self._lead + b"l" + self.tag + b".%d" % slot

    def guard(self, slot: int) -> bytes:
        """Name the guard of a slot."""
        return self._lead + b"g" + self.tag + b".%d" % slot

    def writes(self, builder: bytes) -> bytes:
        """Name the count of a builder's writes."""
        return self._lead + b"w" + self.tag + b"." + builder

    def blocks(self, keys: Sequence[BlockKey]) -> list[bytes]:
        """Name some blocks."""
        packed = struct.pack(f">{len(keys)}Q", *keys)
        block = self._block
        return [block + packed[at : at + 8] for at in range(0, len(packed), 8)]

    def look_up(self, keys: Sequence[BlockKey], *more: bytes) -> Packed:
        """Ask for more, and for the holders of some blocks, in one step: a whole MGET, as it goes over the wire.

        Made in few steps, however many keys there are: one row repeated, and the keys laid into it.
        """
        name = self._block + bytes(8)
        head = b"$%d\r\n" % len(name)
        row = head + name + b"\r\n"
        rows = bytearray(row * len(keys))
        packed = struct.pack(f">{len(keys)}Q", *keys)
        first = len(head) + len(self._block)
        for byte in range(8):
            rows[first + byte :: len(row)] = packed[byte::8]
        before = b"".join(b"$%d\r\n%b\r\n" % (len(key), key) for key in more)
        count = len(keys) + len(more) + 1
        return Packed(name, b"*%d\r\n$4\r\nMGET\r\n%b%b" % (count, before, bytes(rows)))


Divided: TypeAlias = list[tuple[Part, list[int]]]
"""Parts, and the places of the keys that belong to them."""


class Names:
    """Names of what belongs to one model."""

    __slots__ = ("_owner", "directory", "home", "numbers", "parts", "retired", "sweeper", "tag", "version")

    def __init__(self, prefix: bytes, tag: bytes, parts: int) -> None:
        self.tag = tag
        leads = [prefix] if parts == 1 else [prefix + b"{%b.%x}" % (tag[:6], part) for part in range(parts)]
        self.parts = tuple(Part(lead, tag) for lead in leads)
        self.home = self.parts[0]
        lead = leads[0]
        self.directory = lead + b"d" + tag
        self.version = lead + b"v" + tag
        self.numbers = lead + b"n" + tag
        self.retired = lead + b"r" + tag
        self.sweeper = lead + b"s" + tag
        self._owner = lead + b"o" + tag + b"."

    def owner(self, source: Source) -> bytes:
        """Name the builder of a source."""
        return self._owner + field_of(source)

    def part_of(self, key: BlockKey) -> Part:
        """Give the part that a block belongs to."""
        return self.parts[key * len(self.parts) >> 64]

    def divide(self, keys: Sequence[BlockKey]) -> Divided:
        """Say which of some blocks belong to which part; parts that have none are left out."""
        count = len(self.parts)
        if count == 1:
            return [(self.home, list(range(len(keys))))] if keys else []
        places: list[list[int]] = [[] for _ in range(count)]
        for place, key in enumerate(keys):
            places[key * count >> 64].append(place)
        return [(part, mine) for part, mine in zip(self.parts, places, strict=True) if mine]


class Layout:
    """Names of keys under one prefix."""

    def __init__(self, prefix: str, *, parts: int) -> None:
        start = prefix.encode()
        self.models = start + b"models"
        self.builders = start + b"{leases}builders"
        self.leases = start + b"{leases}pods"
        # anybody may ask for any model: not all of them are remembered
        self.tagged = lru_cache(_MODELS_KNOWN)(lambda tag: Names(start, tag, parts))
        """Give the names of the model that a tag stands for."""

    def of(self, model: str) -> Names:
        """Give the names of a model."""
        return self.tagged(tag_of(model))


def tag_of(model: str) -> bytes:
    """Give what stands for a model in keys."""
    return b"%016x" % xxhash.xxh3_64_intdigest(model.encode())


def field_of(source: Source) -> bytes:
    """Give what stands for a source in the directory of its model."""
    return f"{source.rank} {source.pod}".encode()


def bit_of(slot: int) -> int:
    """Give the place of a slot in Redis' bit order, so that the string read as a little-endian number has that bit."""
    return slot ^ 7


def holders_of(value: bytes | None) -> int:
    """Read the string of a block: bits of the slots that hold it."""
    return 0 if value is None else int.from_bytes(value, "little")
