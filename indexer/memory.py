"""The index in this process, in plain Python: the readable specification of what every index does."""

import sys
from collections.abc import Collection, Iterable
from typing import cast

import msgspec

from indexer.base import Holding, Limits, Source
from indexer.chains import readers_of
from indexer.errors import InvalidQuestion, SnapshotError
from indexer.events import BlockRemoved, BlockStored, EngineHash
from indexer.keys import BlockKey
from indexer.ledger import Change, Slot
from indexer.matching import LookUps, Plan, answer
from indexer.prompt import Prompt
from indexer.scan import Chunks
from indexer.sections import Reader, name_of, read_head, read_ledger, write_source
from indexer.tracking import Tracked, TrackingIndex

_SWEEP = 4096
"""Blocks reclaimed at a time: a writer of another source waits no longer for the lock than that takes."""


class MemoryIndex(TrackingIndex):
    """An `Index` in this process.

    The table maps a block key to the set of slots that hold the block, as bits of an int. Writers take one lock for
    each event. Readers take none: reading a key's set is one step under the interpreter lock, and the slots a question
    is asked of are fixed in an immutable view. A slot's bit is used anew only after its last block is reclaimed; an
    answer that was worked out meanwhile is worked out again.
    """

    never_waits = True

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self._table: dict[BlockKey, int] = {}
        self._views: dict[str, Plan] = {}
        self._bits = 0
        self._free_bits: list[int] = []
        self._reused = 0
        self._has_digests = False
        """Byte names go by what stands for them in a snapshot, since one was loaded."""

    def __repr__(self) -> str:
        return f"MemoryIndex(python, {len(self._table)} blocks, {len(self._tracked)} sources)"

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
            plan = self._view(prompt.model).narrowed(pods, block_size)
            bare = prompt.model in self._bare_models
            found = self._look_up(answer(plan, prompt, bare=bare, chunks=Chunks(), holders_only=holders_only))
            if reused == self._reused:
                return found

    def _look_up(self, asked: LookUps) -> list[Holding]:
        get = self._table.get
        holders: list[int] | None = None
        try:
            while True:
                keys = asked.send(holders) if holders is not None else next(asked)
                holders = [get(key, 0) for key in keys]
        except StopIteration as done:
            return cast("list[Holding]", done.value)

    def stats(self) -> dict[str, int]:
        """Give all counters and gauges, see `Index.stats`."""
        with self._lock:
            return self._gauges() | {"blocks": len(self._table), "bytes": self._bytes()}

    release = TrackingIndex.forget

    def followed(self) -> list[Source]:
        """Give all sources in the order in which they were registered, see `SnapshotIndex.followed`."""
        with self._lock:
            return list(self._tracked)

    def dump(self, source: Source) -> bytes:
        """Give all that is known of a source, see `SnapshotIndex.dump`."""
        with self._lock:
            tracked = self._require(source)
            return write_source(tracked, is_bare=tracked.model in self._bare_models)

    def load(self, section: bytes) -> Source:
        """Follow a source from where it was, see `SnapshotIndex.load`."""
        reader = Reader(section)
        read, is_bare, age = read_head(reader)
        incarnation = read.incarnation
        with self._lock:
            if not self._has_digests and self._tracked:
                raise InvalidQuestion("a snapshot is loaded before any source is registered")
            if read.source in self._tracked:
                raise SnapshotError(f"source {read.source} is followed already")
            if len(self._tracked) >= self._limits.max_sources:
                raise SnapshotError(f"more sources than Limits.max_sources, {self._limits.max_sources}")
            self._begin(read)
            slots = read_ledger(reader, read.ledger, self._limits, age)
            self._has_digests = True
            read.incarnation = incarnation
            self._tracked[read.source] = read
            if is_bare:
                self._bare_models.add(read.model)
            for slot in slots:
                self._take_slot(read, slot)
                read.ledger.slots[slot.medium, slot.group, slot.block_size] = slot
                self._change(read, [Change(slot, [], list(slot.held.values()), held=True)])
            self._layout_changed(read)
            self._applied(read)
        return read.source

    def settle(self) -> None:
        """Place what waits in shared caches and is known by now, see `SnapshotIndex.settle`."""
        with self._lock:
            for shared in [tracked for tracked in self._tracked.values() if tracked.fleet_wide]:
                names = dict.fromkeys(name for name, _, _ in shared.ledger.waiting.unplaced())
                self._change(shared, shared.ledger.learn(self._find_elsewhere(shared.model), list(names)))

    def _apply_one(self, tracked: Tracked, event: BlockStored | BlockRemoved) -> None:
        super()._apply_one(tracked, _in_numbers(event) if self._has_digests else event)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._tracked.clear()
            self._views = {}
            self._table.clear()

    def _change(self, _: Tracked, changes: list[Change]) -> None:
        table = self._table
        for slot, _names, keys, held in changes:
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

    def _take_slot(self, _: Tracked, slot: Slot) -> bool:
        number = self._free_bits.pop() if self._free_bits else self._bits
        self._bits = max(self._bits, number + 1)
        slot.bit = 1 << number
        self._views = {}
        return True

    def _layout_changed(self, _: Tracked) -> None:
        self._views = {}

    def _trust_changed(self, _: Tracked) -> None:
        """Nothing: readers ask the source."""

    def _applied(self, _: Tracked) -> None:
        if self._limits.max_bytes is not None:
            self._keep_bound(self._limits.max_bytes)

    def _reclaim(self, _: Tracked, slots: Iterable[Slot]) -> None:
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
            full = [tracked for tracked in self._tracked.values() if not tracked.ledger.is_empty]
            if not full or self._bytes() <= limit:
                return
            largest = max(full, key=lambda tracked: tracked.ledger.bytes())
            gone = largest.ledger.evict()
            self._views = {}
            self._counters["evicted_total"] += sum(len(slot.held) for slot in gone)
            self._reclaim(largest, gone)
            self._table = dict(self._table)  # a dict gives memory back only when it is made anew

    def _view(self, model: str) -> Plan:
        views = self._views
        view = views.get(model)
        if view is None:
            with self._lock:
                view = self._make_view(model)
                if view.readers:  # anybody may ask for any model: only those that exist are remembered
                    self._views[model] = view
        return view

    def _make_view(self, model: str) -> Plan:
        return Plan.of(readers_of(self._caches(model), self._limits.block_sizes))


def _in_numbers(event: BlockStored | BlockRemoved) -> BlockStored | BlockRemoved:
    """Give an event whose blocks are named as in a snapshot."""
    parent = event.parent_block_hash if isinstance(event, BlockStored) else None
    if bytes not in map(type, event.block_hashes) and type(parent) is not bytes:
        return event
    hashes: list[EngineHash] = [name_of(name) for name in event.block_hashes]
    if isinstance(event, BlockRemoved):
        return msgspec.structs.replace(event, block_hashes=hashes)
    return msgspec.structs.replace(
        event, block_hashes=hashes, parent_block_hash=None if parent is None else name_of(parent)
    )


def _unalias(slot: Slot, key: BlockKey) -> bool:
    """Take one of several hashes from a key; say whether there was another."""
    left = slot.aliases.get(key, 0) - 1
    if left > 0:
        slot.aliases[key] = left
    elif left == 0:
        del slot.aliases[key]
    return left >= 0
