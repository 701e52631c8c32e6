"""Pods divided among all builders of a shared index."""

import contextlib
import threading
from collections.abc import Mapping

import structlog

from indexer import IndexUnavailable, Leases
from kvevents import KVEventsError, SubscriptionError, discovery


class SharedPods:
    """Follows those of the wanted pods that are this builder's share, and gives up those that are not any more.

    Pods that only this builder was told of (`Found.shared` is false) are its own.
    """

    def __init__(self, subscriptions: discovery.Subscriptions, leases: Leases) -> None:
        self._subscriptions = subscriptions
        self._leases = leases
        self._wanted: Mapping[str, discovery.Found] = {}
        self._mine: set[str] = set()
        self._said: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvindex-leases", daemon=True)
        self._log = structlog.get_logger("kvindex")

    def start(self) -> None:
        """Keep the share from now on."""
        self._thread.start()

    def close(self) -> None:
        """Give all pods back to the other builders."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(IndexUnavailable):
            self._leases.quit(self._shared())
        self._leases.close()

    def update(self, wanted: Mapping[str, discovery.Found]) -> Mapping[str, SubscriptionError]:
        """Divide these pods from now on; give those of our share that cannot be followed, with the reason."""
        with self._lock:
            self._wanted = dict(wanted)
            return self._renew()

    def _run(self) -> None:
        while not self._stop.wait(self._leases.ttl_s / 3):
            with self._lock:
                try:
                    errors = [str(error) for error in self._renew().values()]
                except KVEventsError as error:
                    errors = [str(error)]
                if errors and errors != self._said:
                    self._log.error("not_subscribed", errors=errors)
                self._said = errors

    def _shared(self) -> list[str]:
        return sorted(name for name, found in self._wanted.items() if found.shared)

    def _renew(self) -> Mapping[str, SubscriptionError]:
        names = self._shared()
        try:
            mine = set(self._leases.share(names))
        except IndexUnavailable as error:
            # nobody can take pods over either; should they all the same, Redis refuses what we write of them
            self._log.warning("leases_not_renewed", error=str(error), pods=len(self._mine))
            mine = self._mine & set(names)
        if mine != self._mine:
            self._log.info("pods_shared", mine=len(mine), of=len(names))
        self._mine = mine
        followed = {name: found for name, found in self._wanted.items() if name in mine or not found.shared}
        return self._subscriptions.update(followed, keep=self._wanted)
