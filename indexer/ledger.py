"""The ledger of one source: which blocks its engine named, and which block keys those are.

Events name blocks by engine hashes, in an order and completeness that depend on the engine. The ledger turns each event
into *changes*: block keys that a slot holds from now on, or no longer. It knows no other source and no index.
"""

import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from typing import NamedTuple, TypeAlias

from indexer.base import TIERS, Copies, Limits, Tier, tier_of
from indexer.events import BlockRemoved, BlockStored, EngineHash
from indexer.groups import GroupSpec
from indexer.keys import BlockKey, extend_chain, root_key
from indexer.waiting import Place, WaitingRoom


class Slot:
    """The blocks of one source on one medium, of one cache group and one block size."""

    __slots__ = ("aliases", "bit", "block_size", "copies", "group", "held", "medium", "seen", "tier")

    def __init__(self, medium: str, group: int | None, block_size: int) -> None:
        self.bit = 0
        """The slot's mark in an index of bit sets; 0 until the index gives it one."""
        self.medium = medium
        self.tier = tier_of(medium)
        self.group = group
        self.block_size = block_size
        self.held: dict[EngineHash, BlockKey] = {}
        self.copies: dict[EngineHash, int] = {}
        """Physical copies, for the few hashes that have more than one."""
        self.aliases: dict[BlockKey, int] = {}
        """How many more hashes stand for a key, for the few keys that have more than one; the index keeps it."""
        self.seen: OrderedDict[EngineHash, float] | None = None if self.tier == "gpu" else OrderedDict()
        """When each block was last announced, as long as the engine has announced no removal here."""


class Change(NamedTuple):
    """Blocks that a slot holds from now on (`held`), or no longer. Changes apply in order.

    A change without keys says that there is another physical copy of a name, or one less.
    """

    slot: Slot
    names: list[EngineHash]
    keys: list[BlockKey]
    held: bool


Known: TypeAlias = tuple[BlockKey, int]
"""A block key and the size of its block."""

_PARENT_NOT_SAID = 0
"""What LMCache's in-process connector sends for a parent it does not know (WIRE B1a). Such blocks wait like others
whose parent is unknown, but say nothing about lost events."""


