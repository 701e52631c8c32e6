"""What is a builder's own in Redis: how it claims sources and slot numbers, and finds out what it lost, to others or to
a fault.
"""

from collections.abc import Collection, Iterable, Sequence

import structlog

from indexer.errors import IndexUnavailable
from indexer.redis.builder import Builder
from indexer.redis.layout import MAX_SLOTS, Names
from indexer.redis.scripts import CLAIM, SWAP, TAKE_SLOT
from indexer.redis.store import Command
from indexer.redis.writer import Write, Written
from indexer.tracking import Tracked

_TRIED = 8
"""Slot numbers of which something may be left somewhere before none is taken for now."""


class Ownership:
    """The sources and the slot numbers of one builder, as Redis knows whose they are. One thread at a time."""

    def __init__(self, builder: Builder) -> None:
        self._store, self._layout, self._writer, self._standing = builder
        self._used: dict[Names, set[int]] = {}
        """Slot numbers that were ever ours, for each model."""
        self._unmarked: set[Names] = set()
        """Models of which Redis may not know any more that some of these were in use."""
        self._log = structlog.get_logger("indexer")

    def claim(self, tracked: Tracked, *, by_force: bool) -> bool:
        """Make a source this builder's own; from then on what others still say of it is refused.

        Says no where it is another's, unless that may be gone. Raises `IndexUnavailable`.
        """
        owner = self._layout.of(tracked.model).owner(tracked.source)
        (before,) = self._store.run([("GET", owner)])
        if before is not None and not by_force and not self._writer.is_mine(before):
            return False
        swap = self._writer.script(SWAP)
        (done,) = self._store.run([("EVAL", swap, 1, owner, self._writer.me, before or b"")], again=False)
        if not done:
            raise IndexUnavailable(f"{self._store.shown}: two builders claim source {tracked.source} at once")
        return True

    def take_number(self, names: Names) -> int:
        """Take the lowest slot number that is free everywhere; -1 where there is none. Raises `IndexUnavailable`."""
        for _ in range(_TRIED):
            (number,) = self._store.run([("EVAL", TAKE_SLOT, 1, names.numbers, MAX_SLOTS)], again=False)
            if number < 0:
                return -1
            self.note_numbers(names, [number])
            me = self._writer.me
            claims: list[Command] = [
                ("EVAL", CLAIM, 3, part.guard(number), part.dying, part.log(number), me, number) for part in names.parts
            ]
            if all(self._store.run(claims, again=False)):
                return int(number)
            # somewhere something is left of it, from before Redis lost that it was in use: the sweep will find it
        raise IndexUnavailable(f"{self._store.shown}: what is left in {_TRIED} slots has to be swept first")

    def note_numbers(self, names: Names, numbers: Iterable[int]) -> None:
        """Note slot numbers that are ours, also those that another builder took before."""
        self._used.setdefault(names, set()).update(numbers)

    def mark_numbers(self) -> None:
        """Say again which numbers are in use, where Redis may have lost that. Raises `IndexUnavailable`."""
        for names in list(self._unmarked):
            # what is left of them in other parts is found by the sweep, as of all numbers that nobody came to use
            self._store.run([("SETBIT", names.numbers, number, 1) for number in self._used.get(names, ())])
            self._unmarked.discard(names)

    def begin_epoch(self) -> None:
        """Take what is ours over to a new epoch: nothing that was written in the one before can arrive any more.

        Raises `IndexUnavailable`.
        """
        guards: list[tuple[Tracked, Sequence[bytes]]] = []
        for tracked in [*self._standing.followed, *self._standing.gone.values()]:
            if self._standing.is_unwritten(tracked):
                continue
            names = self._layout.of(tracked.model)
            guards.append((tracked, [names.owner(tracked.source)]))
            if self._standing.is_followed(tracked):
                numbers = self._standing.numbers(tracked)
                if numbers:
                    guards += [(tracked, [part.guard(number) for number in numbers]) for part in names.parts]
        self._look_who_follows(self._writer.renew(guards))

    def judge(self, written: Written) -> None:
        """Find out what it means that some writes were not done. Raises `IndexUnavailable`."""
        if written.lost:
            self.start_over(written.lost)
        for write in written.unheld:
            if self._is_current(write):
                self._standing.call_stale(write.tracked)
        self._look_who_follows(
            list({write.tracked.source: write.tracked for write in written.refused if self._is_current(write)}.values())
        )

    def start_over(self, tags: Collection[bytes]) -> None:
        """Redis is not what it was when we wrote some models last: it began empty, or an older copy took over."""
        self._log.warning("redis_lost_writes", index=self._store.shown, models=len(tags))
        self._writer.drop(tags)
        self.call_all_stale(tags)
        self._unmarked.update(map(self._layout.tagged, tags))

    def call_all_stale(self, tags: Collection[bytes] | None = None) -> None:
        """Have all sources that are ours written anew, or all of some models."""
        for tracked in self._standing.followed:
            if tracked.source not in self._standing.lost and (
                tags is None or self._layout.of(tracked.model).tag in tags
            ):
                self._standing.call_stale(tracked)

    def _is_current(self, write: Write) -> bool:
        """Whether a write is about what its source has now: slots that it gave up may be swept already."""
        if self._standing.is_unwritten(write.tracked):
            return False
        names = self._layout.of(write.tracked.model)
        guards = [write.part.guard(number) for number in self._standing.numbers(write.tracked)]
        return write.guard in (names.owner(write.tracked.source), *guards)

    def _look_who_follows(self, refused: Sequence[Tracked]) -> None:
        """Find out why Redis refused what we said of some sources: others follow them now, or it lost something."""
        if not refused:
            return
        owners = self._store.run([("GET", self._layout.of(tracked.model).owner(tracked.source)) for tracked in refused])
        for tracked, owner in zip(refused, owners, strict=True):
            if not self._standing.is_followed(tracked):
                continue
            if owner is None:
                self.start_over({self._layout.of(tracked.model).tag})
            elif self._writer.is_mine(owner):
                self._standing.call_stale(tracked)
            else:
                self._log.warning("source_taken_over", pod=tracked.source.pod, rank=tracked.source.rank)
                self._standing.lost.add(tracked.source)
