"""How far the publishers of a pod were followed: what a snapshot keeps beside the blocks, so that nothing is missed."""

from collections.abc import Iterable
from contextlib import suppress

import msgspec

from indexer import InvalidQuestion, Source, snapshots
from kvevents.recovery import Position


class RankPosition(msgspec.Struct, frozen=True, array_like=True):
    """One rank that a publisher speaks for."""

    rank: int
    last: int | None
    """Number of the last message that was applied; None where the next one is the first."""
    verdict: str
    """What is held against it, "" where nothing is."""


class PublisherPosition(msgspec.Struct, frozen=True, array_like=True):
    """One publisher of a pod."""

    endpoint: str
    model: str
    ranks: list[RankPosition]
    last: int | None = None
    """Number of the last message that was applied, where messages can be asked for again."""
    digest: int = 0
    is_whole: bool = False

    @property
    def position(self) -> Position | None:
        """Where a recovery goes on; None where there was none."""
        return None if self.last is None else Position(self.last, self.digest, self.is_whole)


class PodPosition(msgspec.Struct, frozen=True, array_like=True):
    """All publishers of a pod."""

    pod: str
    publishers: list[PublisherPosition]


def encode(pod: PodPosition) -> bytes:
    """Write what a part of a snapshot keeps with the sources."""
    return msgspec.msgpack.encode(pod)


def decode(note: bytes) -> PodPosition:
    """Read it again. Raises `SnapshotError` for what is none."""
    try:
        return msgspec.msgpack.decode(note, type=PodPosition)
    except msgspec.DecodeError as error:
        raise snapshots.SnapshotError(f"the positions of a pod cannot be read: {error}") from error


def part_of(pod: PodPosition, sources: Iterable[Source], index: snapshots.SnapshotIndex) -> snapshots.Part:
    """Make the part of a snapshot that is about a pod, of those of its sources that are not forgotten meanwhile."""
    sections = []
    for source in sources:
        with suppress(InvalidQuestion):
            sections.append(index.dump(source))
    return snapshots.Part(encode(pod), sections)


def load_part(part: snapshots.Part, index: snapshots.SnapshotIndex) -> PodPosition:
    """Load the sources of a part; give how far its pod was followed. Raises `SnapshotError` for what is none."""
    known = decode(part.note)
    for section in part.sources:
        if (pod := index.load(section).pod) != known.pod:
            raise snapshots.SnapshotError(f"a source of pod {pod!r} is among those of {known.pod!r}")
    return known
