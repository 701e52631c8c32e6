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
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from indexer import Source

MAX_KEYS = 524_288
"""Blocks remembered of all sources; about 100 MiB, which only pods that drift can fill."""
EVIDENCE = 256
"""Blocks seen to be there or not that say where the border lies."""
MAX_USES = 16_384
"""Requests of a source that are remembered."""
MEMORY = 200
"""Requests after which an error counts for a third of what it did."""
FEW = (2, 4, 8)
"""Where few removals are lost, the index says of few blocks too many that they are there: more than that are."""
CUTS, MORE = 0.75, 0.5
"""What the errors of a way to answer must be less than for it to be followed, as a share of those of the index: ways
that take blocks from its answers, and ways that add some."""
MARGIN = 0.5
"""Blocks by which they must be less than that."""
TRIED = 16
"""Requests, weighted like errors, that the index must have been wrong on before a way that adds blocks is followed."""
IDLE = 1_000
"""A shadow that was not followed for so many requests is dropped."""

_FADE = 1 - 1 / MEMORY
_SHARES = (1.0, CUTS, CUTS, *(CUTS for _ in FEW), MORE, MORE)


class Foresight(NamedTuple):
    """What may be said of a prompt, in leading blocks: by the index alone, and by a shadow in each of `Order.runs`."""

    blocks: tuple[int, ...]
    moment: int
    """When that was asked, in requests that were taken."""


class _Use:
    """One request that is remembered, and its blocks that no later one has used: always its last ones."""

    __slots__ = ("end", "keys", "left", "nameless")

    def __init__(self, keys: Sequence[int], *, nameless: bool) -> None:
        self.keys = keys
        self.nameless = nameless
        """Whether it took room for one more block: the one that was only begun, or a second copy of the last."""
        self.end = self.left = len(keys)

    def take_first(self) -> None:
        """Hear that the first block that was left was used again."""
        self.left -= 1
        if 2 * self.left < len(self.keys):
            self.keys = self.keys[len(self.keys) - self.left :]

    def after(self, number: int) -> int:
        """Give how many of these blocks are evicted after the one that is number so many in its prompt."""
        return number - (self.end - self.left)


