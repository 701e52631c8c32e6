"""From the holders of each block of a prompt to what each source holds of it.

Sources that hold a model's blocks in one slot need no more than "where did my bit first miss"; the others (several
tiers, hybrid models, shared storage) are worked out from the places where the holders change.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, NamedTuple, TypeAlias

from indexer.base import UNREACHABLE, Holding, Run
from indexer.chains import Chain, Group, Reader
from indexer.groups import GroupBlocks, longest_prefix
from indexer.keys import BlockKey
from indexer.prompt import Prompt
from indexer.scan import Chunks, Scan, Wanted

LookUps: TypeAlias = Generator[list[BlockKey], Sequence[Any], list[Holding]]
"""Gives block keys, is sent the holders of each, and returns the answer."""


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
        scans[size] = yield from Scan.of(size, wanted, prompt, chunks, read, bare=bare)
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
