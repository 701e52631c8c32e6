"""When sources were heard, and how late: noted with every batch, so it must cost next to nothing."""

import time
from collections.abc import Iterable
from typing import NamedTuple

from indexer import Source

_SAMPLE_EVERY_S = 0.1


class LastHeard(NamedTuple):
    """When a source was heard."""

    at: float
    """When its last message was applied, in seconds since the epoch."""
    live_at: float | None
    """When one that came by itself was, to a tenth of a second; None where all were asked for again."""
    lag_s: float | None
    """How long after the engine made it that one was applied; None where that could not be read cheaply."""
    messages: int
    """How many were applied so far."""
    gaps: int
    """How often some were missing for good."""


class Notes:
    """What is noted of one source as one publisher tells of it. Times are of the monotonic clock.

    Counts are exact; the time of a message is read ten times a second, which is all that lag needs.
    """

    __slots__ = ("due", "gaps", "lag_s", "live_at", "messages")

    def __init__(self) -> None:
        self.messages = 0
        self.gaps = 0
        self.due = 0.0
        """From when on `sample` is to be called with the next live message."""
        self.live_at: float | None = None
        self.lag_s: float | None = None

    def sample(self, now: float, ts: float | None) -> None:
        """Note a live message and when the engine made it."""
        self.due = now + _SAMPLE_EVERY_S
        self.live_at = now
        self.lag_s = None if ts is None else time.time() - ts


def last_heard(notes: Iterable[tuple[Source, float, Notes]]) -> dict[Source, LastHeard]:
    """Give when each source was heard, from all that tells of it and the time at which that spoke last."""
    behind = time.time() - time.monotonic()
    found: dict[Source, LastHeard] = {}
    for source, at, note in notes:
        live_at = None if note.live_at is None else behind + note.live_at
        before, heard = found.get(source), LastHeard(behind + at, live_at, note.lag_s, note.messages, note.gaps)
        if before is not None:
            newest = max(before, heard, key=lambda one: one.live_at or 0.0)
            heard = LastHeard(
                max(before.at, heard.at),
                newest.live_at,
                newest.lag_s,
                before.messages + heard.messages,
                before.gaps + heard.gaps,
            )
        found[source] = heard
    return found
