"""From the holders of each block of a prompt to what each source holds of it.

Holders of a block are bits of an int, one bit per slot. Along a prompt they change rarely, so a look-up keeps only the
places where they do. Sources that hold a model's blocks in one slot need no more than "where did my bit first miss";
the others (several tiers, hybrid models, shared storage) are worked out from the places where the holders change.
"""

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from indexer.base import UNREACHABLE, Holding, Run, Source
from indexer.groups import GroupBlocks, GroupSpec, longest_prefix
from indexer.keys import BlockKey
from indexer.ledger import Slot
from indexer.prompt import Prompt


class Chunks(NamedTuple):
    """How many blocks are looked up at a time: first few, as most prompts leave what is cached early, then more."""

    first: int = 64
    growth: int = 2
    largest: int = 1024


LookUps: TypeAlias = Generator[list[BlockKey], Sequence[Any], list[Holding]]
"""Gives block keys, is sent the holders of each, and returns the answer."""


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


class Plan(NamedTuple):
    """What has to be looked up for some readers; worth keeping as long as they are the same."""

    readers: Sequence[Reader]
    chains: list[list[Chain]]
    masks: list[int]
    """For each reader the bit of its slot, where it has but one single-slot chain; else 0."""
    by_size: dict[int, Wanted]

    @classmethod
    def of(cls, readers: Sequence[Reader], size: int | None = None) -> "Plan":
        """Plan a question about some readers; `size` asks only for chains that have blocks of that size."""
        chains = [[chain for chain in reader.chains if size is None or size in chain.sizes] for reader in readers]
        by_size: dict[int, list[Chain]] = {}
        for mine in chains:
            for chain in mine:
                for number in chain.sizes:
                    by_size.setdefault(number, []).append(chain)
        masks = [mine[0].groups[0].mask if len(mine) == 1 and mine[0].single_slot else 0 for mine in chains]
        return cls(readers, chains, masks, {number: Wanted.of(some, number) for number, some in by_size.items()})

    def narrowed(self, pods: Collection[str] | None, size: int | None) -> "Plan":
        """Plan the same question about some pods, or some chains, only."""
        if pods is None and size is None:
            return self
        wanted = None if pods is None else frozenset(pods)
        return Plan.of([reader for reader in self.readers if wanted is None or reader.source.pod in wanted], size)


def answer(
    plan: Plan,
    prompt: Prompt,
    *,
    bare: bool,
    chunks: Chunks,
    holders_only: bool = False,
    read: Callable[[Any], int] | None = None,
) -> LookUps:
    """Say what each reader's source holds of a prompt; with `holders_only`, of those only that hold something.

    `bare` also looks under keys that name images without their place. `read` gives the holders where what is sent is no
    number yet; it is called only where that changes.
    """
    found = yield from _lookup(plan, prompt, chunks, read, bare=False)
    if bare and prompt.images:
        extra = yield from _lookup(plan, prompt, chunks, read, bare=True)
        found = [max(pair, key=lambda held: held[0]) for pair in zip(found, extra, strict=True)]
    pairs = zip(plan.readers, found, strict=True)
    if holders_only:
        holdings = [_holding(reader, held) for reader, held in pairs if held[0]]
        return [holding for holding in holdings if holding.tokens]
    return [_holding(reader, held) for reader, held in pairs]


_Found = tuple[int, int, tuple[Run, ...]]


def _holding(reader: Reader, found: "_Found") -> Holding:
    degraded = reader.degraded()
    tokens, reusable, runs = (0, 0, ()) if degraded.startswith(UNREACHABLE) else found
    return Holding(reader.source, tokens, reusable, runs, degraded)


_NOTHING: _Found = (0, 0, ())


