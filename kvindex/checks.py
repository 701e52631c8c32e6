"""The doctor's checks in a service, all the time: as metrics, and as a log line when one changes."""

import threading
from collections.abc import Iterator

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from indexer import Index, IndexerError
from kvevents import EventPool, discovery
from kvindex.doctor.findings import Finding, is_trouble
from kvindex.doctor.fleet import CHECKS, judge_service
from kvindex.stats import Asked, Stats, collect

EVERY_S = 10.0
_FORGET_EVERY = 60
"""Looks after which names that were asked for are forgotten, so that one that was corrected is fine again."""


class Checks(Collector):
    """Looks at an index and a pool every `EVERY_S` seconds, once started. Also a collector of ``kvindex_check``.

    What counts is counted since the look before. `followed` are the pods that this process follows, if any;
    `block_size` is what questions are cut into where the configuration says it.
    """

    def __init__(
        self,
        index: Index,
        pool: EventPool,
        followed: discovery.Follower | None = None,
        *,
        block_size: int | None = None,
    ) -> None:
        self.asked = Asked()
        self._index = index
        self._pool = pool
        self._followed = followed
        self._block_size = block_size
        self._log = structlog.get_logger("kvindex")
        self._before: Stats | None = None
        self._noted: dict[str, Finding] = {}
        """What is not well, and could be better, by check."""
        self._looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvindex-checks", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking. May be called twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def stats(self) -> Stats:
        """Give all there is to know now. Raises `IndexUnavailable`."""
        pods = self._followed.pods() if self._followed is not None else {}
        return collect(self._index, self._pool, self.asked, pods, block_size=self._block_size)

    def look(self) -> list[Finding]:
        """Judge once, and log what changed; give what is wrong. Raises `IndexUnavailable`."""
        now = self.stats()
        findings = judge_service(now, self._before)
        self._before = now
        noted = {finding.check: finding for finding in reversed(findings) if finding.level != "ok"}
        for check, finding in noted.items():
            before = self._noted.get(check)
            # its numbers change all the time: what is new is another cause or another level
            if before is None or (before.level, before.cause) != (finding.level, finding.cause):
                log = {"bad": self._log.error, "warn": self._log.warning}.get(finding.level, self._log.info)
                log("check", check=check, what=finding.what, cause=finding.cause, remedy=finding.remedy)
        for check in sorted(self._noted.keys() - noted.keys()):
            self._log.info("check_ok", check=check)
        self._noted = noted
        self._looks += 1
        if self._looks % _FORGET_EVERY == 0:
            self.asked.forget()
        return [finding for finding in noted.values() if is_trouble(finding)]

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        troubles = {check for check, finding in self._noted.items() if is_trouble(finding)}
        family = GaugeMetricFamily("kvindex_check", "1 where `kvindex doctor` would complain", labels=["check"])
        for check in CHECKS:
            family.add_metric([check], check in troubles)
        yield family

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            try:
                self.look()
            except IndexerError as error:  # the index says so itself, and the next look may be better
                self._log.debug("check_skipped", error=str(error))
            except Exception as error:  # noqa: BLE001  (a defect of ours: the next look may be better, none at all is not)
                self._log.error("check_failed", error=repr(error))
