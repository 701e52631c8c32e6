"""Slot numbers: how a builder takes free ones, and says again which it took where Redis lost that."""

from collections.abc import Iterable

from indexer.errors import IndexUnavailable
from indexer.redis.layout import MAX_SLOTS, Names
from indexer.redis.scripts import CLAIM, TAKE_SLOT
from indexer.redis.store import Command, Store
from indexer.redis.writer import Writer

_TRIED = 8
"""Slot numbers of which something may be left somewhere before none is taken for now."""


class Numbers:
    """The slot numbers of one builder, for each model. One thread at a time."""

    def __init__(self, store: Store, writer: Writer) -> None:
        self._store = store
        self._writer = writer
        self._used: dict[Names, set[int]] = {}
        """Slot numbers that were ever ours."""
        self._unmarked: set[Names] = set()
        """Models of which Redis may not know any more that some of these were in use."""

    def take(self, names: Names) -> int:
        """Take the lowest slot number that is free everywhere; -1 where there is none. Raises `IndexUnavailable`."""
        for _ in range(_TRIED):
            (number,) = self._store.run([("EVAL", TAKE_SLOT, 1, names.numbers, MAX_SLOTS)], again=False)
            if number < 0:
                return -1
            self.note(names, [number])
            me = self._writer.me
            claims: list[Command] = [
                ("EVAL", CLAIM, 3, part.guard(number), part.dying, part.log(number), me, number) for part in names.parts
            ]
            if all(self._store.run(claims, again=False)):
                return int(number)
            # somewhere something is left of it, from before Redis lost that it was in use: the sweep will find it
        raise IndexUnavailable(f"{self._store.shown}: what is left in {_TRIED} slots has to be swept first")

    def note(self, names: Names, numbers: Iterable[int]) -> None:
        """Note slot numbers that are ours, also those that another builder took before."""
        self._used.setdefault(names, set()).update(numbers)

    def doubt(self, names: Names) -> None:
        """Hear that Redis may have lost which numbers of a model are in use."""
        self._unmarked.add(names)

    def mark(self) -> None:
        """Say again which numbers are in use, where Redis may have lost that. Raises `IndexUnavailable`."""
        for names in list(self._unmarked):
            # what is left of them in other parts is found by the sweep, as of all numbers that nobody came to use
            self._store.run([("SETBIT", names.numbers, number, 1) for number in self._used.get(names, ())])
            self._unmarked.discard(names)
