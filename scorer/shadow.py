"""What an engine still has, worked out from the requests that it ran: for pods whose events cannot be believed.

An engine evicts the block that was used longest ago, and of a finished request the last block first (vLLM's free queue,
`kvindex/engine.py`). So the order in which blocks are used says which is evicted next, and each request shows where in
that order the border lies: what it reused was there, and so was all that was used later; the first block that it
computed anew was gone, and so was all that was used earlier. How much lies on this side of the border is what the
engine has room for, in blocks that are seen here: requests that are not seen only make it look smaller.

This is presumption, not knowledge: it is kept here and nowhere else, any observation can overturn it, and answers
follow it only as long as it has lately been less wrong than the index.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from indexer import Source

MAX_KEYS = 524_288
"""Blocks remembered of all sources; about 100 MiB, which only pods that drift can fill."""
MEMORY = 200
"""Requests after which an error counts for a third of what it did."""
MARGIN = 0.5
"""Blocks by which the index's weighted errors must exceed those of the shadow for it to be followed."""
IDLE = 1_000
"""A shadow that was not followed for so many requests is dropped."""

_FADE = 1 - 1 / MEMORY
_WAYS = 5


class Foresight(NamedTuple):
    """What may be said of a prompt, in leading blocks: by the index alone, and by a shadow in each of `Order.runs`."""

    blocks: tuple[int, ...]
    moment: int
    """When that was asked, in requests that were taken."""


