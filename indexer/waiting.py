"""Blocks of one source that cannot be placed yet, within one bound.

* parked: a store event whose parent is unknown, until the parent is stored. It is never taken for a prompt's start.
* unplaced: a copy of a hash that came without tokens of its own, until some event says its tokens.
"""

from collections import OrderedDict
from typing import NamedTuple

from indexer.events import BlockRemoved, BlockStored, EngineHash


class Place(NamedTuple):
    """Where a copy lies."""

    medium: str
    group: int | None


class ParkedEvent:
    """A store event that waits, and those of its blocks that were removed meanwhile."""

    __slots__ = ("event", "number", "removed")

    def __init__(self, event: BlockStored, number: int = 0) -> None:
        self.event = event
        self.number = number
        """In which order events came."""
        self.removed: list[EngineHash] = []

    def removal(self) -> BlockRemoved:
        """Give the removals that came while the event was parked."""
        return BlockRemoved(block_hashes=self.removed, medium=self.event.medium, group_idx=self.event.group_idx)


class WaitingRoom:
    """See the module. `blocks` is the number of blocks that wait."""

    __slots__ = ("_limit", "_parked", "_parked_copies", "_parks", "_unplaced", "blocks", "dropped")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parked: OrderedDict[tuple[EngineHash, int], list[ParkedEvent]] = OrderedDict()
        self._parked_copies: dict[tuple[Place, EngineHash], list[ParkedEvent]] = {}
        self._parks = 0
        self._unplaced: OrderedDict[EngineHash, list[tuple[Place, int]]] = OrderedDict()
        self.blocks = 0
        self.dropped = 0
        """Blocks that had to go because more waited than may."""

    @property
    def has_parked(self) -> bool:
        """Whether any event is parked."""
        return bool(self._parked)

    @property
    def has_unplaced(self) -> bool:
        """Whether any hash waits for its tokens."""
        return bool(self._unplaced)

    def parked_after(self, ignore: EngineHash) -> bool:
        """Say whether an event waits for another parent than `ignore`."""
        return any(parent != ignore for parent, _ in self._parked)

    def parked(self) -> list[ParkedEvent]:
        """Give the events that wait, in the order in which they came."""
        events = [parked for siblings in self._parked.values() for parked in siblings]
        return sorted(events, key=lambda parked: parked.number)

    def unplaced(self) -> list[tuple[EngineHash, Place, int]]:
        """Give the copies that wait for their tokens, the names in order and the copies of each."""
        return [(name, place, size) for name, copies in self._unplaced.items() for place, size in copies]

    def put_back(self, before: ParkedEvent) -> None:
        """Keep an event that waited before, with what was removed of it."""
        event = before.event
        if event.parent_block_hash is None:
            return
        parked = self.park(event, event.parent_block_hash)
        parked.removed = before.removed
        place = Place(event.medium, event.group_idx)
        for name in before.removed:
            copies = self._parked_copies.get((place, name))
            if copies is not None and parked in copies:
                copies.remove(parked)
                if not copies:
                    del self._parked_copies[place, name]

    def park(self, event: BlockStored, parent: EngineHash) -> ParkedEvent:
        """Keep an event until `parent`, a block of the same size, is stored."""
        self._parks += 1
        parked = ParkedEvent(event, self._parks)
        self._parked.setdefault((parent, event.block_size), []).append(parked)
        place = Place(event.medium, event.group_idx)
        for name in event.block_hashes:
            self._parked_copies.setdefault((place, name), []).append(parked)
        self.blocks += len(event.block_hashes)
        self._keep_bound()
        return parked

    def unpark(self, parent: EngineHash, block_size: int) -> list[ParkedEvent]:
        """Give the events that waited for `parent`, in order, and keep them no longer."""
        events = self._parked.pop((parent, block_size), None)
        if events is None:
            return []
        for parked in events:
            self._leave(parked)
        return events

    def _leave(self, parked: ParkedEvent) -> None:
        event = parked.event
        self.blocks -= len(event.block_hashes)
        place = Place(event.medium, event.group_idx)
        for name in event.block_hashes:
            copies = self._parked_copies.get((place, name))
            if copies is not None and parked in copies:
                copies.remove(parked)
                if not copies:
                    del self._parked_copies[place, name]

    def wait(self, name: EngineHash, place: Place, block_size: int, *, counted: bool) -> None:
        """Keep a copy of a hash until its tokens are known; `block_size` 0 fits any."""
        copies = self._unplaced.setdefault(name, [])
        if counted or (place, block_size) not in copies:
            copies.append((place, block_size))
            self.blocks += 1
        self._keep_bound()

    def placed(self, name: EngineHash, block_size: int) -> list[Place]:
        """Give where the waiting copies of a hash lie that fit `block_size`, and keep them no longer."""
        copies = self._unplaced.get(name)
        if copies is None:
            return []
        found = [place for place, size in copies if size in (0, block_size)]
        left = [(place, size) for place, size in copies if size not in (0, block_size)]
        if left:
            self._unplaced[name] = left
        else:
            del self._unplaced[name]
        self.blocks -= len(found)
        return found

    def remove(self, name: EngineHash, place: Place, *, counted: bool) -> bool:
        """Take back a waiting copy (all of them where copies are not counted); say whether there was one."""
        copies = self._unplaced.get(name)
        if copies is not None:
            mine = next((copy for copy in copies if copy[0] == place), None)
            if mine is not None:
                copies.remove(mine)
                self.blocks -= 1
                if not copies:
                    del self._unplaced[name]
                return True
        parked = self._parked_copies.get((place, name))
        if parked is None:
            return False
        for event in parked[:1] if counted else parked[:]:
            event.removed.append(name)
            parked.remove(event)
        if not parked:
            del self._parked_copies[place, name]
        return True

    def bytes(self) -> int:
        """Give the memory in use, about."""
        return 400 * self.blocks

    def drop_all(self) -> None:
        """Give up everything, counted."""
        self._shrink_to(0)

    def _keep_bound(self) -> None:
        self._shrink_to(self._limit)

    def _shrink_to(self, limit: int) -> None:
        while self.blocks > limit:
            before = self.blocks
            if self._parked:
                _, events = self._parked.popitem(last=False)
                for parked in events:
                    self._leave(parked)
            else:
                _, copies = self._unplaced.popitem(last=False)
                self.blocks -= len(copies)
            self.dropped += before - self.blocks
