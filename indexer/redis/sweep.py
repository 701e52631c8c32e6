"""Taking the blocks of slots that nobody sees any more out of Redis, in the background."""

import secrets
import time
from typing import NamedTuple

import structlog

from indexer.redis.layout import Layout, Names, Part, bit_of
from indexer.redis.log import Replayed
from indexer.redis.records import decode_records, pairs_of
from indexer.redis.scripts import ADVANCE, AT_ONCE, CLOSE, FREE, RELEASE_DYING, SWEPT
from indexer.redis.store import Command, Store
from indexer.redis.writer import Writer

_SWEEP_BYTES = 64 * 1024
"""Bytes of logs that are read at a time, over all parts."""

_SWEEP_LOCK_MS = 10_000

_ORPHAN_S = 600.0
"""How long a slot number may be in nobody's record; between taking and publishing one lies a round trip or two."""

_NEVER = b"never"
"""Stands for the place in a log that cannot be read: nobody knows its blocks, so the number stays out of use."""


class _Dying(NamedTuple):
    """A slot that is to be swept in one part."""

    part: Part
    number: int
    once: bytes
    """Stands for this time that it is."""
    place: int
    """How far it is, in its log."""

    @property
    def mark(self) -> bytes:
        """What the part says of it. If it says something else when a step is done, somebody else went on, or the number
        was swept and is in use again.
        """
        return b"%b:%d" % (self.once, self.place)

    @property
    def log(self) -> bytes:
        """Where its blocks stand."""
        return self.part.log(self.number)


