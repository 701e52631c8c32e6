"""The closed loop around an index: what was routed, what was reused, and what both say beyond the index's answers."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from indexer import UNREACHABLE, Holding, Index, Prompt, Run, Source, tier_of
from scorer.errors import InvalidRequest
from scorer.observing import Heal, Observation, Observer, Prediction, Route, Tally
from scorer.shadow import Foresight
from scorer.speculation import Overlay

ROUTED_TTL_S = 5.0
"""Queueing and prefill of a long prompt take seconds; a request that takes longer has no cache to share soon."""

_FOLLOW_EVERY_S = 1.0


class Notes(NamedTuple):
    """What is known of a source beyond its holding."""

    speculative_blocks: int
    reason: str
    """Why it is called degraded by its errors, "" where it is not."""


class ClosedLoop:
    """See the module. All methods may be called from any thread."""

    def __init__(
        self,
        index: Index,
        block_size: int | None,
        *,
        ttl_s: float,
        heal: Heal | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not ttl_s > 0:
            raise InvalidRequest(f"routed_ttl_s: expected more than 0 seconds, got {ttl_s!r}")
        self._index = index
        self._block_size = block_size
        self._routed = Overlay(ttl_s, clock=clock)
        self._observer = Observer(heal, index.surplus, clock=clock)
        self._clock = clock
        self._lock = threading.Lock()
        self._follow_at = 0.0
        self._drifting: dict[Source, str] = {}

    @property
    def amends(self) -> bool:
        """Whether `amended` may say anything else than the index."""
        return bool(self._observer.shadows.followed)

    @property
    def notes_anything(self) -> bool:
        """Whether `notes_of` may say anything."""
        return bool(self._routed) or bool(self._drifting)

    @property
    def speculates(self) -> bool:
        """Whether requests are on their way."""
        return bool(self._routed)

    def amended(self, holdings: Sequence[Holding], prompt: Prompt, size: int) -> list[Holding]:
        """Put right what the index says of sources that evidently hold something else."""
        followed = self._observer.shadows.followed
        return [
            self._amend(holding, prompt, size, followed[holding.source]) if holding.source in followed else holding
            for holding in holdings
        ]

    def _amend(self, holding: Holding, prompt: Prompt, size: int, way: int) -> Holding:
        foreseen = self._foresee(holding, prompt, size)
        if foreseen is None or foreseen.blocks[way] == holding.tokens // size:
            return holding
        tokens = foreseen.blocks[way] * size
        reusable = min(tokens, max(0, prompt.length - 1) // size * size)
        return Holding(holding.source, tokens, reusable, _fitted(holding.runs, tokens), holding.degraded)

    def _foresee(self, holding: Holding, prompt: Prompt, size: int) -> Foresight | None:
        if holding.degraded.startswith(UNREACHABLE):
            return None
        keys = _keys_of(prompt, size)
        # what a request on its way uses will be there when the next one runs
        coming = self._routed.reach(holding.source, keys)
        spans = [(max(start, coming), end) for start, end in _spans_of(holding.runs, size)]
        return self._observer.shadows.foresee(holding.source, keys, holding.tokens // size, spans)

    def notes_of(self, source: Source, tokens: int, prompt: Prompt, size: int) -> Notes:
        """Say what is known of a source that holds so many tokens of a prompt."""
        blocks = 0
        if self._routed:
            keys = _keys_of(prompt, size)
            blocks = self._routed.run(source, keys, tokens // size)
        return Notes(blocks, self._drifting.get(source, ""))

    def routed(self, pod: str, rank: int | None, prompt: Prompt, size: int) -> bool:
        """Note that a prompt was sent to a pod; say no where the index does not know the pod."""
        prediction = self._predict(pod, rank, prompt, size)
        if prediction is None:
            return False
        keys = _keys_of(prompt, size)
        self._observer.expect(_route(pod, rank, keys, prompt), prediction)
        self._routed.add(prediction.source, keys)
        return True

    def observe(self, pod: str, rank: int | None, prompt: Prompt, size: int, cached_tokens: int) -> Observation:
        """Take what the engine reused of a prompt."""
        if not 0 <= cached_tokens <= prompt.length:
            raise InvalidRequest(
                f"cached_tokens: expected 0 to {prompt.length}, the length of the prompt, got {cached_tokens!r}"
            )
        self._follow()
        keys = _keys_of(prompt, size)
        prediction = self._observer.expected(_route(pod, rank, keys, prompt))
        comparable = True
        if prediction is not None:  # it has run: from now on events say what is there
            self._routed.discard(prediction.source, keys)
        if prediction is None:
            prediction = self._predict(pod, rank, prompt, size)
            if prediction is None:
                self._observer.unknown += 1
                return Observation(pod, rank or 0, 0, cached_tokens, 0, "unknown_pod", drifting=False)
            # nobody said what was known before the run; where the index has the whole prompt, it is from the run itself
            whole = prediction.told // size == max(0, prompt.length - 1) // size
            comparable = not (whole and prediction.told // size > cached_tokens // size)
        seen = self._observer.observe(
            prediction, cached_tokens, keys, size, length=prompt.length, comparable=comparable
        )
        if seen.drifting != (prediction.source in self._drifting):
            self._drifting = self._observer.drifting
        return seen

    def tallies(self) -> list[Tally]:
        """Give all that was observed, by source."""
        return self._observer.tallies()

    def stats(self) -> dict[str, int]:
        """Give counters and gauges; counters end in ``_total``."""
        return {
            "speculative_blocks": len(self._routed),
            "speculative_dropped_total": self._routed.dropped,
            "shadow_blocks": len(self._observer.shadows),
            "shadowed_sources": len(self._observer.shadows.followed),
            "unknown_pods_total": self._observer.unknown,
        }

    def _predict(self, pod: str, rank: int | None, prompt: Prompt, size: int) -> Prediction | None:
        told = self._index.match(prompt, block_size=self._block_size)
        holdings = self.amended(told, prompt, size) if self.amends else told
        mine = [
            (held, alone)
            for held, alone in zip(holdings, told, strict=True)
            if held.source.pod == pod and rank in (None, held.source.rank)
        ]
        if not mine:
            return None
        best, alone = max(mine, key=lambda both: both[0].tokens)
        elsewhere = max((held.reusable_tokens for held in holdings if held.source != best.source), default=0)
        speculative = size * self.notes_of(best.source, best.tokens, prompt, size).speculative_blocks
        foreseen = self._foresee(alone, prompt, size)
        return Prediction(best.source, best.reusable_tokens, elsewhere, speculative, alone.reusable_tokens, foreseen)

    def _follow(self) -> None:
        """Now and then, hear which sources are gone or began anew."""
        now = self._clock()
        with self._lock:
            if now < self._follow_at:
                return
            self._follow_at = now + _FOLLOW_EVERY_S
        self._observer.follow({status.source: status.incarnation for status in self._index.sources()})
        self._drifting = self._observer.drifting


def _route(pod: str, rank: int | None, keys: Sequence[int], prompt: Prompt) -> Route:
    return pod, rank, keys[-1] if keys else None, prompt.length


def _keys_of(prompt: Prompt, size: int) -> Sequence[int]:
    return prompt.keys(size, prompt.length)[: prompt.length // size]


def _spans_of(runs: Sequence[Run], size: int) -> list[tuple[int, int]]:
    """Give the ranges of blocks that lie on the first tier alone."""
    spans, start = [], 0
    for tokens, media in runs:
        if all(tier_of(medium) == "gpu" for medium in media):
            spans.append((start // size, (start + tokens) // size))
        start += tokens
    return spans


def _fitted(runs: Sequence[Run], tokens: int) -> tuple[Run, ...]:
    """Cut runs to that many tokens, or say that the first tier has what comes after them."""
    fitted = []
    for run in runs:
        if tokens > 0:
            fitted.append(Run(min(run.tokens, tokens), run.media))
        tokens -= run.tokens
    return (*fitted, Run(tokens, ("gpu",))) if tokens > 0 else tuple(fitted)
