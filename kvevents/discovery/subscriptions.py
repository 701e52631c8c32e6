"""The pods that are followed, made to be those that are wanted."""

from collections.abc import Collection, Mapping

import structlog

from kvevents.discovery.base import Found
from kvevents.errors import SubscriptionError
from kvevents.pool import EventPool


class Subscriptions:
    """Subscribes and unsubscribes what differs, and leaves all else alone. For one thread at a time."""

    def __init__(self, pool: EventPool) -> None:
        self._pool = pool
        self._log = structlog.get_logger("kvevents")
        self._followed: dict[str, Found] = {}

    def update(self, wanted: Mapping[str, Found], *, keep: Collection[str] = ()) -> dict[str, SubscriptionError]:
        """Follow these pods and no others; give those that cannot be followed, with the reason.

        What a pod that is no longer wanted holds is forgotten, but for those in `keep`, which others follow. A pod that
        comes back as another one (another endpoint, another uid) begins anew.
        """
        for name in sorted(self._followed.keys() - wanted.keys()):
            self._pool.unsubscribe(name, keep=name in keep)
            del self._followed[name]
            self._log.info("pod_left", pod=name)
        failed: dict[str, SubscriptionError] = {}
        for name, found in wanted.items():
            before = self._followed.get(name)
            if before == found:
                continue
            if before is not None:
                self._pool.unsubscribe(name)
                del self._followed[name]
            try:
                self._subscribe(name, found)
            except SubscriptionError as error:
                failed[name] = error
                continue
            self._followed[name] = found
            event = "pod_found" if before is None else "pod_replaced"
            self._log.info(event, pod=name, endpoints=found.ends(), uid=found.uid)
        return failed

    def _subscribe(self, name: str, found: Found) -> None:
        try:
            for one in found.endpoints:
                self._pool.subscribe(
                    name, one.endpoint, replay=one.replay, model=one.model, topic=one.topic, copies=one.copies
                )
        except SubscriptionError:
            # half a pod would answer for the whole of it
            self._pool.unsubscribe(name)
            raise
