"""The pods of a configuration, divided among all builders of a shared index."""

import contextlib
import threading
from collections.abc import Callable, Sequence

import structlog

from indexer import IndexUnavailable, Leases
from kvevents import EventPool, KVEventsError
from kvindex.config import PodConfig


class SharedPods:
    """Subscribes the pods that are this builder's share, and gives up those that are not any more."""

    def __init__(
        self, pool: EventPool, leases: Leases, pods: Sequence[PodConfig], subscribe: Callable[[PodConfig], None]
    ) -> None:
        self._pool = pool
        self._leases = leases
        self._pods = pods
        self._names = sorted({pod.pod for pod in pods})
        self._subscribe = subscribe
        self._mine: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvindex-leases", daemon=True)
        self._log = structlog.get_logger("kvindex")

    def start(self) -> None:
        """Take a share now, and go on with that."""
        self._renew()
        self._thread.start()

    def close(self) -> None:
        """Give all pods back to the other builders."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(IndexUnavailable):
            self._leases.quit(self._names)
        self._leases.close()

    def _run(self) -> None:
        while not self._stop.wait(self._leases.ttl_s / 3):
            try:
                self._renew()
            except KVEventsError as error:
                self._log.error("not_subscribed", error=str(error))

    def _renew(self) -> None:
        try:
            mine = set(self._leases.share(self._names))
        except IndexUnavailable as error:
            # nobody can take pods over either; should they all the same, Redis refuses what we write of them
            self._log.warning("leases_not_renewed", error=str(error), pods=len(self._mine))
            return
        for name in sorted(self._mine - mine):
            self._pool.unsubscribe(name, keep=True)
        for pod in self._pods:
            if pod.pod in mine - self._mine:
                self._subscribe(pod)
        if mine != self._mine:
            self._log.info("pods_shared", mine=len(mine), of=len(self._names))
        self._mine = mine
