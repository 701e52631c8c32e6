"""What the engines really reused against what was predicted: the error of each source, why, and what follows from it.

The index is only asked, never written: what an observation proves wrong is handed to `Heal`, which the composition root
connects to the one who applies the source's events. Removals that were lost leave copies counted that the engine has
lost; nobody but the ledger knows how many, so that only there they can be taken back without taking too many. What an
engine evidently has although it never said so has no engine hash that a ledger could file it under: it lives here, in
an overlay, for as long as observations confirm it.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from indexer import Source
from scorer.drift import DriftTest
from scorer.speculation import Overlay

ERROR_BOUNDS: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Upper bounds of the error histogram, in blocks; what is more is counted last."""

_MAX_SOURCES = 16_384
_MAX_ROUTES = 65_536
_ROUTE_TTL_S = 600.0
_HELD_TTL_S = 300.0

Outcome: TypeAlias = Literal[
    "reused",
    "no_reuse_possible",
    "routed_elsewhere",
    "overstated",
    "understated",
    "late",
    "not_comparable",
    "unknown_pod",
]
"""What became of a request. As predicted: ``reused``, ``no_reuse_possible`` (no pod had anything of it),
``routed_elsewhere`` (another pod had more). Index stale by a block or more: ``overstated``, ``understated``. Neither
counts for or against a pod: ``late`` (more was reused than the index said, and a request just routed explains it),
``not_comparable`` (nothing was predicted before the run, and the run itself has changed the answer)."""

STALE: frozenset[Outcome] = frozenset({"overstated", "understated"})
_EVIDENCE: frozenset[Outcome] = STALE | {"reused", "routed_elsewhere"}

Heal: TypeAlias = Callable[[Source, Sequence[int]], bool]
"""Takes blocks that a source evidently computed anew, so that it holds one copy and no more; says no where a short
reuse does not tell which block was missing. It may be given the same blocks twice, or none, to ask."""


class Observation(msgspec.Struct, frozen=True, gc=False):
    """What one request told about a pod."""

    pod: str
    rank: int
    predicted_tokens: int
    cached_tokens: int
    error_blocks: int
    """Predicted less reused: more than 0 where the index overstates. 0 where there is nothing to compare."""
    outcome: Outcome
    drifting: bool
    """Whether the pod is called degraded for its errors from now on."""


class Prediction(NamedTuple):
    """What was expected of a request when its pod was chosen, in tokens that the engine can reuse."""

    source: Source
    tokens: int
    elsewhere: int
    """The most that another source could have reused."""
    speculative: int
    """Tokens that requests on their way would add."""


class Tally(NamedTuple):
    """All that was observed of one source."""

    source: Source
    outcomes: dict[str, int]
    errors: list[int]
    """Comparable requests by the size of the error: one number for each of `ERROR_BOUNDS`, one for what is more."""
    error_sum: int
    drifting: bool


class _Known:
    """What is known of one source."""

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.errors = [0] * (len(ERROR_BOUNDS) + 1)
        self.error_sum = 0
        self.test = DriftTest()
        self.was_marked = False
        self.owed: Sequence[int] = ()
        """What was healed last. The event of the run itself may have come after, so it is done once more."""
        self.reason = ""


Route: TypeAlias = tuple[str, int | None, int | None, int]
"""A request on its way: pod and rank as they were given, last block key and length of the prompt."""