class Order:
    """The blocks of one engine in the order of last use, and where in it the border lies. Not for several threads."""

    __slots__ = ("alive", "lost", "moment", "room")

    def __init__(self) -> None:
        self.alive: OrderedDict[int, int] = OrderedDict()
        """Blocks that the engine has, the next to be evicted first, with the moment of their last use."""
        self.lost: OrderedDict[int, int] = OrderedDict()
        """Blocks that it has no more, the last to be evicted last. None of them was used after one of `alive`."""
        self.room: int | None = None
        """Blocks that fit, None before anything was seen to be evicted."""
        self.moment = 0

    def __len__(self) -> int:
        return len(self.alive) + len(self.lost)

    def take(self, keys: Sequence[int], reused: int, *, ended: bool, since: int) -> None:
        """Take a request for these blocks and a part of one, that reused the first so many.

        `ended` says that the engine looked for one more and did not find it. `since` is the moment at which the request
        was sent: what was used later than that may well have been gone when it ran.
        """
        for key in keys[:reused]:
            if key in self.lost:
                self._revive(key)
        if ended and self.alive.get(keys[reused], since + 1) <= since:
            self._lose(keys[reused])
        self.moment += 1
        self.alive[-self.moment] = self.moment  # the block that was begun takes room, too
        for key in reversed(keys):
            self.lost.pop(key, None)
            self.alive[key] = self.moment
            self.alive.move_to_end(key)
        while self.room is not None and len(self.alive) > self.room:
            self._evict()

    def _lose(self, key: int) -> None:
        while key in self.alive:
            self._evict()
        self.room = len(self.alive)

    def _evict(self) -> None:
        key, moment = self.alive.popitem(last=False)
        self.lost[key] = moment

    def _revive(self, key: int) -> None:
        while key in self.lost:
            name, moment = self.lost.popitem()
            self.alive[name] = moment
            self.alive.move_to_end(name, last=False)
        if self.room is not None:
            self.room = max(self.room, len(self.alive))

    def runs(self, keys: Sequence[int], held: int, spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Give how many leading blocks are there, where the index says so of the first `held`.

        `spans` are the ranges of these that lie nowhere but in what this is the order of. First what the index says;
        then that up to the first block that is lost, and that up to the first that is not alive, as one that was not
        used since this began must be lost when anything is; and both again, where they do not end sooner than the
        index, with the blocks after it that are alive, as their events may be what was lost.
        """
        own = [number for span in spans for number in range(*span)]
        known = next((number for number in own if keys[number] in self.lost), held)
        sure = known if self.room is None else next((n for n in own if keys[n] not in self.alive), held)
        end = held
        while end < len(keys) and keys[end] in self.alive:
            end += 1
        return held, known, sure, end if known == held else known, end if sure == held else sure

    def forget_oldest(self) -> None:
        """Forget the block that was used the longest ago."""
        (self.lost or self.alive).popitem(last=False)


class _Shadow:
    """The order of one source, and how well each way to answer has done."""

    __slots__ = ("errors", "idle", "order")

    def __init__(self) -> None:
        self.order = Order()
        self.errors = [0.0] * _WAYS
        self.idle = 0

    def best(self) -> int:
        """Give the way to answer that has been wrong the least; 0 is the index alone."""
        best = min(range(_WAYS), key=self.errors.__getitem__)
        return best if self.errors[best] + MARGIN < self.errors[0] else 0


class Shadows:
    """See the module; for any number of sources. All methods may be called from any thread."""

    def __init__(self, *, max_keys: int = MAX_KEYS) -> None:
        self._max = max_keys
        self._lock = threading.Lock()
        self._shadows: dict[Source, _Shadow] = {}
        self._followed: dict[Source, int] = {}
        self._keys = 0

    def __len__(self) -> int:
        """Give the number of blocks remembered."""
        return self._keys

    @property
    def followed(self) -> Mapping[Source, int]:
        """The sources for which answers should follow a shadow, and which number of a `Foresight` they should take."""
        return self._followed

    def begin(self, source: Source) -> None:
        """Watch the requests of a source from now on."""
        with self._lock:
            self._shadows.setdefault(source, _Shadow())

    def foresee(
        self, source: Source, keys: Sequence[int], held: int, spans: Sequence[tuple[int, int]]
    ) -> Foresight | None:
        """Give what `Order.runs` does; None where the source is not watched."""
        if source not in self._shadows:
            return None
        with self._lock:
            shadow = self._shadows.get(source)
            return None if shadow is None else Foresight(shadow.order.runs(keys, held, spans), shadow.order.moment)

    def take(
        self,
        source: Source,
        keys: Sequence[int],
        reused: int,
        *,
        reusable: int,
        foreseen: Foresight | None,
        comparable: bool,
        suspect: bool,
    ) -> None:
        """Take a request of a source that reused so many of the `reusable` first blocks.

        `foreseen` is what could be said before it ran; where that is not `comparable`, nobody is blamed. Only a
        `suspect` source is answered for by its shadow. Nothing happens where the source is not watched.
        """
        with self._lock:
            shadow = self._shadows.get(source)
            if shadow is None:
                return
            if foreseen is not None and comparable:
                for way, blocks in enumerate(foreseen.blocks):
                    shadow.errors[way] = shadow.errors[way] * _FADE + abs(min(blocks, reusable) - reused)
            order, before = shadow.order, len(shadow.order)
            since = order.moment if foreseen is None else foreseen.moment
            order.take(keys, reused, ended=reused < reusable, since=since)
            self._keys += len(order) - before
            way = shadow.best() if suspect else 0
            shadow.idle = 0 if way else shadow.idle + 1
            if shadow.idle > IDLE:
                self._drop(source)
            else:
                self._follow(source, way)
            if self._keys > self._max:
                self._shrink()

    def forget(self, source: Source) -> None:
        """Forget all about a source."""
        with self._lock:
            if source in self._shadows:
                self._drop(source)

    def _drop(self, source: Source) -> None:
        self._keys -= len(self._shadows.pop(source).order)
        self._follow(source, 0)

    def _follow(self, source: Source, way: int) -> None:
        if self._followed.get(source, 0) != way:
            rest = {other: its for other, its in self._followed.items() if other != source}
            self._followed = {**rest, source: way} if way else rest

    def _shrink(self) -> None:
        """Forget an eighth of all blocks, the oldest of the source that has the most first."""
        while self._keys > self._max * 7 // 8:
            order = max((shadow.order for shadow in self._shadows.values()), key=len)
            for _ in range(-(-len(order) // 8)):
                order.forget_oldest()
                self._keys -= 1
