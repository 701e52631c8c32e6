"""Whether a pod's answers drift from what its engine does: a test over the requests one after the other.

Two cumulative sums (E. S. Page, "Continuous inspection schemes", Biometrika 1954). Each request is a hit or a miss; the
sum of log(likelihood of that where a pod drifts / where it is healthy), never below 0, marks the pod when it passes a
threshold. The same sum the other way round clears it.
"""

from math import log

HEALTHY, DRIFTING = 0.05, 0.25
"""Share of misses of a pod whose events are late now and then, and of one whose index is wrong."""
THRESHOLD = 6.0
"""Four misses in a row mark a pod. By simulation, median of requests to the mark: 18 where three of ten are misses, 31
where two are, 4,432 where one of twenty is, more than 20,000 where one of fifty is."""

_MISS = log(DRIFTING / HEALTHY)
_HIT = log((1 - DRIFTING) / (1 - HEALTHY))


class DriftTest:
    """See the module. Not for use by several threads at once."""

    __slots__ = ("_against", "_for", "drifting", "hits", "misses")

    def __init__(self) -> None:
        self.drifting = False
        self.hits = 0
        self.misses = 0
        self._for = 0.0
        self._against = 0.0

    def add(self, *, miss: bool) -> bool:
        """Take the outcome of a request; say whether `drifting` changed."""
        self.hits += not miss
        self.misses += miss
        step = _MISS if miss else _HIT
        if self.drifting:
            self._against = max(0.0, self._against - step)
            passed = self._against >= THRESHOLD
        else:
            self._for = max(0.0, self._for + step)
            passed = self._for >= THRESHOLD
        if passed:
            self.drifting = not self.drifting
            self._for = self._against = 0.0
        return passed
