"""The holders along a prompt's blocks of one size: what is wanted of them, and what is found.

Holders of a block are bits of an int, one bit per slot. Along a prompt they change rarely, so a scan keeps only the
places where they do, and ends where nothing that is wanted can be held any further.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from indexer.chains import Chain
from indexer.keys import BlockKey
from indexer.prompt import Prompt


class Chunks(NamedTuple):
    """How many blocks are looked up at a time: first few, as most prompts leave what is cached early, then more."""

    first: int = 64
    growth: int = 2
    largest: int = 1024


class Wanted(NamedTuple):
    """What is looked for among the blocks of one size."""

    singles: int
    """The bits of all single-slot chains."""
    needed: tuple[int, ...]
    """For each other chain the bits of a group that must hold every block from the start."""
    relevant: int
    """The bits of all groups of other chains."""
    to_the_end: bool
    """A chain has no such group: all blocks have to be looked at."""

    @classmethod
    def of(cls, chains: Sequence[Chain], size: int) -> "Wanted":
        """Say what some chains look for among the blocks of a size."""
        singles = relevant = 0
        needed: list[int] = []
        to_the_end = False
        for chain in chains:
            if chain.single_slot:
                singles |= chain.groups[0].mask
                continue
            here = [group for group in chain.groups if group.spec.block_size == size]
            for group in here:
                relevant |= group.mask
            whole = [group.mask for group in here if group.spec.tail is None]
            needed += whole[:1]
            to_the_end = to_the_end or not whole
        return cls(singles, tuple(needed), relevant, to_the_end)


class Scan(NamedTuple):
    """The holders along a prompt's blocks of one size."""

    absent: int
    """The bits of single-slot chains that do not hold even the first block."""
    ends: dict[int, int]
    """For any other bit of one: how many leading blocks it holds, where that is fewer than `scanned`."""
    changes: list[tuple[int, int]]
    """(first block, holders) for each stretch of blocks with the same holders."""
    scanned: int
    """How many blocks were looked at; no chain that was asked for holds all of these and more."""

    @classmethod
    def of(
        cls,
        size: int,
        wanted: Wanted,
        prompt: Prompt,
        chunks: Chunks,
        read: Callable[[Any], int] | None,
        *,
        bare: bool,
    ) -> Generator[list[BlockKey], Sequence[Any], "Scan"]:
        """Give block keys, be sent the holders of each, and say what was found; `read` as in `answer`."""
        alive, needed, relevant, to_the_end = wanted
        absent = 0
        total = prompt.length // size
        ends: dict[int, int] = {}
        changes: list[tuple[int, int]] = []
        before: Any = -1
        before_relevant = -1
        done, chunk = 0, chunks.first
        while done < total:
            upto = min(total, done + chunk)
            keys = prompt.keys(size, upto, bare=bare)
            for number, value in enumerate((yield keys[done:upto]), done):
                if value == before:
                    continue
                before = value
                holders: int = value if read is None else read(value)
                lost = alive & ~holders
                if lost:
                    alive ^= lost
                    if not number:
                        absent, lost = lost, 0
                    while lost:
                        bit = lost & -lost
                        ends[bit] = number
                        lost ^= bit
                now = holders & relevant
                if now != before_relevant:
                    before_relevant = now
                    changes.append((number, now))
                    if needed:
                        needed = tuple(mask for mask in needed if now & mask)
                if not alive and not needed and not to_the_end:
                    return cls(absent, ends, changes, number + 1)
            done = upto
            chunk = min(chunks.growth * chunk, chunks.largest)
        return cls(absent, ends, changes, total)
