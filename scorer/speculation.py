"""Blocks that a pod will have soon, because a request for them is on its way there.

Between the choice of a pod and the engine's event lie queueing and prefill; requests that come meanwhile would be sent
elsewhere. What is noted here is a guess with a short life: it is never stored in the index, and reported apart.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from indexer import Source

MAX_BLOCKS = 262_144
"""About 32 MiB."""


class Overlay:
    """Block keys of sources, each for `ttl_s` seconds, `max_blocks` in all.

    Over the bound the oldest blocks of the source that was added to the longest ago go first. All methods may be called
    from any thread; each takes time in proportion to the blocks it is given or finds.
    """

    def __init__(
        self, ttl_s: float, *, max_blocks: int = MAX_BLOCKS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl = ttl_s
        self._max = max_blocks
        self._clock = clock
        self._lock = threading.Lock()
        self._until: OrderedDict[Source, OrderedDict[int, float]] = OrderedDict()
        self._blocks = 0
        self.dropped = 0
        """Blocks that had to go before their time."""

    def __len__(self) -> int:
        """Give the number of blocks, some of which may have outlived their time."""
        return self._blocks

    def add(self, source: Source, keys: Sequence[int]) -> None:
        """Note blocks of a source; those that are there already live on for a whole `ttl_s`."""
        if not keys:
            return
        now = self._clock()
        with self._lock:
            mine = self._until.setdefault(source, OrderedDict())
            self._until.move_to_end(source)
            before = len(mine)
            for key in keys:
                mine[key] = now + self._ttl
                mine.move_to_end(key)
            self._blocks += len(mine) - before
            self._drop_expired(now)
            while self._blocks > self._max:
                self._drop_first(next(iter(self._until)))
                self.dropped += 1

    def discard(self, source: Source, keys: Sequence[int]) -> None:
        """Forget blocks of a source. Unknown ones are fine."""
        with self._lock:
            mine = self._until.get(source)
            if mine is not None:
                self._blocks -= sum(mine.pop(key, None) is not None for key in keys)
                if not mine:
                    del self._until[source]

    def refresh(self, source: Source, keys: Sequence[int]) -> None:
        """Let the blocks of a source that are there live on for a whole `ttl_s`."""
        now = self._clock()
        with self._lock:
            mine = self._until.get(source)
            there = [] if mine is None else [key for key in keys if mine.get(key, 0.0) > now]
        if there:
            self.add(source, there)

    def forget(self, source: Source) -> None:
        """Forget all blocks of a source."""
        with self._lock:
            self._blocks -= len(self._until.pop(source, ()))

    def run(self, source: Source, keys: Sequence[int], start: int) -> int:
        """Give how many of the keys from number `start` on, without a gap, are noted for a source."""
        if source not in self._until:
            return 0
        now = self._clock()
        with self._lock:
            mine = self._until.get(source)
            if mine is None:
                return 0
            number = start
            while number < len(keys) and mine.get(keys[number], 0.0) > now:
                number += 1
            self._drop_expired(now)
            return number - start

    def reach(self, source: Source, keys: Sequence[int]) -> int:
        """Give how many of the keys there are up to the last one that is noted for a source."""
        now = self._clock()
        with self._lock:
            mine = self._until.get(source, OrderedDict())
            return next((number for number in range(len(keys), 0, -1) if mine.get(keys[number - 1], 0.0) > now), 0)

    def _drop_expired(self, now: float) -> None:
        """Drop what outlived its time of the source that was added to the longest ago, if it has any."""
        while self._until:
            source, mine = next(iter(self._until.items()))
            if next(iter(mine.values())) > now:
                return
            self._drop_first(source)

    def _drop_first(self, source: Source) -> None:
        mine = self._until[source]
        mine.popitem(last=False)
        self._blocks -= 1
        if not mine:
            del self._until[source]