class Observer:
    """See the module. All methods may be called from any thread."""

    def __init__(self, heal: Heal | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.held = Overlay(_HELD_TTL_S, clock=clock)
        """Blocks that sources evidently have although the index does not know."""
        self._heal = heal
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[Source, _Known] = OrderedDict()
        self._routes: OrderedDict[Route, tuple[float, Prediction]] = OrderedDict()
        self._incarnations: Mapping[Source, int] = {}
        self.unknown = 0
        """Observations of pods that the index does not know."""

    @property
    def drifting(self) -> dict[Source, str]:
        """The sources that are called degraded, and why."""
        with self._lock:
            return {source: known.reason for source, known in self._known.items() if known.reason}

    def expect(self, route: Route, prediction: Prediction) -> None:
        """Remember what is predicted for a request that is on its way."""
        now = self._clock()
        with self._lock:
            self._routes[route] = (now + _ROUTE_TTL_S, prediction)
            self._routes.move_to_end(route)
            while len(self._routes) > _MAX_ROUTES or next(iter(self._routes.values()))[0] <= now:
                self._routes.popitem(last=False)

    def expected(self, route: Route) -> Prediction | None:
        """Give back what `expect` was told, once; None where it was not told, or long ago."""
        with self._lock:
            until, prediction = self._routes.pop(route, (0.0, None))
        return prediction if until > self._clock() else None

    def observe(
        self, prediction: Prediction, cached_tokens: int, keys: Sequence[int], size: int, *, comparable: bool
    ) -> Observation:
        """Take what an engine reused of the prompt with these keys, and draw the consequences."""
        source = prediction.source
        error = prediction.tokens // size - cached_tokens // size if comparable else 0
        outcome = _judge(prediction, cached_tokens, error, size) if comparable else "not_comparable"
        with self._lock:
            known = self._known.setdefault(source, _Known())
            self._known.move_to_end(source)
            if len(self._known) > _MAX_SOURCES:
                self.held.forget(self._known.popitem(last=False)[0])
            known.outcomes[outcome] += 1
            if comparable:
                known.errors[bisect_left(ERROR_BOUNDS, abs(error))] += 1
                known.error_sum += abs(error)
            if outcome in _EVIDENCE and known.test.add(miss=outcome in STALE):
                known.reason = _reason_of(known) if known.test.drifting else ""
                known.was_marked = known.was_marked or known.test.drifting
            drifting, was_marked, owed = known.test.drifting, known.was_marked, known.owed
            known.owed = ()
        if self._heal is not None and comparable:
            if owed:
                self._heal(source, owed)
            reused = cached_tokens // size
            if outcome == "overstated":
                known.owed = self._lose(self._heal, source, keys[reused:])
            else:
                if outcome == "understated" and was_marked and self._heal(source, ()):
                    self.held.add(source, keys[prediction.tokens // size : reused])
                self.held.refresh(source, keys[:reused])
        return Observation(*source, prediction.tokens, cached_tokens, error, outcome, drifting)

    def _lose(self, heal: Heal, source: Source, lost: Sequence[int]) -> Sequence[int]:
        """Take what was counted before the run of blocks that the run computed anew; give what may be left of it.

        An engine's look-up ends at the first block that is missing, and what comes after is computed and stored anew.
        Events come in order: once the new copies are counted, so is every removal that was not lost, and a healthy
        pod has no more than one left. So this waits for no mark. The event of the run may still be on its way; then
        there is nothing to take yet, and it is tried once more with the next observation.
        """
        self.held.discard(source, lost)
        return lost if heal(source, lost) else ()

    def tallies(self) -> list[Tally]:
        """Give all that was observed, by source."""
        with self._lock:
            return [
                Tally(
                    source,
                    {str(name): number for name, number in known.outcomes.items()},
                    [*known.errors],
                    known.error_sum,
                    known.test.drifting,
                )
                for source, known in sorted(self._known.items(), key=lambda pair: pair[0])
            ]

    def follow(self, incarnations: Mapping[Source, int]) -> None:
        """Forget the sources that are not followed any more, and what those had that began anew since."""
        with self._lock:
            before, self._incarnations = self._incarnations, incarnations
            for source, known in list(self._known.items()):
                if source not in incarnations:
                    del self._known[source]
                elif before.get(source) == incarnations[source]:
                    continue
                elif source in before:
                    known.owed, known.reason, known.was_marked, known.test = (), "", False, DriftTest()
                self.held.forget(source)


def _judge(prediction: Prediction, cached_tokens: int, error: int, size: int) -> Outcome:
    if error > 0:
        return "overstated"
    if error < 0:
        return (
            "late" if cached_tokens // size <= (prediction.tokens + prediction.speculative) // size else "understated"
        )
    if prediction.elsewhere // size > cached_tokens // size:
        return "routed_elsewhere"
    return "reused" if cached_tokens >= size else "no_reuse_possible"


def _reason_of(known: _Known) -> str:
    over, under = known.outcomes["overstated"], known.outcomes["understated"]
    return f"drifting: the engine reused less than the index said {over} times, more {under} times"
