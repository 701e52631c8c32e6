"""The index in this process, in plain Python: the readable specification of what every index does."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import cast

from indexer.base import Copies, Holding, Limits, Source, SourceStatus
from indexer.errors import InvalidQuestion, LimitReached
from indexer.events import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, Event, Events
from indexer.keys import BlockKey
from indexer.ledger import Change, Known, Ledger, Slot
from indexer.matching import Chunks, LookUps, Reader, answer, chains_of
from indexer.prompt import Prompt

_SWEEP = 4096
"""Blocks reclaimed at a time: a writer of another source waits no longer for the lock than that takes."""

_COUNTERS = (
    "stored",
    "removed",
    "cleared",
    "restarts",
    "copies",
    "hash_conflicts",
    "parked",
    "unplaced",
    "partial_blocks",
    "removed_unknown",
    "expired",
    "evicted",
    "too_many_slots",
)


class _Tracked:
    """One source that is followed."""

    def __init__(self, source: Source, model: str, copies: Copies, *, fleet_wide: bool) -> None:
        self.source = source
        self.model = model
        self.copies: Copies = copies
        self.fleet_wide = fleet_wide
        self.incarnation = 0
        self.reason = ""
        self.since = 0.0
        self.ledger: Ledger

    def degraded(self) -> str:
        return self.reason or self.ledger.degraded


class MemoryIndex:
    """An `Index` in this process.

    The table maps a block key to the set of slots that hold the block, as bits of an int. Writers take one lock for
    each event. Readers take none: reading a key's set is one step under the interpreter lock, and the slots a question
    is asked of are fixed in an immutable view. A slot's bit is used anew only after its last block is reclaimed; an
    answer that was worked out meanwhile is worked out again.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._lock = threading.RLock()
        self._table: dict[BlockKey, int] = {}
        self._tracked: dict[Source, _Tracked] = {}
        self._views: dict[str, list[Reader]] = {}
        self._bare_models: set[str] = set()
        self._bits = 0
        self._free_bits: list[int] = []
        self._reused = 0
        self._counters: Counter[str] = Counter({f"{name}_total": 0 for name in _COUNTERS})

    def __repr__(self) -> str:
        return f"MemoryIndex(python, {len(self._table)} blocks, {len(self._tracked)} sources)"

    def register(
        self, source: Source, *, model: str, copies: Copies = "count", fleet_wide: bool = False, degraded: str = ""
    ) -> None:
        """Begin to follow a source, see `Index.register`."""
        with self._lock:
            if source in self._tracked:
                return
            if len(self._tracked) >= self._limits.max_sources:
                raise LimitReached(
                    f"source {source}: {len(self._tracked)} sources are followed already; raise Limits.max_sources"
                )
            tracked = _Tracked(source, model, copies, fleet_wide=fleet_wide)
            self._begin(tracked)
            self._tracked[source] = tracked
            self._views = {}
        if degraded:
            self.degrade(source, degraded)

    @property
    def decoder(self) -> None:
        """None: events come as `indexer.events` has them."""

    def apply(self, source: Source, events: Events) -> None:
        """Apply events in order, see `Index.apply`."""
        tracked = self._require(source)
        for event in cast("Sequence[Event]", events):
            if isinstance(event, AllBlocksCleared):
                self._counters["cleared_total"] += 1
                self._renew(tracked, keep_groups=True)
                continue
            with self._lock:
                self._require(source)  # it may have been forgotten meanwhile
                self._apply_one(tracked, event)
        if self._limits.max_bytes is not None:
            self._keep_bound(self._limits.max_bytes)

    def apply_all(self, source: Source, batches: Sequence[Events]) -> None:
        """Apply batch after batch, see `Index.apply_all`."""
        self._require(source)
        for events in batches:
            self.apply(source, events)

    def _apply_one(self, tracked: _Tracked, event: BlockStored | BlockRemoved) -> None:
        if isinstance(event, BlockRemoved):
            self._counters["removed_total"] += len(event.block_hashes)
            self._change(tracked.ledger.remove(event))
            return
        self._counters["stored_total"] += len(event.block_hashes)
        if event.bare_images:
            self._bare_models.add(tracked.model)
        self._change(tracked.ledger.store(event))
        for other in self._waiting_for(tracked):
            self._change(other.ledger.learn(tracked.ledger.find, event.block_hashes))

    def _change(self, changes: list[Change]) -> None:
        table = self._table
        for slot, _, keys, held in changes:
            bit = slot.bit
            if held:
                for key in keys:
                    holders = table.get(key, 0)
                    if holders & bit:
                        slot.aliases[key] = slot.aliases.get(key, 0) + 1
                    else:
                        table[key] = holders | bit
            elif slot.aliases:
                self._let_go([key for key in keys if not _unalias(slot, key)], bit)
            else:
                self._let_go(keys, bit)

    def _let_go(self, keys: list[BlockKey], bit: int) -> None:
        table = self._table
        for key in keys:
            holders = table.get(key, 0) & ~bit
            if holders:
                table[key] = holders
            else:
                table.pop(key, None)

    def _waiting_for(self, tracked: _Tracked) -> list[_Tracked]:
        """Give the shared caches of the same model that wait for somebody to say a block's tokens."""
        return [
            other
            for other in self._fleet_wide(tracked.model)
            if other is not tracked and other.ledger.waiting.has_unplaced
        ]

    def _fleet_wide(self, model: str) -> list[_Tracked]:
        return [other for other in self._tracked.values() if other.fleet_wide and other.model == model]

    def restart(self, source: Source) -> None:
        """Forget what a source holds, see `Index.restart`."""
        tracked = self._require(source)
        self._counters["restarts_total"] += 1
        self._renew(tracked, keep_groups=False)

    def degrade(self, source: Source, reason: str) -> None:
        """Say why answers about a source may be wrong, see `Index.degrade`."""
        tracked = self._require(source)
        if tracked.reason != reason:
            tracked.since = time.time() if reason else 0.0
            tracked.reason = reason

    def expire(self) -> None:
        """Drop blocks that outlived their time, see `Index.expire`."""
        before = time.monotonic() - self._limits.silent_tier_ttl_s
        for tracked in list(self._tracked.values()):
            with self._lock:
                self._change(tracked.ledger.expire(before))

    def forget(self, pod: str) -> None:
        """Stop following a pod, see `Index.forget`."""
        with self._lock:
            gone = [self._tracked.pop(source) for source in list(self._tracked) if source.pod == pod]
            self._views = {}
        for tracked in gone:
            self._reclaim(tracked.ledger)

    def match(
        self,
        prompt: Prompt,
        *,
        pods: Collection[str] | None = None,
        block_size: int | None = None,
        holders_only: bool = False,
    ) -> list[Holding]:
        """Say what each source holds of a prompt, see `Index.match`."""
        while True:
            reused = self._reused
            readers = self._view(prompt.model)
            if pods is not None:
                wanted = frozenset(pods)
                readers = [reader for reader in readers if reader.source.pod in wanted]
            bare = prompt.model in self._bare_models
            found = self._look_up(answer(readers, prompt, bare=bare, size=block_size, chunks=Chunks()))
            if reused == self._reused:
                return [holding for holding in found if holding.tokens] if holders_only else found

    def _look_up(self, asked: LookUps) -> list[Holding]:
        get = self._table.get
        holders: list[int] | None = None
        try:
            while True:
                keys = asked.send(holders) if holders is not None else next(asked)
                holders = [get(key, 0) for key in keys]
        except StopIteration as done:
            return cast("list[Holding]", done.value)

    def block_size(self, model: str) -> int | None:
        """Give the usual block size of a model, see `Index.block_size`."""
        sizes: Counter[int] = Counter()
        with self._lock:
            for tracked in self._tracked.values():
                if tracked.model == model:
                    groups = tracked.ledger.groups
                    slots = tracked.ledger.slots.values()
                    size = next((spec.block_size for spec in groups.values() if spec.tail is None), 0)
                    size = size or next((slot.block_size for slot in slots if slot.tier == "gpu"), 0)
                    size = size or next((slot.block_size for slot in slots), 0)
                    sizes[size] += bool(size)
        return min(sizes, key=lambda size: (-sizes[size], size)) if sizes.total() else None

    def sources(self) -> list[SourceStatus]:
        """Describe all sources, see `Index.sources`."""
        with self._lock:
            return [self._status(self._tracked[source]) for source in sorted(self._tracked)]

    def _status(self, tracked: _Tracked) -> SourceStatus:
        tiers: Counter[str] = Counter()
        for slot in tracked.ledger.slots.values():
            tiers[slot.tier] += len(slot.held)
        degraded = tracked.degraded()
        return SourceStatus(
            source=tracked.source,
            model=tracked.model,
            incarnation=tracked.incarnation,
            blocks=tiers.total(),
            tiers=dict(tiers),
            block_sizes=sorted({slot.block_size for slot in tracked.ledger.slots.values()}),
            degraded=degraded,
            degraded_since=tracked.since if degraded else 0.0,
            fleet_wide=tracked.fleet_wide,
        )

    def stats(self) -> dict[str, int]:
        """Give all counters and gauges, see `Index.stats`."""
        with self._lock:
            ledgers = [tracked.ledger for tracked in self._tracked.values()]
            return dict(self._counters) | {
                "blocks": len(self._table),
                "held": sum(len(slot.held) for ledger in ledgers for slot in ledger.slots.values()),
                "waiting": sum(ledger.waiting.blocks for ledger in ledgers),
                "waiting_dropped_total": sum(ledger.waiting.dropped for ledger in ledgers),
                "sources": len(ledgers),
                "bytes": self._bytes(),
            }

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._tracked.clear()
            self._views = {}
            self._table.clear()

    def _require(self, source: Source) -> _Tracked:
        tracked = self._tracked.get(source)
        if tracked is None:
            raise InvalidQuestion(f"source {source}: not registered; call register() before anything else")
        return tracked

    def _begin(self, tracked: _Tracked, ledger: Ledger | None = None) -> None:
        """Start an incarnation; `ledger` is that of the one before, where the cache is laid out as it was."""
        tracked.incarnation += 1
        tracked.ledger = Ledger(
            tracked.model,
            copies=tracked.copies,
            limits=self._limits,
            counters=self._counters,
            new_slot=self._add_slot(tracked),
            on_groups=self._forget_views,
            groups=None if ledger is None else ledger.groups,
            elsewhere=self._find_elsewhere(tracked.model) if tracked.fleet_wide else None,
        )

    def _renew(self, tracked: _Tracked, *, keep_groups: bool) -> None:
        with self._lock:
            ledger = tracked.ledger
            self._begin(tracked, ledger if keep_groups else None)
            self._views = {}
        self._reclaim(ledger)

    def _add_slot(self, tracked: _Tracked) -> Callable[[Slot], bool]:
        def add(slot: Slot) -> bool:
            if len(tracked.ledger.slots) >= self._limits.max_slots_per_source:
                return False
            number = self._free_bits.pop() if self._free_bits else self._bits
            self._bits = max(self._bits, number + 1)
            slot.bit = 1 << number
            self._views = {}
            return True

        return add

    def _forget_views(self) -> None:
        self._views = {}

    def _find_elsewhere(self, model: str) -> Callable[[EngineHash], Known | None]:
        def find(name: EngineHash) -> Known | None:
            for other in self._tracked.values():
                if other.model == model and not other.fleet_wide:
                    known = other.ledger.find(name)
                    if known is not None:
                        return known
            return None

        return find

    def _reclaim(self, ledger: Ledger) -> None:
        """Take the slots of a ledger that is no longer in use out of the table, in small steps."""
        self._reclaim_slots(ledger.slots.values())

    def _reclaim_slots(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            keys = list(slot.held.values())
            for start in range(0, len(keys), _SWEEP):
                with self._lock:
                    self._let_go(keys[start : start + _SWEEP], slot.bit)
            with self._lock:
                self._reused += 1
                self._free_bits.append(slot.bit.bit_length() - 1)

    def _bytes(self) -> int:
        """Give the memory in use, about: tables exactly, what they refer to by its usual size."""
        # keys are counted where they are held; a set of slots is an int of some words
        table = sys.getsizeof(self._table) + (24 + self._bits // 8) * len(self._table)
        return table + sum(tracked.ledger.bytes() for tracked in self._tracked.values())

    def _keep_bound(self, limit: int) -> None:
        """Forget the least useful tier of the largest source, again and again until memory is within its bound."""
        while True:
            with self._lock:
                full = [tracked for tracked in self._tracked.values() if not tracked.ledger.is_empty]
                if not full or self._bytes() <= limit:
                    return
                gone = max(full, key=lambda tracked: tracked.ledger.bytes()).ledger.evict()
                self._views = {}
                self._counters["evicted_total"] += sum(len(slot.held) for slot in gone)
            self._reclaim_slots(gone)
            with self._lock:
                self._table = dict(self._table)  # a dict gives memory back only when it is made anew

    def _view(self, model: str) -> list[Reader]:
        views = self._views
        view = views.get(model)
        if view is None:
            with self._lock:
                view = self._make_view(model)
                if view:  # anybody may ask for any model: only those that exist are remembered
                    self._views[model] = view
        return view

    def _make_view(self, model: str) -> list[Reader]:
        mine = [tracked for tracked in self._tracked.values() if tracked.model == model]
        shared = [slot for tracked in mine if tracked.fleet_wide for slot in tracked.ledger.slots.values()]
        # by sources, not by blocks: their number depends on the layout alone, and no source has more than its one vote
        votes = Counter(size for tracked in mine for size in {s.block_size for s in tracked.ledger.slots.values()})
        sizes = set(sorted(votes, key=lambda size: (-votes[size], size))[: self._limits.block_sizes])
        return [
            Reader(
                tracked.source,
                chains_of(
                    [s for s in [*tracked.ledger.slots.values(), *shared] if s.block_size in sizes],
                    dict(tracked.ledger.groups),
                ),
                tracked.degraded,
            )
            for tracked in mine
            if not tracked.fleet_wide
        ]


def _unalias(slot: Slot, key: BlockKey) -> bool:
    """Take one of several hashes from a key; say whether there was another."""
    left = slot.aliases.get(key, 0) - 1
    if left > 0:
        slot.aliases[key] = left
    elif left == 0:
        del slot.aliases[key]
    return left >= 0
