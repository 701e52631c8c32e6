"""From the slots of a model's sources to the chains that each of them reads.

Slots of one block size that a source reads together are a chain; cache groups that only serve a prefix together are one
too. Blocks of several sizes lie side by side: each size is a chain of its own, and the match combines them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from indexer.base import Source
from indexer.groups import GroupSpec
from indexer.ledger import Slot


class Group(NamedTuple):
    """What serves one cache group of one source."""

    spec: GroupSpec
    slots: tuple[Slot, ...]
    mask: int
    """The bits of the slots."""


class Chain(NamedTuple):
    """Groups that a source reads together: a prefix must be served by all of them."""

    groups: tuple[Group, ...]
    single_slot: bool
    """One slot that must hold every block from the start: the common and fast case."""
    sizes: frozenset[int]
    """The block sizes of the groups."""

    @classmethod
    def of(cls, *groups: Group) -> "Chain":
        """Put groups together."""
        single = len(groups) == 1 and groups[0].spec.tail is None and len(groups[0].slots) == 1
        return cls(groups, single, frozenset(group.spec.block_size for group in groups))


class Reader(NamedTuple):
    """A source and all its chains. `degraded` is asked when an answer is made."""

    source: Source
    chains: tuple[Chain, ...]
    degraded: Callable[[], str]


class Cache(NamedTuple):
    """A source as a reader needs it. `degraded` is asked when an answer is made."""

    source: Source
    slots: Sequence[Slot]
    groups: dict[int, GroupSpec]
    fleet_wide: bool
    degraded: Callable[[], str]


def readers_of(caches: Sequence[Cache], block_sizes: int) -> list[Reader]:
    """Say how the sources of one model are read, by no more block sizes than that many."""
    shared = [slot for cache in caches if cache.fleet_wide for slot in cache.slots]
    # by sources, not by blocks: their number depends on the layout alone, and no source has more than its one vote
    votes = Counter(size for cache in caches for size in {slot.block_size for slot in cache.slots})
    first = Counter(
        size for cache in caches for size in {slot.block_size for slot in cache.slots if slot.tier == "gpu"}
    )
    # a prompt's last chunk is smaller than a whole one, and of any size (WIRE B1a): those must not push out the others
    sizes = set(sorted(votes, key=lambda size: (-first[size], -votes[size], -size))[:block_sizes])
    return [
        Reader(
            cache.source,
            chains_of([slot for slot in [*cache.slots, *shared] if slot.block_size in sizes], cache.groups),
            cache.degraded,
        )
        for cache in caches
        if not cache.fleet_wide
    ]


def usual_block_size(caches: Sequence[Cache]) -> int | None:
    """Give the block size that most of these sources use on their first tier, None where there is none."""
    sizes: Counter[int] = Counter()
    for cache in caches:
        size = next((spec.block_size for spec in cache.groups.values() if spec.tail is None), 0)
        size = size or next((slot.block_size for slot in cache.slots if slot.tier == "gpu"), 0)
        size = size or next((slot.block_size for slot in cache.slots), 0)
        sizes[size] += bool(size)
    return min(sizes, key=lambda size: (-sizes[size], size)) if sizes.total() else None


def chains_of(slots: Iterable[Slot], groups: dict[int, GroupSpec]) -> tuple[Chain, ...]:
    """Say how a source reads its slots, given the cache groups that it announced."""
    slots = list(slots)
    chains = []
    if len(groups) > 1:
        # publishers that name no group (offloading) hold blocks of the group that sees the whole prompt
        first = min(groups, key=lambda number: (groups[number].tail is not None, number))
        chain = []
        for number, spec in groups.items():
            mine = [
                slot
                for slot in slots
                if slot.block_size == spec.block_size
                and (slot.group == number or (slot.group is None and number == first))
            ]
            chain.append(_group(spec, mine))
        chains.append(Chain.of(*chain))
        sizes = {spec.block_size for spec in groups.values()}
        slots = [slot for slot in slots if slot.group is None and slot.tier != "gpu" and slot.block_size not in sizes]
        groups = {}
    for size in sorted({slot.block_size for slot in slots}):
        spec = next((spec for spec in groups.values() if spec.block_size == size), GroupSpec(size, None))
        chains.append(Chain.of(_group(spec, [slot for slot in slots if slot.block_size == size])))
    return tuple(chains)


def _group(spec: GroupSpec, slots: list[Slot]) -> Group:
    mask = 0
    for slot in slots:
        mask |= slot.bit
    return Group(spec, tuple(slots), mask)
