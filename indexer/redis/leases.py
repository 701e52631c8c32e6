"""Which builder follows which pods, where several share an index in Redis."""

import os
from collections.abc import Sequence

from indexer.redis.opening import opened
from indexer.redis.scripts import QUIT, SHARE


class Leases:
    """One builder's share of some pods.

    Every builder calls `share` with the same pods, several times within `ttl_s`. Redis divides them in one step, by its
    own clock: a builder that does not call any more has none after `ttl_s`, one that is new has its share as soon as
    others gave theirs up. That two follow a pod for a moment does no harm: from the moment that the second registers
    it, Redis refuses what the first still writes.
    """

    def __init__(self, url: str, *, ttl_s: float = 3.0) -> None:
        self._store, self._layout = opened(url)
        self._me = os.urandom(8).hex()
        self.ttl_s = ttl_s

    def share(self, pods: Sequence[str]) -> list[str]:
        """Give the pods that are this builder's for the next `ttl_s`. Raises `IndexUnavailable`."""
        keys = (self._layout.builders, self._layout.leases)
        (mine,) = self._store.run([("EVAL", SHARE, 2, *keys, self._me, int(1000 * self.ttl_s), *pods)])
        return [pod.decode() for pod in mine]

    def quit(self, pods: Sequence[str]) -> None:
        """Give all pods back at once. Raises `IndexUnavailable`."""
        self._store.run([("EVAL", QUIT, 2, self._layout.builders, self._layout.leases, self._me, *pods)])

    def close(self) -> None:
        """Give the connection back. May be called twice."""
        self._store.close()