class Sweeper:
    """One builder's part in it: whoever has the lock of a model sweeps that, in portions, and any other may go on.

    The lock only spares work. What keeps one that stands still and wakes up late from harm is that each step names what
    it goes on from: a retirement at home, a guard when a part is closed, a mark in the part.
    """

    def __init__(self, store: Store, layout: Layout, writer: Writer) -> None:
        self._store = store
        self._layout = layout
        self._builder = writer.builder
        self._script = writer.script
        self._log = structlog.get_logger("indexer")
        self._orphans: dict[tuple[bytes, int], float] = {}
        """Slot numbers that no source has, and since when."""

    def sweep(self, budget: int) -> tuple[int, int]:
        """Take the blocks of slots that nobody sees any more out of Redis; give how many portions and slots are done.

        A portion is 64 KiB of a ledger's log, some thousand blocks. One builder sweeps a model at a time; who comes
        after one that was killed goes on where it was. Raises `IndexUnavailable`.
        """
        done = swept = 0
        (listed,) = self._store.run([("HGETALL", self._layout.models)])
        for names in map(self._layout.tagged, pairs_of(listed)):
            for number, retirement in self._to_sweep(names).items():
                if done >= budget or not self._may_sweep(names):
                    return done, swept
                dying = self._close(names, number, retirement)
                while dying and done < budget:
                    dying = self._sweep_some(dying)
                    done += 1
                if not dying and not any(self._store.run([("HGET", part.dying, number) for part in names.parts])):
                    free: Command = ("EVAL", self._script(FREE), 2, names.retired, names.numbers, retirement, number)
                    swept += self._store.run([free])[0]
        return done, swept

    def _may_sweep(self, names: Names) -> bool:
        take: Command = ("SET", names.sweeper, self._builder, "NX", "PX", _SWEEP_LOCK_MS)
        taken, owner = self._store.run([take, ("GET", names.sweeper)], full=True)
        # where Redis is full it takes no lock, and all the more has to be swept
        return bool(taken) or owner == self._builder

    def _close(self, names: Names, number: int, retirement: bytes) -> list[_Dying]:
        """Let nobody write a retired slot any more; give the parts in which it is to be swept."""
        guards = self._store.run([("GET", part.guard(number)) for part in names.parts])
        # later than the guards were read: if it is retired still, they are not those of somebody who came after
        (now,) = self._store.run([("HGET", names.retired, number)])
        if now != retirement:
            return []
        self._store.run(
            [
                (
                    "EVAL",
                    self._script(CLOSE),
                    2,
                    part.guard(number),
                    part.dying,
                    guard,
                    number,
                    secrets.token_hex(8) + ":0",
                )
                for part, guard in zip(names.parts, guards, strict=True)
                if guard
            ]
        )
        marks = self._store.run([("HGET", part.dying, number) for part in names.parts])
        found = [(part, *mark.split(b":")) for part, mark in zip(names.parts, marks, strict=True) if mark]
        return [_Dying(part, number, once, int(place)) for part, once, place in found if place != _NEVER]

    def _sweep_some(self, dying: list[_Dying]) -> list[_Dying]:
        """Sweep a slot a little further, in all parts where it is to be swept; give those where it still is."""
        size = max(_SWEEP_BYTES // len(dying), 1)
        portions = self._store.run([("GETRANGE", one.log, one.place, one.place + size - 1) for one in dying])
        commands: list[Command] = []
        left = []
        for one, portion in zip(dying, portions, strict=True):
            replayed = self._read(one, portion, size)
            part, log, number, mark = one.part, one.log, one.number, one.mark
            for at in range(0, len(replayed.mentioned), AT_ONCE):
                keys = [part.dying, *part.blocks(replayed.mentioned[at : at + AT_ONCE])]
                commands.append(("EVAL", self._script(RELEASE_DYING), len(keys), *keys, mark, number, bit_of(number)))
            after = one._replace(place=one.place + replayed.read)
            if replayed.broken:
                self._log.warning("redis_log_unreadable", key=log.decode(errors="replace"))
                commands.append(("EVAL", self._script(ADVANCE), 1, part.dying, mark, number, one.once + b":" + _NEVER))
            elif len(portion) < size and replayed.read == len(portion):  # the end: nobody writes it any more
                commands.append(("EVAL", self._script(SWEPT), 2, part.dying, log, mark, number))
            else:
                commands.append(("EVAL", self._script(ADVANCE), 1, part.dying, mark, number, after.mark))
                left.append(after)
        # where it took us so long that somebody else goes on, that is theirs
        return left if all(self._store.run(commands)) else []

    def _read(self, dying: _Dying, portion: bytes, size: int) -> Replayed:
        """Read the entries of a portion of a log, at least one where there is one."""
        while True:
            replayed = Replayed()
            replayed.feed(portion)
            if replayed.read or replayed.broken:
                return replayed
            if len(portion) < size:
                replayed.broken = bool(portion)
                return replayed
            size *= 4  # an entry that is longer than a portion
            (portion,) = self._store.run([("GETRANGE", dying.log, dying.place, dying.place + size - 1)])

    def _to_sweep(self, names: Names) -> dict[int, bytes]:
        """Give the slots that are to be swept, and what stands for that each is.

        Numbers that were given out to a builder that was killed before it said what for come to them in time.
        """
        used, listed, directory = self._store.run(
            [("GET", names.numbers), ("HGETALL", names.retired), ("HGETALL", names.directory)]
        )
        alive = {slot.number for record in decode_records(pairs_of(directory)) for slot in record.slots}
        retired = {int(number): retirement for number, retirement in pairs_of(listed).items()}
        bits = used or b""
        known = alive | retired.keys()
        lost = {number for number in range(8 * len(bits)) if bits[number // 8] >> (7 - number % 8) & 1} - known
        now, tag = time.monotonic(), names.tag
        self._orphans = {key: since for key, since in self._orphans.items() if key[0] != tag or key[1] in lost}
        for number in lost:
            if now - self._orphans.setdefault((tag, number), now) > _ORPHAN_S:
                retirement = secrets.token_hex(8).encode()
                if self._store.run([("HSETNX", names.retired, number, retirement)], full=True) == [1]:
                    retired[number] = retirement
        return retired
