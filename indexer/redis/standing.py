"""How a builder's sources stand in Redis: up to date, to be written anew, another's, or to be taken out. No I/O."""

from collections.abc import Iterable, Mapping

from indexer.base import Source
from indexer.tracking import Tracked

FULL = "full: Redis has no memory for what this source holds"
UNREADABLE = "lost: what was known of this source could not be read from Redis"


class Standing:
    """What a builder has to do yet about its sources. `followed` are those that it follows now."""

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

    def release(self, source: Source) -> None:
        """Leave a source to another builder as it is."""
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
