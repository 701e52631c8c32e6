"""Taking the blocks of slots that nobody sees any more out of Redis, in the background."""

import time

import structlog

from indexer.redis_layout import ADVANCE, AT_ONCE, RELEASE, SWEPT, Layout, Replayed, bit_of, decode_records
from indexer.redis_reader import pairs_of
from indexer.redis_store import Command, RedisStore

_NEVER = -1
"""How far a slot is swept whose log cannot be read: nobody knows its blocks, so its number stays out of use."""

_SWEEP_BYTES = 64 * 1024
_SWEEP_LOCK_MS = 10_000

_ORPHAN_S = 600.0
"""How long a slot number may be in nobody's record; between taking and publishing one lies a round trip or two."""


class Sweeper:
    """One builder's part in it: whoever has the lock of a model sweeps that, in portions, and any other may go on."""

    def __init__(self, store: RedisStore, layout: Layout, builder: bytes) -> None:
        self._store = store
        self._layout = layout
        self._builder = builder
        self._log = structlog.get_logger("indexer")
        self._swept = 0
        self._orphans: dict[tuple[bytes, int], float] = {}
        """Slot numbers that no source has, and since when."""

    def sweep(self, budget: int) -> tuple[int, int]:
        """Take the blocks of slots that nobody sees any more out of Redis; give how many portions and slots are done.

        A portion is 64 KiB of a ledger's log, some thousand blocks. One builder sweeps a model at a time; who comes
        after one that was killed goes on where it was. Raises `IndexUnavailable`.
        """
        done, before = 0, self._swept
        (listed,) = self._store.run([("HGETALL", self._layout.models)])
        for tag in pairs_of(listed):
            for number, cursor in self._to_sweep(tag).items():
                if done >= budget or not self._may_sweep(tag):
                    return done, self._swept - before
                place: int | None = cursor
                while place is not None and done < budget:
                    place = self._sweep_some(tag, number, place)
                    done += 1
        return done, self._swept - before

    def _may_sweep(self, tag: bytes) -> bool:
        lock = self._layout.sweeper(tag)
        taken, owner = self._store.run(
            [
                ("SET", lock, self._builder, "NX", "PX", _SWEEP_LOCK_MS),
                ("GET", lock),
            ]
        )
        return bool(taken) or owner == self._builder

    def _sweep_some(self, tag: bytes, number: int, cursor: int) -> int | None:
        """Sweep one portion; give the place where the next begins, None when there is none."""
        log, retired = self._layout.log(tag, number), self._layout.retired(tag)
        size = _SWEEP_BYTES
        while True:
            (portion,) = self._store.run([("GETRANGE", log, cursor, cursor + size - 1)])
            replayed = Replayed()
            replayed.feed(portion)
            if replayed.read or replayed.broken or len(portion) < size:
                break
            size *= 4  # an entry that is longer than a portion
        sweeper, numbers = self._layout.sweeper(tag), self._layout.numbers(tag)
        if not portion:
            (swept,) = self._store.run([("EVAL", SWEPT, 4, sweeper, retired, log, numbers, self._builder, number)])
            self._swept += swept
            return None
        if not replayed.read:
            self._log.warning("redis_log_unreadable", key=log.decode(errors="replace"))
            self._store.run([("EVAL", ADVANCE, 2, sweeper, retired, self._builder, number, _NEVER)])
            return None
        commands: list[Command] = []
        for at in range(0, len(replayed.mentioned), AT_ONCE):
            names = self._layout.blocks(replayed.mentioned[at : at + AT_ONCE])
            commands.append(("EVAL", RELEASE, len(names) + 1, sweeper, *names, self._builder, bit_of(number)))
        place = cursor + replayed.read
        commands.append(("EVAL", ADVANCE, 2, sweeper, retired, self._builder, number, place))
        # where it took us so long that somebody else sweeps now, that is theirs to go on with
        return None if 0 in self._store.run(commands) else place

    def _to_sweep(self, tag: bytes) -> dict[int, int]:
        """Give the slots that are to be swept, and how far each is.

        Numbers that were given out to a builder that was killed before it said what for come to them in time.
        """
        used, listed, directory = self._store.run(
            [
                ("GET", self._layout.numbers(tag)),
                ("HGETALL", self._layout.retired(tag)),
                ("HGETALL", self._layout.directory(tag)),
            ]
        )
        alive = {slot.number for record in decode_records(pairs_of(directory)) for slot in record.slots}
        retired = {int(number): int(cursor) for number, cursor in pairs_of(listed).items()}
        # retired a second time, by a write that was tried again, when they were swept and in use again
        again = alive & retired.keys()
        self._store.run([("HDEL", self._layout.retired(tag), number) for number in again])
        known = alive | retired.keys()
        bits = used or b""
        lost = {number for number in range(8 * len(bits)) if bits[number // 8] >> (7 - number % 8) & 1} - known
        now = time.monotonic()
        self._orphans = {key: since for key, since in self._orphans.items() if key[0] != tag or key[1] in lost}
        for number in lost:
            if now - self._orphans.setdefault((tag, number), now) > _ORPHAN_S:
                self._store.run([("HSETNX", self._layout.retired(tag), number, 0)])
                retired[number] = 0
        return {number: at for number, at in retired.items() if at != _NEVER and number not in again}
