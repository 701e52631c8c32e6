"""What the sequence numbers of one publisher say. Decisions only, no I/O."""

from enum import Enum, auto


class Verdict(Enum):
    """What a sequence number means for what is known of its source."""

    FIRST = auto()
    """The publisher's first message."""
    LATE = auto()
    """The first message seen is not the publisher's first: what came before is unknown."""
    NEXT = auto()
    """The one that was due."""
    GAP = auto()
    """Messages before it are missing."""
    RESTART = auto()
    """The numbers went back: the engine began anew, with an empty cache, and this is its first message."""
    RESTART_LATE = auto()
    """The same, but this is not its first message."""


class Stream:
    """The sequence numbers of one publisher.

    A number that does not go up proves a restart (WIRE A4); a jump forward is a gap of `missing` messages.
    """

    __slots__ = ("first", "last", "missing")

    def __init__(self, first: int = 0) -> None:
        self.first = first
        """The number of a publisher's first message."""
        self.last: int | None = None
        self.missing = 0
        """How many messages the newest gap lacks."""

    def __repr__(self) -> str:
        return f"Stream(last={self.last})"

    def goes_on(self, seqs: list[int]) -> bool:
        """Say whether each of the next messages' numbers would be the one that is due."""
        return self.last is not None and seqs == list(range(self.last + 1, self.last + 1 + len(seqs)))

    def observe(self, seq: int) -> Verdict:
        """Take the next message's number."""
        last, self.last = self.last, seq
        if last is None:
            return Verdict.FIRST if seq <= self.first else Verdict.LATE
        if seq == last + 1:
            return Verdict.NEXT
        if seq > last:
            self.missing = seq - last - 1
            return Verdict.GAP
        return Verdict.RESTART if seq <= self.first else Verdict.RESTART_LATE