class Ledger:
    """See the module. One writer at a time.

    `new_slot` is called with each slot before its first use and says whether there may be one more. `on_groups` is
    called when the source announces a cache group for the first time. `elsewhere` looks a hash up in other sources, for
    caches that the whole fleet shares.
    """

    def __init__(
        self,
        model: str,
        *,
        copies: Copies,
        limits: Limits,
        counters: Counter[str],
        new_slot: Callable[[Slot], bool],
        on_groups: Callable[[], None],
        groups: dict[int, GroupSpec] | None = None,
        elsewhere: Callable[[EngineHash], Known | None] | None = None,
    ) -> None:
        self.model = model
        self.groups: dict[int, GroupSpec] = {} if groups is None else groups
        self.slots: dict[tuple[str, int | None, int], Slot] = {}
        self.waiting = WaitingRoom(limits.parked_blocks)
        self._counted = copies == "count"
        self._limits = limits
        self._counters = counters
        self._new_slot = new_slot
        self._on_groups = on_groups
        self._elsewhere = elsewhere
        self._removed: OrderedDict[EngineHash, Known] = OrderedDict()
        self._conflicts = False
        self._evicted: Tier | None = None

    @property
    def degraded(self) -> str:
        """Why the ledger may know less than the engine holds, "" when it knows all."""
        if self._conflicts:
            return "hash mismatch: one block hash was announced for different tokens"
        if self._evicted:
            return f"over max_bytes: blocks on {self._evicted} were forgotten"
        if self.waiting.has_unplaced or self.waiting.dropped:
            return "unplaced: the engine named blocks without saying which tokens they hold"
        if self.waiting.has_parked and self.waiting.parked_after(_PARENT_NOT_SAID):
            return "unknown parent: blocks were stored whose predecessors were never announced"
        return ""

    def store(self, event: BlockStored) -> tuple[list[Change], list[EngineHash]]:
        """Apply a store event, and what waited for it; give the changes, and the names whose tokens may be known."""
        changes: list[Change] = []
        told = list(event.block_hashes)
        if not self._store_one(event, changes) or not self.waiting.has_parked:
            return changes, told
        stored = [event]
        while stored:
            event = stored.pop()
            for name in event.block_hashes:
                for parked in self.waiting.unpark(name, event.block_size):
                    if self._store_one(parked.event, changes):
                        stored.append(parked.event)
                        told += parked.event.block_hashes
                    if parked.removed:
                        changes += self.remove(parked.removal())
        return changes, told

    def _store_one(self, event: BlockStored, changes: list[Change]) -> bool:
        """Apply one event alone; say whether blocks may follow its hashes now."""
        hashes, size = event.block_hashes, event.block_size
        if event.group_idx is not None and size and event.group_idx not in self.groups:
            self.groups[event.group_idx] = GroupSpec.of(event.kind, event.sliding_window, size)
            self._on_groups()
        if not hashes:
            return False
        if not size or not event.token_ids:
            self._store_named(event, 0, changes)
            return False
        if len(event.token_ids) // size > len(hashes):
            self._store_named(event, size, changes)
            return True
        if event.parent_block_hash is None:
            parent = root_key(self.model, size, event.lora, event.cache_salt)
        else:
            known = self._key_of(event.parent_block_hash, size)
            if known is None and self._ends_a_prompt(event):
                self._counters["partial_blocks_total"] += len(hashes)
                return False
            if known is None:
                self._counters["parked_total"] += len(hashes)
                self.waiting.park(event, event.parent_block_hash)
                return False
            parent = known
        slot = self._slot(event.medium, event.group_idx, size)
        if slot is None:
            return False
        # an engine may send a token more than its blocks hold (WIRE B1a)
        tokens = memoryview(event.token_ids).cast("B")[: 4 * size * len(hashes)]
        keys = extend_chain(parent, tokens, size, event.extras)
        self._counters["partial_blocks_total"] += len(hashes) - len(keys)
        self._hold(slot, hashes, keys, changes)
        if self.waiting.has_unplaced:
            for name, key in zip(hashes, keys, strict=False):
                self._place(name, (key, size), changes)
        return True

    def _ends_a_prompt(self, event: BlockStored) -> bool:
        """Say whether this is what was left of a prompt behind its whole chunks (WIRE B1a): no whole block either."""
        if event.group_idx is not None or event.parent_block_hash is None or tier_of(event.medium) == "gpu":
            return False
        before = self.find(event.parent_block_hash)
        return before is not None and before[1] > event.block_size

    def _store_named(self, event: BlockStored, size: int, changes: list[Change]) -> None:
        """Store hashes that do not come with their own tokens; `size` 0 takes any block size they are known with."""
        place = Place(event.medium, event.group_idx)
        for name in event.block_hashes:
            known = self.find(name, size)
            if known is None and self._elsewhere is not None:
                known = self._elsewhere(name)
            if known is None:
                self._counters["unplaced_total"] += 1
                self.waiting.wait(name, place, size, counted=self._counted)
            else:
                self._hold(self._slot(*place, known[1]), [name], [known[0]], changes)

    def learn(self, find: Callable[[EngineHash], Known | None], names: list[EngineHash]) -> list[Change]:
        """Place what waits under `names`, whose keys `find` gives."""
        changes: list[Change] = []
        for name in names:
            known = find(name)
            if known is not None:
                self._place(name, known, changes)
        return changes

    def _place(self, name: EngineHash, known: Known, changes: list[Change]) -> None:
        key, size = known
        for place in self.waiting.placed(name, size):
            self._hold(self._slot(*place, size), [name], [key], changes)

    def _hold(self, slot: Slot | None, hashes: list[EngineHash], keys: list[BlockKey], changes: list[Change]) -> None:
        if slot is None:
            return
        held = slot.held
        new: list[BlockKey] = []
        names: list[EngineHash] = []
        for name, key in zip(hashes, keys, strict=False):
            before = held.get(name)
            if before is None:
                held[name] = key
                new.append(key)
                names.append(name)
            elif before != key:
                self._counters["hash_conflicts_total"] += 1
                self._conflicts = True
            elif self._counted:
                slot.copies[name] = slot.copies.get(name, 1) + 1
                self._counters["copies_total"] += 1
                changes.append(Change(slot, [name], [], held=True))
        if slot.seen is not None:
            now = time.monotonic()
            for name in hashes[: len(keys)]:
                slot.seen[name] = now
                slot.seen.move_to_end(name)
        if new:
            changes.append(Change(slot, names, new, held=True))

    def remove(self, event: BlockRemoved) -> list[Change]:
        """Apply a removal. It takes one copy of each hash."""
        changes: list[Change] = []
        place = Place(event.medium, event.group_idx)
        slots = self._slots_at(place)
        if len(slots) == 1:
            slots[0].seen = None  # removals are announced here, so nothing has to age out
        for name in event.block_hashes:
            holder = next((slot for slot in slots if name in slot.held), None)
            waited = False
            if self.waiting.blocks and (holder is None or not self._counted):
                waited = self.waiting.remove(name, place, counted=self._counted)
            if holder is None:
                self._counters["removed_unknown_total"] += not waited
                continue
            holder.seen = None  # what another connector keeps on the medium, in other sizes, may have to yet
            copies = holder.copies.get(name)
            if copies is None:
                self._drop(holder, name, changes)
                continue
            if copies == 2:
                del holder.copies[name]
            else:
                holder.copies[name] = copies - 1
            changes.append(Change(holder, [name], [], held=False))
        return changes

    def recount(self, keys: Collection[int]) -> list[Change] | None:
        """Count one copy of each of these blocks where more were counted; see `Index.recount`."""
        if self._groups_decide():
            return None
        changes: list[Change] = []
        for slot, name in self._copied(keys):
            self._counters["recounted_total"] += slot.copies.pop(name) - 1
            changes.append(Change(slot, [name], [], held=False))
        return changes

    def surplus(self, keys: Collection[int]) -> int:
        """Give how many copies `recount` would take."""
        return 0 if self._groups_decide() else sum(slot.copies[name] - 1 for slot, name in self._copied(keys))

    def _groups_decide(self) -> bool:
        return len(self.groups) > 1 or any(spec.tail is not None for spec in self.groups.values())

    def _copied(self, keys: Collection[int]) -> list[tuple[Slot, EngineHash]]:
        """Give the names of these blocks of which more than one copy is counted on the first tier."""
        first = [slot for slot in self.slots.values() if slot.tier == "gpu"]
        return [(slot, name) for slot in first for name in slot.copies if slot.held[name] in keys]

    def _drop(self, slot: Slot, name: EngineHash, changes: list[Change]) -> None:
        key = slot.held.pop(name)
        self._removed[name] = (key, slot.block_size)
        if len(self._removed) > self._limits.remembered_blocks:
            self._removed.popitem(last=False)
        if changes and changes[-1].slot is slot and changes[-1].keys and not changes[-1].held:
            changes[-1].names.append(name)
            changes[-1].keys.append(key)
        else:
            changes.append(Change(slot, [name], [key], held=False))

    def expire(self, before: float) -> list[Change]:
        """Drop blocks last announced before that monotonic time on media whose removals are never announced."""
        changes: list[Change] = []
        for slot in self.slots.values():
            while slot.seen and next(iter(slot.seen.values())) < before:
                name, _ = slot.seen.popitem(last=False)
                slot.copies.pop(name, None)
                if name in slot.held:
                    self._drop(slot, name, changes)
                    self._counters["expired_total"] += 1
        return changes

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to evict."""
        return not (self.waiting.blocks or self._removed or any(slot.held for slot in self.slots.values()))

    def evict(self) -> list[Slot]:
        """Give up the slots of the least useful tier, or what waits and is remembered where no blocks are held."""
        held = [slot.tier for slot in self.slots.values() if slot.held]
        if not held:
            self.waiting.drop_all()
            self._removed.clear()
            return []
        self._evicted = max(held, key=TIERS.index)
        gone = [place for place, slot in self.slots.items() if slot.tier == self._evicted]
        return [self.slots.pop(place) for place in gone]

    def bytes(self) -> int:
        """Give the memory in use, about: tables exactly, what they refer to by its usual size."""
        size = 600 + self.waiting.bytes() + sys.getsizeof(self._removed) + 128 * len(self._removed)
        for slot in self.slots.values():
            # an int of 64 bits for each hash and each key
            size += sys.getsizeof(slot.held) + 72 * len(slot.held)
            size += sys.getsizeof(slot.copies) + sys.getsizeof(slot.aliases)
            if slot.seen is not None:
                size += sys.getsizeof(slot.seen) + 24 * len(slot.seen)
        return size

    def find(self, name: EngineHash, size: int = 0) -> Known | None:
        """Give key and block size of a hash that is or lately was held anywhere; `size` 0 takes any block size."""
        for slot in self.slots.values():
            if size in (0, slot.block_size):
                key = slot.held.get(name)
                if key is not None:
                    return key, slot.block_size
        known = self._removed.get(name)
        return known if known is not None and size in (0, known[1]) else None

    def _key_of(self, name: EngineHash, size: int) -> BlockKey | None:
        known = self.find(name, size)
        return None if known is None else known[0]

    def _slot(self, medium: str, group: int | None, size: int) -> Slot | None:
        """Give the slot for these blocks, made where there is none; None where there are too many."""
        slot = self.slots.get((medium, group, size))
        if slot is None:
            slot = Slot(medium, group, size)
            if not self._new_slot(slot):
                self._counters["too_many_slots_total"] += 1
                return None
            self.slots[medium, group, size] = slot
        return slot

    def _slots_at(self, place: Place) -> list[Slot]:
        """Give the slots that a removal can mean. Some publishers of one engine say the group, others do not."""
        here = [slot for slot in self.slots.values() if slot.medium == place.medium]
        exact = [slot for slot in here if slot.group == place.group]
        if exact:
            return exact
        return here if place.group is None else [slot for slot in here if slot.group is None]
