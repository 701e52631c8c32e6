"""What an index looks like in Redis: names of keys, scripts, records. No I/O.

* ``b<block key>``: a string of bits, one for each slot that holds the block.
* ``d<model>``: a hash with a record of each source of a model; ``v<model>``: the version of all of them.
* ``n<model>``: a string of bits, one for each slot number in use.
* ``r<model>``: slots that are to be swept, and how far; ``s<model>``: the lock of whoever sweeps.
* ``l<model>.<slot>``: the ledger of a slot, as a log: what its engine's hashes stand for.
* ``models``: a hash of all models, by the tag that stands for them in other keys.
* ``o<model>.<source>``: the builder that follows a source; ``w<builder>``: how often a builder wrote.
* ``builders`` and ``leases``: who is there, and which pods are whose for how long.

Numbers of slots are given out per model, as only sources of one model ever hold the same blocks: so bits stay few.
"""

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import xxhash

from indexer.base import Copies, Source
from indexer.events import EngineHash
from indexer.keys import BlockKey

MAX_SLOTS = 65_536
"""Slots of one model; a block's string is at most an eighth of this long."""

AT_ONCE = 512
"""Blocks that one script call changes: Redis does nothing else meanwhile, for about a quarter of a millisecond."""

TAKE_SLOT = """
local number = redis.call('BITPOS', KEYS[1], 0)
if number >= tonumber(ARGV[1]) then return -1 end
redis.call('SETBIT', KEYS[1], number, 1)
return number
"""
"""Gives the lowest slot number that is free, -1 where there is none."""

HOLD = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for at = 2, #KEYS do redis.call('SETBIT', KEYS[at], ARGV[2], 1) end
return 1
"""

RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for at = 2, #KEYS do
  if redis.call('GETBIT', KEYS[at], ARGV[2]) == 1 then
    redis.call('SETBIT', KEYS[at], ARGV[2], 0)
    if redis.call('BITCOUNT', KEYS[at]) == 0 then redis.call('DEL', KEYS[at]) end
  end
end
return 1
"""
"""Takes a slot out of blocks; what nobody holds is gone in the same step, so that no writer meets it half gone."""

APPEND = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('APPEND', KEYS[2], ARGV[2])
return 1
"""

REPLACE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
return 1
"""

PUBLISH = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
if ARGV[4] ~= '0' then redis.call('INCRBY', KEYS[3], ARGV[4]) end
for at = 5, #ARGV do redis.call('HSETNX', KEYS[4], ARGV[at], 0) end
return 1
"""
"""Writes a source's record, with a new version where readers have to know, and retires slots that it no longer has."""

LEAVE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('INCRBY', KEYS[3], ARGV[3])
for at = 4, #ARGV do redis.call('HSETNX', KEYS[4], ARGV[at], 0) end
return 1
"""
"""Takes a source out of the directory and retires its slots.

All these begin with a key and the value that it must have, else they do nothing. It says which builder a source is
followed by: once another one took it over, or the database began empty, what the first still has to say is refused.
For the sweep it is its lock.
"""

SHARE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local me, ttl = ARGV[1], tonumber(ARGV[2])
redis.call('ZADD', KEYS[1], now + ttl, me)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local target = math.ceil((#ARGV - 2) / redis.call('ZCARD', KEYS[1]))
local mine, free = {}, {}
for at = 3, #ARGV do
  local lease = redis.call('HGET', KEYS[2], ARGV[at])
  local owner, ends = string.match(lease or '', '^(%S+) (%d+)$')
  if owner == me then mine[#mine + 1] = ARGV[at]
  elseif not owner or tonumber(ends) <= now then free[#free + 1] = ARGV[at] end
end
while #mine > target do redis.call('HDEL', KEYS[2], table.remove(mine)) end
while #mine < target and #free > 0 do mine[#mine + 1] = table.remove(free, 1) end
for _, pod in ipairs(mine) do redis.call('HSET', KEYS[2], pod, string.format('%s %d', me, now + ttl)) end
return mine
"""
"""Divides pods among the builders that called lately: gives those that are the caller's for so many milliseconds."""

QUIT = """
redis.call('ZREM', KEYS[1], ARGV[1])
for at = 2, #ARGV do
  local lease = redis.call('HGET', KEYS[2], ARGV[at])
  if lease and string.match(lease, '^%S+') == ARGV[1] then redis.call('HDEL', KEYS[2], ARGV[at]) end
end
"""
"""Gives pods back."""