class Order:
    """The blocks of one engine in the order of last use, and where in it the border lies. Not for several threads.

    The distance of a block is how many are evicted after it. Blocks of a prompt share their predecessors, so that a
    block was never used later than those before it, and distances grow along a prompt.
    """

    __slots__ = ("_border", "_last", "_seen", "_uses", "moment", "room")

    def __init__(self) -> None:
        self._uses: OrderedDict[int, _Use] = OrderedDict()
        self._last: dict[int, int] = {}
        """The moment at which a block was used last."""
        self._seen: deque[tuple[int, bool]] = deque(maxlen=EVIDENCE)
        """Distances of blocks, and whether they were there."""
        self._border = (0, 0)
        """The request of which a part is evicted, and how many of its blocks are not."""
        self.room: int | None = None
        """Distance from which on blocks are lost, None before any was seen to be."""
        self.moment = 0

    def __len__(self) -> int:
        return len(self._last)

    def take(self, keys: Sequence[int], reused: int, *, reusable: int, partial: bool, since: int) -> None:
        """Take a request for these blocks, and a part of one more if `partial`, that reused the first so many.

        Where that is fewer than are `reusable` the engine looked for one more and did not find it. `since` is the
        moment at which the request was sent: what others used later says nothing.
        """
        if reused:
            self._see(keys, reused - 1, since, there=True)
        if reused < reusable:
            self._see(keys, reused, since, there=False)
        nameless = partial or (reused == reusable < len(keys) and keys[-1] in self._last)
        self.moment += 1
        for key in keys:
            before = self._last.get(key)
            if before is not None:
                self._uses[before].take_first()
            self._last[key] = self.moment
        self._uses[self.moment] = _Use(keys, nameless=nameless)
        while len(self._uses) > MAX_USES:
            self.forget_oldest()
        self._fit()

    def _see(self, keys: Sequence[int], number: int, since: int, *, there: bool) -> None:
        moment = self._last.get(keys[number])
        if moment is None or moment > since:
            return
        distance = self._uses[moment].after(number)
        for later in reversed(self._uses):
            if later <= moment:
                break
            if later <= since:
                distance += self._uses[later].left + self._uses[later].nameless
        self._seen.append((distance, there))

    def _fit(self) -> None:
        """Put the border where it is in accord with the most of what was seen."""
        best = wrong = sum(there for _, there in self._seen)
        room, ordered = 0, sorted(self._seen)
        self.room = None if wrong == len(ordered) else ordered[0][0]
        for place, (distance, there) in enumerate(ordered):
            wrong += -1 if there else 1
            beyond = place + 1 == len(ordered)
            if wrong <= best and (beyond or ordered[place + 1][0] > distance):
                best, room = wrong, distance + 1 if beyond else ordered[place + 1][0]
                self.room = self.room if self.room is None else room
        self._border, nearer = (0, 0), 0
        for moment, use in reversed(self._uses.items()):
            if self.room is None:
                return
            if nearer + use.left > self.room:
                self._border = (moment, max(0, self.room - nearer))
                return
            nearer += use.left + use.nameless

    def _is_there(self, key: int, number: int, *, unknown: bool) -> bool:
        moment = self._last.get(key)
        if moment is None:
            return unknown
        border, left = self._border
        return moment > border or (moment == border and self._uses[moment].after(number) < left)

    def runs(self, keys: Sequence[int], held: int, spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Give how many leading blocks are there, where the index says so of the first `held`.

        `spans` are the ranges of these that lie nowhere but in what this is the order of. First what the index says;
        then that up to the first block that is lost; up to the first that is not known to be there, as what was not
        used since this began must be lost when anything is; and the same where that takes few blocks, see `FEW`. Last
        the first two, where they do not end sooner than the index, with the blocks after it that are there, as their
        events may be what was lost.
        """
        own = [number for span in spans for number in range(*span)]
        known = next((number for number in own if not self._is_there(keys[number], number, unknown=True)), held)
        sure = known
        if self.room is not None:
            sure = next((number for number in own if not self._is_there(keys[number], number, unknown=False)), held)
        end = held
        while end < len(keys) and self._is_there(keys[end], end, unknown=False):
            end += 1
        few = [sure if held - sure <= bound else held for bound in FEW]
        return held, known, sure, *few, end if known == held else known, end if sure == held else sure

    def forget_oldest(self) -> None:
        """Forget the request that is remembered the longest, with the blocks that it used last."""
        moment, use = self._uses.popitem(last=False)
        for key in use.keys:
            if self._last.get(key) == moment:
                del self._last[key]


class _Shadow:
    """The order of one source, and how well each way to answer has done."""

    __slots__ = ("errors", "idle", "order", "wrong")

    def __init__(self) -> None:
        self.order = Order()
        self.errors = [0.0] * len(_SHARES)
        self.wrong = 0.0
        self.idle = 0

    def best(self) -> int:
        """Give the way to answer that has been wrong the least; 0 is the index alone."""
        bounds = [share * self.errors[0] - MARGIN for share in _SHARES]
        ways = range(1, len(_SHARES) if self.wrong >= TRIED else len(_SHARES) - 2)
        good = [way for way in ways if self.errors[way] < bounds[way]]
        return min(good, key=self.errors.__getitem__, default=0)


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
        partial: bool,
        foreseen: Foresight | None,
        comparable: bool,
    ) -> None:
        """Take a request of a source that reused so many of the `reusable` first blocks; see `Order.take`.

        `foreseen` is what could be said before it ran; where that is not `comparable`, nobody is blamed. Nothing
        happens where the source is not watched.
        """
        with self._lock:
            shadow = self._shadows.get(source)
            if shadow is None:
                return
            if foreseen is not None and comparable:
                shadow.wrong = shadow.wrong * _FADE + (min(foreseen.blocks[0], reusable) != reused)
                for way, blocks in enumerate(foreseen.blocks):
                    shadow.errors[way] = shadow.errors[way] * _FADE + abs(min(blocks, reusable) - reused)
            order, before = shadow.order, len(shadow.order)
            since = order.moment if foreseen is None else foreseen.moment
            order.take(keys, reused, reusable=reusable, partial=partial, since=since)
            self._keys += len(order) - before
            way = shadow.best()
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
            before = len(order)
            while len(order) > before * 7 // 8:
                order.forget_oldest()
            self._keys -= before - len(order)
