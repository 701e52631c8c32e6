"""Whether a pod's answers drift from what its engine does: a test over the requests one after the other.

Cumulative sums (E. S. Page, "Continuous inspection schemes", Biometrika 1954). Each request shows a sign of drift or it
does not; the sum of log(likelihood of that where a pod drifts / where it is healthy), never below 0, marks the pod when
it passes a threshold. The same sum the other way round clears it.

Two signs are tested apart. A *miss* is any wrong prediction: an event that is late, or a block that is evicted while a
request waits, is a miss too, so that it takes many. A *proof* is a miss that only a lost removal explains, or nearly
(`scorer/observing.py`): a healthy pod shows next to none, so that two within about 60 requests are enough.
"""

from math import log

MISSES = (0.05, 0.25)
"""Share of misses of a pod whose events are late now and then, and of one whose index is wrong. Four in a row mark a
pod. By simulation, median of requests to the mark: 18 where three of ten are misses, 31 where two are, 4,432 where one
of twenty is, more than 20,000 where one of fifty is."""
PROOFS = (0.0005, 0.05)
"""The same for proofs."""
THRESHOLD = 6.0


class _Sum:
    """The test of one sign."""

    __slots__ = ("_height", "_no", "_yes", "passed")

    def __init__(self, healthy: float, drifting: float) -> None:
        self.passed = False
        self._yes = log(drifting / healthy)
        self._no = log((1 - drifting) / (1 - healthy))
        self._height = 0.0

    def add(self, *, sign: bool) -> None:
        step = self._yes if sign else self._no
        self._height = max(0.0, self._height + (-step if self.passed else step))
        if self._height >= THRESHOLD:
            self.passed = not self.passed
            self._height = 0.0


class DriftTest:
    """See the module. Not for use by several threads at once."""

    __slots__ = ("_misses", "_proofs")

    def __init__(self) -> None:
        self._misses = _Sum(*MISSES)
        self._proofs = _Sum(*PROOFS)

    @property
    def drifting(self) -> bool:
        """Whether the pod is marked."""
        return self._misses.passed or self._proofs.passed

    def add(self, *, miss: bool | None, proof: bool = False) -> bool:
        """Take the outcome of a request, None where it says nothing; say whether `drifting` changed."""
        before = self.drifting
        if miss is not None:
            self._misses.add(sign=miss)
        if miss is not None or proof:
            self._proofs.add(sign=proof)
        return self.drifting != before
