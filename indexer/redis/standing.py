"""How a builder's sources stand in Redis: up to date, to be written anew, another's, or to be taken out; and what is
there of their slots. No I/O.
"""

from collections.abc import Iterable, Mapping

from indexer.base import Source
from indexer.keys import BlockKey
from indexer.ledger import Slot
from indexer.tracking import Tracked

FULL = "full: Redis has no memory for what this source holds"
UNREADABLE = "lost: what was known of this source could not be read from Redis"


class Mirror:
    """What is in Redis of a slot."""

    __slots__ = ("keys", "logged", "number", "published")

    def __init__(self, number: int, *, published: bool = False) -> None:
        self.number = number
        self.published = published
        """Whether the source's record has the number: from then on nobody takes it for lost."""
        self.keys: dict[BlockKey, int] = {}
        """How many names stand for each key."""
        self.logged = 0
        """Blocks mentioned in the log."""


class Standing:
    """What Redis has of a builder's sources, and what is to be done yet. `followed` are those that it follows now."""

    def __init__(self, followed: Mapping[Source, Tracked]) -> None:
        self._followed = followed
        self.stale: dict[Source, Tracked] = {}
        """Sources that have to be written anew from their ledgers."""
        self.unclaimed: set[Source] = set()
        """Stale sources that Redis does not know to be ours yet."""
        self.shed: set[Source] = set()
        """Stale sources of which nothing is in Redis, because it is full."""
        self.lost: set[Source] = set()
        """Sources that another builder follows now: nothing of them is written here any more."""
        self.gone: dict[Source, Tracked] = {}
        """Sources that were forgotten and are still in Redis."""
        self._begun: dict[Source, dict[int, bytes]] = {}
        """Slot numbers under which stale sources were begun to be written, each with whose it is at the latest."""
        self._mirrors: dict[Slot, Mirror] = {}
        self._fresh: list[Mirror] = []
        """Mirrors whose numbers are in no record yet."""

    # ---- sources

    @property
    def followed(self) -> list[Tracked]:
        """The sources that are followed now."""
        return list(self._followed.values())

    def follows(self, source: Source) -> bool:
        """Whether a source is followed now."""
        return source in self._followed

    def is_followed(self, tracked: Tracked) -> bool:
        """Whether this is what is known of a source that is followed now, not of one that was forgotten."""
        return self._followed.get(tracked.source) is tracked

    def is_unwritten(self, tracked: Tracked) -> bool:
        """Whether what a source's events say is not written now: it is written anew later, or is another's."""
        return tracked.source in self.stale or tracked.source in self.lost

    def unshed(self) -> list[Tracked]:
        """Give the stale sources of which there may be something in Redis."""
        return [tracked for source, tracked in self.stale.items() if source not in self.shed]

    def call_stale(self, tracked: Tracked, *, is_claimed: bool = True) -> None:
        """Have a source written anew; `is_claimed` where Redis knows that it is ours."""
        self.stale[tracked.source] = tracked
        if not is_claimed:
            self.unclaimed.add(tracked.source)

    def call_unpublished_stale(self) -> None:
        """Have the sources written anew whose record may not have the numbers of all their slots."""
        for tracked in self.followed:
            slots = tracked.ledger.slots.values()
            if tracked.source not in self.lost and not all(self._mirrors[slot].published for slot in slots):
                self.call_stale(tracked)

    def call_gone(self, tracked: Tracked) -> None:
        """Have a source that was forgotten taken out."""
        self.gone[tracked.source] = tracked
        if self.stale.get(tracked.source) is tracked:
            del self.stale[tracked.source]

    def call_written(self, source: Source) -> None:
        """Hear that a source was written anew."""
        self._begun.pop(source, None)
        self.stale.pop(source)
        self.unclaimed.discard(source)

    def call_shed(self, source: Source) -> None:
        """Hear that a stale source was taken out of a Redis that is full."""
        self._begun.pop(source, None)
        self.shed.add(source)

    def call_left(self, source: Source) -> None:
        """Hear that a forgotten source was taken out."""
        self._begun.pop(source, None)
        self.lost.discard(source)
        self.shed.discard(source)

    def release(self, tracked: Tracked) -> None:
        """Leave a source to another builder as it is."""
        source = tracked.source
        self.drop_slots(tracked.ledger.slots.values())
        self.stale.pop(source, None)
        self._begun.pop(source, None)
        self.lost.discard(source)
        self.shed.discard(source)
        self.unclaimed.discard(source)

    def note_begun(self, source: Source, numbers: Iterable[int], owner: bytes) -> None:
        """Note slot numbers that have to go when a source is written anew, or leaves, and whose they are now."""
        begun = self._begun.setdefault(source, {})
        for number in numbers:
            begun.setdefault(number, owner)

    def begun(self, source: Source) -> dict[int, bytes]:
        """Give these numbers, each with whose it was when it was noted."""
        return self._begun.get(source, {})

    # ---- slots

    def add_slot(self, slot: Slot, number: int) -> None:
        """Begin with a new slot, under a number that is in no record yet; -1 where it has none yet."""
        mirror = self._mirrors[slot] = Mirror(number)
        self._fresh.append(mirror)

    def replace_slot(self, slot: Slot, number: int) -> Mirror:
        """Begin again with a slot, under a number that the record to come, or that there is, has."""
        mirror = self._mirrors[slot] = Mirror(number, published=True)
        return mirror

    def drop_slots(self, slots: Iterable[Slot]) -> list[int]:
        """Forget slots; give the numbers that they had."""
        gone = [self._mirrors.pop(slot) for slot in slots if slot in self._mirrors]
        return [mirror.number for mirror in gone if mirror.number >= 0]

    def clear_slots(self) -> None:
        """Forget all slots."""
        self._mirrors.clear()

    def mirror(self, slot: Slot) -> Mirror:
        """Give what is in Redis of a slot."""
        return self._mirrors[slot]

    def numbers(self, tracked: Tracked) -> list[int]:
        """Give the numbers of a source's slots, -1 for those that have none yet."""
        return [self._mirrors[slot].number for slot in tracked.ledger.slots.values() if slot in self._mirrors]

    def note_published(self) -> None:
        """Hear that records with all numbers were written."""
        for mirror in self._fresh:
            mirror.published = True
        self._fresh.clear()