ADVANCE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if redis.call('HEXISTS', KEYS[2], ARGV[2]) == 1 then redis.call('HSET', KEYS[2], ARGV[2], ARGV[3]) end
return 1
"""
"""Says how far a slot is swept, if it still is to be swept, and by the one who says it."""

SWEPT = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if redis.call('HDEL', KEYS[2], ARGV[2]) == 1 then
  redis.call('DEL', KEYS[3])
  redis.call('SETBIT', KEYS[4], ARGV[2], 0)
end
return 1
"""
"""Makes the number of a slot that is swept free again, once."""


class SlotRecord(msgspec.Struct, array_like=True):
    """A slot as readers need it, and as its builder finds it again."""

    number: int
    medium: str
    group: int | None
    block_size: int
    blocks: int
    ages: bool
    """No removal was ever announced here, so blocks have to age out."""


class SourceRecord(msgspec.Struct, array_like=True):
    """A source in the directory of its model."""

    pod: str
    rank: int
    incarnation: int
    fleet_wide: bool
    copies: Copies
    reason: str
    """Why its builder calls it degraded, "" when exact."""
    degraded: str
    """The same, or what its ledger knows itself."""
    since: float
    bare_images: bool
    last_seq: int | None
    groups: list[tuple[int, int, int | None]]
    """Number, block size and tail of each cache group."""
    slots: list[SlotRecord]

    @property
    def source(self) -> Source:
        """Whom the record is about."""
        return Source(self.pod, self.rank)


encode_record = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(SourceRecord).decode


def decode_records(directory: dict[bytes, bytes]) -> list[SourceRecord]:
    """Read the directory of a model. Records that cannot be read are somebody else's, or of another version."""
    records = []
    for value in directory.values():
        try:
            records.append(_decode_record(value))
        except msgspec.MsgspecError:
            continue
    records.sort(key=lambda record: record.source)
    return records


class Layout:
    """Names of keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self._block = self._prefix + b"b"
        self.models = self._prefix + b"models"
        self.builders = self._prefix + b"{leases}builders"
        self.leases = self._prefix + b"{leases}pods"

    def tag(self, model: str) -> bytes:
        """Give what stands for a model in keys."""
        return b"{%016x}" % xxhash.xxh3_64_intdigest(model.encode())

    def directory(self, tag: bytes) -> bytes:
        """Name the directory of a model."""
        return self._prefix + b"d" + tag

    def version(self, tag: bytes) -> bytes:
        """Name the version of a model's directory."""
        return self._prefix + b"v" + tag

    def numbers(self, tag: bytes) -> bytes:
        """Name the slot numbers of a model that are in use."""
        return self._prefix + b"n" + tag

    def retired(self, tag: bytes) -> bytes:
        """Name the slots of a model that are to be swept."""
        return self._prefix + b"r" + tag

    def sweeper(self, tag: bytes) -> bytes:
        """Name the lock of whoever sweeps."""
        return self._prefix + b"s" + tag

    def log(self, tag: bytes, slot: int) -> bytes:
        """Name the ledger of a slot."""
        return self._prefix + b"l" + tag + b".%d" % slot

    def owner(self, tag: bytes, field: bytes) -> bytes:
        """Name the builder of a source."""
        return self._prefix + b"o" + tag + b"." + field

    def writes(self, builder: bytes) -> bytes:
        """Name the count of a builder's writes."""
        return self._prefix + b"w" + builder

    def blocks(self, keys: Sequence[BlockKey]) -> list[bytes]:
        """Name some blocks."""
        packed = struct.pack(f">{len(keys)}Q", *keys)
        block = self._block
        return [block + packed[at : at + 8] for at in range(0, len(packed), 8)]

    def look_up(self, version: bytes, keys: Sequence[BlockKey]) -> bytes:
        """Ask for a version and the holders of some blocks in one step: a whole MGET, as it goes over the wire.

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
        return b"*%d\r\n$4\r\nMGET\r\n$%d\r\n%b\r\n%b" % (len(keys) + 2, len(version), version, bytes(rows))


def bit_of(slot: int) -> int:
    """Give the place of a slot in Redis' bit order, so that the string read as a little-endian number has that bit."""
    return slot ^ 7


def holders_of(value: bytes | None) -> int:
    """Read the string of a block: bits of the slots that hold it."""
    return 0 if value is None else int.from_bytes(value, "little")


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
