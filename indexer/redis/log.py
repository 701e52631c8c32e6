"""The ledger of a slot as a log in Redis: what its engine's hashes stand for, entry after entry. No I/O."""

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from indexer.events import EngineHash
from indexer.keys import BlockKey

_LOG = msgspec.msgpack.Encoder()
_HEAD = struct.Struct(">I")
_HELD, _GONE, _COPIES = 0, 1, 2


def log_blocks(names: Sequence[EngineHash], keys: Sequence[BlockKey], *, held: bool) -> bytes:
    """Write an entry of a ledger's log: names that stand for keys from now on, or no longer."""
    packed: bytes | list[EngineHash | str]
    try:
        packed = struct.pack(f">{len(names)}Q", *names)
    except struct.error:  # hashes that are bytes, or numbers beyond 64 bits
        packed = [_said(name) for name in names]
    return _entry([_HELD if held else _GONE, packed, struct.pack(f">{len(keys)}Q", *keys) if held else b""])


def log_copies(name: EngineHash, copies: int) -> bytes:
    """Write an entry of a ledger's log: how many physical copies a name has."""
    return _entry([_COPIES, _said(name), copies])


def _said(name: EngineHash) -> EngineHash | str:
    """Give a name as msgpack can say it."""
    return name if isinstance(name, bytes) or -(2**63) <= name < 2**64 else str(name)


def _heard(name: EngineHash | str) -> EngineHash:
    return int(name) if isinstance(name, str) else name


def _entry(content: list[Any]) -> bytes:
    body = _LOG.encode(content)
    return _HEAD.pack(len(body)) + body


class Replayed(msgspec.Struct):
    """What a log says in the end, and what it said on the way."""

    held: dict[EngineHash, BlockKey] = {}
    copies: dict[EngineHash, int] = {}
    mentioned: list[BlockKey] = []
    """All keys that were ever held."""
    read: int = 0
    """Bytes of whole entries."""
    broken: bool = False
    """What follows is no entry."""

    def feed(self, log: bytes) -> None:
        """Read entries; one that is cut short at the end waits for the next call."""
        place = 0
        while place + 4 <= len(log):
            (size,) = _HEAD.unpack_from(log, place)
            if place + 4 + size > len(log):
                break
            try:
                self._take(msgspec.msgpack.decode(log[place + 4 : place + 4 + size]))
            except (msgspec.MsgspecError, struct.error, ValueError, TypeError):
                self.broken = True
                break
            place += 4 + size
        self.read += place

    def add(self, other: "Replayed") -> None:
        """Take what another log of the same slot said."""
        self.held |= other.held
        self.copies |= other.copies
        self.mentioned += other.mentioned

    def _take(self, entry: list[Any]) -> None:
        kind, names, more = entry
        if kind == _COPIES:
            if more > 1:
                self.copies[_heard(names)] = more
            else:
                self.copies.pop(_heard(names), None)
            return
        if isinstance(names, bytes):
            names = struct.unpack(f">{len(names) // 8}Q", names)
        else:
            names = [_heard(name) for name in names]
        if kind == _GONE:
            for name in names:
                self.held.pop(name, None)
                self.copies.pop(name, None)
            return
        keys = struct.unpack(f">{len(more) // 8}Q", more)
        self.held.update(zip(names, keys, strict=True))
        self.mentioned += keys
