"""Whether a service knows enough of its pods to be asked."""

from indexer import Index
from kvevents import EventPool, discovery


class Readiness:
    """Ready once every source of pods has answered and every pod is followed, or has had its time to answer.

    It stays ready then: a pod that is lost later, or comes later, is called degraded in answers, and must not take the
    whole service away from those who ask about the others.
    """

    def __init__(self, index: Index, pool: EventPool, followed: discovery.Follower) -> None:
        self._index = index
        self._pool = pool
        self._followed = followed
        self._was_ready = False

    def missing(self) -> dict[str, list[str]]:
        """Say what is waited for, nothing where it is ready. Raises `IndexUnavailable`."""
        self._index.sources()
        if self._was_ready:
            return {}
        if waiting := self._followed.waiting():
            return {"not_answered": waiting}
        awaited = self._pool.awaited()
        named = {"not_connected": "connection", "catching_up": "replay"}
        missing = {name: sorted(pod for pod, what in awaited.items() if what == kind) for name, kind in named.items()}
        self._was_ready = not awaited
        return {name: pods for name, pods in missing.items() if pods}
