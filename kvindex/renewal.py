"""Tokens and certificates that are exchanged in their files while they are used, as Kubernetes and cert-manager do."""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import structlog
from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvindex.errors import UserError

EVERY_S = 2.0
"""Seconds from one look at the files to the next."""

Renew: TypeAlias = Callable[[], bool]
"""Takes what is in the files now; says whether it is another than before. Raises `UserError` where it is of no use."""


class Renewal(Collector):
    """Looks at files every `EVERY_S` seconds, once started. What is of no use changes nothing, and is said once.

    `parts` has the section of the configuration that names the files, and who takes what is in them.
    """

    def __init__(self, parts: Mapping[str, Renew]) -> None:
        self._parts = parts
        self._wrong: dict[str, str] = {}
        """What is wrong with the files of a section now."""
        self._renewed = Counter(
            "kvindex_secrets_renewed_total",
            "Times that tokens or certificates were exchanged",
            ["section"],
            registry=None,
        )
        for section in parts:
            self._renewed.labels(section)
        self._log = structlog.get_logger("kvindex")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvindex-renewal", daemon=True)

    def start(self) -> None:
        """Begin to look, where there is anything to look at."""
        if self._parts:
            self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Look once."""
        for section, renew in self._parts.items():
            try:
                is_another = renew()
            except Exception as error:  # noqa: BLE001  (whatever it is, the next look may find it mended)
                reason = str(error) if isinstance(error, UserError) else repr(error)
                if self._wrong.get(section) != reason:
                    self._wrong[section] = reason
                    self._log.warning("secrets_kept", section=section, reason=reason)
                continue
            self._wrong.pop(section, None)
            if is_another:
                self._renewed.labels(section).inc()
                self._log.info("secrets_renewed", section=section)

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        yield from self._renewed.collect()
        wrong = GaugeMetricFamily(
            "kvindex_secrets_unusable",
            "1 where the files are of no use, and what was read before holds",
            labels=["section"],
        )
        for section in self._parts:
            wrong.add_metric([section], section in self._wrong)
        yield wrong

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.look()
