"""Sources that are followed, a ledger for each: what every index in Python does with events."""

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import cast

from indexer.base import Copies, Limits, Source, SourceStatus
from indexer.chains import Cache, usual_block_size
from indexer.errors import InvalidQuestion, LimitReached
from indexer.events import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, Event, Events
from indexer.ledger import Change, Known, Ledger, Slot

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
    "recounted",
    "too_many_slots",
)


class Tracked:
    """One source that is followed."""

    def __init__(self, source: Source, model: str, copies: Copies, *, fleet_wide: bool) -> None:
        self.source = source
        self.model = model
        self.copies: Copies = copies
        self.fleet_wide = fleet_wide
        self.incarnation = 0
        self.reason = ""
        self.since = 0.0
        self.last_seq: int | None = None
        self.ledger: Ledger

    def degraded(self) -> str:
        """Say why answers may be wrong, "" when they are exact."""
        return self.reason or self.ledger.degraded


class TrackingIndex(ABC):
    """The half of an `Index` that events reach. Where the blocks are kept is the other half's, see the hooks below.

    All hooks but `_reclaim` are called with the lock held.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._lock = threading.RLock()
        self._tracked: dict[Source, Tracked] = {}
        self._bare_models: set[str] = set()
        self._counters: Counter[str] = Counter({f"{name}_total": 0 for name in _COUNTERS})

    @abstractmethod
    def _change(self, tracked: Tracked, changes: list[Change]) -> None:
        """Do to the blocks what a source's ledger says."""

    @abstractmethod
    def _take_slot(self, tracked: Tracked, slot: Slot) -> bool:
        """Give a new slot its bit; say no where there are too many."""

    @abstractmethod
    def _layout_changed(self, tracked: Tracked) -> None:
        """Hear that a source came, went, or has other slots or cache groups than before."""

    @abstractmethod
    def _trust_changed(self, tracked: Tracked) -> None:
        """Hear that a source is trusted more or less than before."""

    @abstractmethod
    def _applied(self, tracked: Tracked) -> None:
        """Hear that all events at hand are applied."""

    @abstractmethod
    def _reclaim(self, tracked: Tracked, slots: Iterable[Slot]) -> None:
        """Take slots that nobody sees any more out of the blocks."""

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
            tracked = Tracked(source, model, copies, fleet_wide=fleet_wide)
            self._begin(tracked)
            self._tracked[source] = tracked
            self._layout_changed(tracked)
        if degraded:
            self.degrade(source, degraded)

    @property
    def decoder(self) -> None:
        """None: events come as `indexer.events` has them."""
        return None

    def apply(self, source: Source, events: Events) -> None:
        """Apply events in order, see `Index.apply`."""
        self.apply_all(source, (events,))

    def apply_all(self, source: Source, batches: Sequence[Events], *, last_seq: int | None = None) -> None:
        """Apply batch after batch, see `Index.apply_all`."""
        tracked = self._require(source)
        for events in batches:
            for event in cast("Sequence[Event]", events):
                if isinstance(event, AllBlocksCleared):
                    self._counters["cleared_total"] += 1
                    self._renew(tracked, keep_groups=True)
                    continue
                with self._lock:
                    self._require(source)  # it may have been forgotten meanwhile
                    self._apply_one(tracked, event)
        with self._lock:
            tracked.last_seq = tracked.last_seq if last_seq is None else last_seq
            self._applied(tracked)

    def _apply_one(self, tracked: Tracked, event: BlockStored | BlockRemoved) -> None:
        if isinstance(event, BlockRemoved):
            self._counters["removed_total"] += len(event.block_hashes)
            self._change(tracked, tracked.ledger.remove(event))
            return
        self._counters["stored_total"] += len(event.block_hashes)
        if event.bare_images:
            self._bare_models.add(tracked.model)
        changes, told = tracked.ledger.store(event)
        self._change(tracked, changes)
        for other in self._waiting_for(tracked):
            self._change(other, other.ledger.learn(tracked.ledger.find, told))

    def _waiting_for(self, tracked: Tracked) -> list[Tracked]:
        """Give the shared caches of the same model that wait for somebody to say a block's tokens."""
        return [
            other
            for other in self._fleet_wide(tracked.model)
            if other is not tracked and other.ledger.waiting.has_unplaced
        ]

    def _fleet_wide(self, model: str) -> list[Tracked]:
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
            with self._lock:
                self._trust_changed(tracked)

    def recount(self, source: Source, keys: Collection[int]) -> bool:
        """Count one copy of each of these blocks, see `Index.recount`."""
        tracked = self._require(source)
        with self._lock:
            changes = tracked.ledger.recount(frozenset(keys))
            if changes:
                self._change(tracked, changes)
                self._applied(tracked)
        return changes is not None

    def surplus(self, source: Source, keys: Collection[int]) -> int:
        """Count the copies that `recount` would take, see `Index.surplus`."""
        with self._lock:
            tracked = self._tracked.get(source)
            return 0 if tracked is None else tracked.ledger.surplus(frozenset(keys))

    def expire(self) -> None:
        """Drop blocks that outlived their time, see `Index.expire`."""
        before = time.monotonic() - self._limits.silent_tier_ttl_s
        for tracked in list(self._tracked.values()):
            with self._lock:
                if self._tracked.get(tracked.source) is tracked:  # it may have been forgotten meanwhile
                    self._change(tracked, tracked.ledger.expire(before))
                    self._applied(tracked)

    def forget(self, pod: str) -> None:
        """Stop following a pod, see `Index.forget`."""
        with self._lock:
            gone = [self._tracked.pop(source) for source in list(self._tracked) if source.pod == pod]
            for tracked in gone:
                self._layout_changed(tracked)
        for tracked in gone:
            self._reclaim(tracked, tracked.ledger.slots.values())

    def block_size(self, model: str) -> int | None:
        """Give the usual block size of a model, see `Index.block_size`."""
        with self._lock:
            return usual_block_size(self._caches(model))

    def _caches(self, model: str) -> list[Cache]:
        """Describe the sources of a model as they are now."""
        return [
            Cache(
                tracked.source,
                list(tracked.ledger.slots.values()),
                dict(tracked.ledger.groups),
                tracked.fleet_wide,
                tracked.degraded,
            )
            for tracked in self._tracked.values()
            if tracked.model == model
        ]

    def sources(self) -> list[SourceStatus]:
        """Describe all sources, see `Index.sources`."""
        with self._lock:
            return [self._status(self._tracked[source]) for source in sorted(self._tracked)]

    def _status(self, tracked: Tracked) -> SourceStatus:
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
            last_seq=tracked.last_seq,
        )

    def _gauges(self) -> dict[str, int]:
        """Give what can be counted in the ledgers, and the counters."""
        ledgers = [tracked.ledger for tracked in self._tracked.values()]
        return dict(self._counters) | {
            "held": sum(len(slot.held) for ledger in ledgers for slot in ledger.slots.values()),
            "waiting": sum(ledger.waiting.blocks for ledger in ledgers),
            "waiting_dropped_total": sum(ledger.waiting.dropped for ledger in ledgers),
            "sources": len(ledgers),
        }

    def _require(self, source: Source) -> Tracked:
        tracked = self._tracked.get(source)
        if tracked is None:
            raise InvalidQuestion(f"source {source}: not registered; call register() before anything else")
        return tracked

    def _begin(self, tracked: Tracked, ledger: Ledger | None = None) -> None:
        """Start an incarnation; `ledger` is that of the one before, where the cache is laid out as it was."""
        tracked.incarnation += 1
        tracked.ledger = Ledger(
            tracked.model,
            copies=tracked.copies,
            limits=self._limits,
            counters=self._counters,
            new_slot=self._add_slot(tracked),
            on_groups=lambda: self._layout_changed(tracked),
            groups=None if ledger is None else ledger.groups,
            elsewhere=self._find_elsewhere(tracked.model) if tracked.fleet_wide else None,
        )

    def _renew(self, tracked: Tracked, *, keep_groups: bool) -> None:
        with self._lock:
            ledger = tracked.ledger
            self._begin(tracked, ledger if keep_groups else None)
            self._layout_changed(tracked)
        self._reclaim(tracked, ledger.slots.values())

    def _add_slot(self, tracked: Tracked) -> Callable[[Slot], bool]:
        def add(slot: Slot) -> bool:
            return len(tracked.ledger.slots) < self._limits.max_slots_per_source and self._take_slot(tracked, slot)

        return add

    def _find_elsewhere(self, model: str) -> Callable[[EngineHash], Known | None]:
        def find(name: EngineHash) -> Known | None:
            for other in self._tracked.values():
                if other.model == model and not other.fleet_wide:
                    known = other.ledger.find(name)
                    if known is not None:
                        return known
            return None

        return find
