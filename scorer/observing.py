"""What the engines really reused against what was predicted: the error of each source, why, and what follows from it.

The index is only asked, never written: what an observation proves wrong is handed to `Heal`, which the composition root
connects to the one who applies the source's events. Removals that were lost leave copies counted that the engine has
lost; nobody but the ledger knows how many, so that only there they can be taken back without taking too many. What no
event says is presumed, in a `Shadow` of the engine's cache, and never stored in the index.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from indexer import Source
from scorer.drift import DriftTest
from scorer.shadow import Foresight, Shadows

ERROR_BOUNDS: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Upper bounds of the error histogram, in blocks; what is more is counted last."""

_MAX_SOURCES = 16_384
_MAX_ROUTES = 65_536
_ROUTE_TTL_S = 600.0
_PROVEN = 64

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

Surplus: TypeAlias = Callable[[Source, Sequence[int]], int]
"""Says how many more copies than one of each of these blocks are counted: `Index.surplus`."""


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
    told: int
    """What the index said alone."""
    foreseen: Foresight | None = None
    """What the shadow of the source said, where it has one."""


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
        self.over = self.under = 0
        """How often the index alone said too much, and too little."""
        self.owed: Sequence[int] = ()
        """What the last run computed anew although the index said that it was there. Its event may come later, so
        that what follows from it is looked at once more with the next request."""
        self.begin()

    def begin(self) -> None:
        """Forget what followed from errors of before, as the source began anew."""
        self.test = DriftTest()
        self.proven: deque[int] = deque(maxlen=_PROVEN)
        """The blocks that were proofs lately. Each is one only once."""
        self.suspect = False
        """Whether the source was marked, or there was a proof, ever."""
        self.owed = ()
        self.reason = ""


Route: TypeAlias = tuple[str, int | None, int | None, int]
"""A request on its way: pod and rank as they were given, last block key and length of the prompt."""


class Observer:
    """See the module. All methods may be called from any thread."""

    def __init__(self, heal: Heal | None, surplus: Surplus, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.shadows = Shadows()
        """What sources evidently have and have lost whatever the index says, where it is to be healed."""
        self._surplus = surplus
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
        self,
        prediction: Prediction,
        cached_tokens: int,
        keys: Sequence[int],
        size: int,
        *,
        length: int,
        comparable: bool,
    ) -> Observation:
        """Take what an engine reused of the prompt with these keys and that length, and draw the consequences."""
        source, reused = prediction.source, cached_tokens // size
        error = prediction.tokens // size - reused if comparable else 0
        outcome = _judge(prediction, cached_tokens, size) if comparable else "not_comparable"
        # a source is judged by what the index says alone, also where a shadow has made up for it
        told = _judge(prediction._replace(tokens=prediction.told), cached_tokens, size) if comparable else outcome
        lost = keys[reused:] if told == "overstated" else ()
        with self._lock:
            known = self._known.setdefault(source, _Known())
            self._known.move_to_end(source)
            if len(self._known) > _MAX_SOURCES:
                self.shadows.forget(self._known.popitem(last=False)[0])
            known.outcomes[outcome] += 1
            if comparable:
                known.errors[bisect_left(ERROR_BOUNDS, abs(error))] += 1
                known.error_sum += abs(error)
            owed, known.owed = known.owed, lost
        proofs = [blocks[0] for blocks in (owed, lost) if blocks and self._surplus(source, blocks[:1])]
        with self._lock:
            proof = any(block not in known.proven for block in proofs)
            known.proven.extend(block for block in proofs if block not in known.proven)
            known.over += told == "overstated"
            known.under += told == "understated"
            if known.test.add(miss=told in STALE if told in _EVIDENCE else None, proof=proof):
                known.reason = _reason_of(known) if known.test.drifting else ""
            drifting = known.test.drifting
            known.suspect = suspect = known.suspect or drifting or proof
        if self._heal is not None:
            # Events come in order: once the copies of the run are counted, so is every removal that was not lost, and a
            # healthy pod has no more than one left. So this waits for no mark.
            missed = [*owed, *lost]
            if (missed or told in STALE) and self._heal(source, missed) and suspect:
                self.shadows.begin(source)
            self.shadows.take(
                source,
                keys,
                reused,
                reusable=max(0, length - 1) // size,
                partial=length % size > 0,
                foreseen=prediction.foreseen,
                comparable=comparable,
            )
        return Observation(*source, prediction.tokens, cached_tokens, error, outcome, drifting)

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
                    known.begin()
                self.shadows.forget(source)


def _judge(prediction: Prediction, cached_tokens: int, size: int) -> Outcome:
    reused = cached_tokens // size
    if prediction.tokens // size > reused:
        return "overstated"
    if prediction.tokens // size < reused:
        return "late" if reused <= (prediction.tokens + prediction.speculative) // size else "understated"
    if prediction.elsewhere // size > reused:
        return "routed_elsewhere"
    return "reused" if cached_tokens >= size else "no_reuse_possible"


def _reason_of(known: _Known) -> str:
    return f"drifting: the engine reused less than the index said {known.over} times, more {known.under} times"