def _lookup(
    plan: Plan, prompt: Prompt, chunks: Chunks, read: Callable[[Any], int] | None, *, bare: bool
) -> Generator[list[BlockKey], Sequence[Any], list[_Found]]:
    scans = {}
    for size, wanted in plan.by_size.items():
        scans[size] = yield from _scan(size, wanted, prompt, chunks, read, bare=bare)
    cap = max(0, prompt.length - 1)
    singles: dict[tuple[int, int, str], _Found] = {}
    absent = 0
    for scan in scans.values():
        absent |= scan.absent
    found = []
    for mine, mask in zip(plan.chains, plan.masks, strict=True):
        if mask & absent:
            found.append(_NOTHING)
            continue
        if mask:
            found.append(_of_single(mine[0].groups[0], scans, cap, singles))
            continue
        parts = [_evaluate(chain, scans, cap, singles) for chain in mine]
        parts = [part for part in parts if part[0]]
        if not parts:
            found.append(_NOTHING)
        elif len(parts) == 1:
            found.append(parts[0])
        else:
            runs = _merged([part[2] for part in parts])
            found.append((max(p[0] for p in parts), max(p[1] for p in parts), runs))
    return found


def _of_single(group: Group, scans: dict[int, Scan], cap: int, known: dict[tuple[int, int, str], _Found]) -> _Found:
    size = group.spec.block_size
    scan = scans[size]
    blocks = 0 if scan.absent & group.mask else scan.ends.get(group.mask, scan.scanned)
    if not blocks:
        return _NOTHING
    medium = group.slots[0].medium
    found = known.get((blocks, size, medium))
    if found is None:  # most sources of an answer share theirs
        run = Run(blocks * size, (medium,))
        found = known[blocks, size, medium] = run.tokens, min(blocks, cap // size) * size, (run,)
    return found


def _scan(
    size: int,
    wanted: Wanted,
    prompt: Prompt,
    chunks: Chunks,
    read: Callable[[Any], int] | None,
    *,
    bare: bool,
) -> Generator[list[BlockKey], Sequence[Any], Scan]:
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
                return Scan(absent, ends, changes, number + 1)
        done = upto
        chunk = min(chunks.growth * chunk, chunks.largest)
    return Scan(absent, ends, changes, total)


def _evaluate(chain: Chain, scans: dict[int, Scan], cap: int, singles: dict[tuple[int, int, str], _Found]) -> _Found:
    if chain.single_slot:
        return _of_single(chain.groups[0], scans, cap, singles)
    groups = [_blocks_of(group, scans[group.spec.block_size]) for group in chain.groups]
    limit = max(scans[group.spec.block_size].scanned * group.spec.block_size for group in chain.groups)
    tokens = longest_prefix(groups, limit)
    if not tokens:
        return _NOTHING
    shown = min(chain.groups, key=lambda group: group.spec.tail is not None)
    runs = _runs_of(shown, scans[shown.spec.block_size], tokens)
    return tokens, longest_prefix(groups, min(tokens, cap)), runs


def _blocks_of(group: Group, scan: Scan) -> GroupBlocks:
    spans: list[tuple[int, int]] = []
    start = None
    for number, holders in scan.changes:
        if holders & group.mask:
            start = number if start is None else start
        elif start is not None:
            spans.append((start, number))
            start = None
    if start is not None:
        spans.append((start, scan.scanned))
    return GroupBlocks(group.spec, spans)


def _runs_of(group: Group, scan: Scan, tokens: int) -> tuple[Run, ...]:
    """Say where the first `tokens` lie. Blocks that a window does not need lie where the next one does."""
    size = group.spec.block_size
    runs: list[Run] = []
    covered = 0
    ends = [number for number, _ in scan.changes[1:]] + [scan.scanned]
    for (_, holders), end in zip(scan.changes, ends, strict=True):
        media = tuple(sorted({slot.medium for slot in group.slots if slot.bit & holders}))
        upto = min(end * size, tokens)
        if not media or upto <= covered:
            continue
        if runs and runs[-1].media == media:
            runs[-1] = Run(runs[-1].tokens + upto - covered, media)
        else:
            runs.append(Run(upto - covered, media))
        covered = upto
    return tuple(runs)


def _merged(parts: list[tuple[Run, ...]]) -> tuple[Run, ...]:
    """Lay several descriptions of one prefix over each other."""
    edges = set()
    for runs in parts:
        place = 0
        for run in runs:
            place += run.tokens
            edges.add(place)
    merged: list[Run] = []
    start = 0
    for end in sorted(edges):
        media: set[str] = set()
        for runs in parts:
            place = 0
            for run in runs:
                if place <= start < place + run.tokens:
                    media.update(run.media)
                place += run.tokens
        merged.append(Run(end - start, tuple(sorted(media))))
        start = end
    return tuple(merged)
