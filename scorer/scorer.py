"""From what the sources hold of a prompt to scores."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import TypeAlias, TypedDict, Unpack

import msgspec

from indexer import ImageItem, Index, InvalidQuestion, Prompt, Run, Source, TokenIds, tier_of
from scorer.errors import InvalidRequest
from scorer.loop import ROUTED_TTL_S, ClosedLoop
from scorer.matches import PodMatch, scores_of
from scorer.observing import Heal, Observation, Tally
from scorer.prompts import Prompts
from scorer.questions import Questions

TIER_WEIGHTS: Mapping[str, float] = {"gpu": 1.0, "cpu": 0.8, "disk": 0.5, "shared": 0.3}
"""What a block is worth by where it lies, where the caller does not say."""

_BY_NAME, _BY_SCORE = attrgetter("pod", "rank"), attrgetter("score")

AT_ONCE_TOKENS = 4_096
"""Tokens of a prompt that is answered in less time than it takes to hand it to a thread and back, about."""

Asked: TypeAlias = "TokenIds | Prompt"
"""What a question is about: token ids, or a prompt that the caller keeps."""


class TokenOptions(TypedDict, total=False):
    """What decides, beside token ids, which cached blocks fit them."""

    model: str | None
    lora_name: str | int | None
    cache_salt: str | None
    mm_items: Sequence[ImageItem]


class PrefixScorer(Questions):
    """Says which pods hold how much of a prompt.

    `block_size` asks only for chains of blocks of that many tokens; without it every size in use is asked for, and
    blocks are counted in the size that most pods use. `tier_weights` changes weights by tier (``gpu``, ``cpu``,
    ``disk``, ``shared``) or by an engine's own word for a medium.

    Who says what he routed (`routed`) and what the engines reused (`observe`) closes the loop, see `docs/loop.md`.
    `routed_ttl_s` is how long what was routed counts, `speculative_weight` what such a block adds to a score: 0 unless
    asked for, as a score says what is there and a guess is not. `heal` corrects the index where observations prove it
    wrong: `EventPool.recount`, or None to measure only.

    `prompts` turns text and messages into tokens; without it there are no tokenizers.

    All methods may be called from any thread; they never change the index.
    """

    def __init__(
        self,
        index: Index,
        block_size: int | None = None,
        *,
        tier_weights: Mapping[str, float] | None = None,
        speculative_weight: float = 0.0,
        routed_ttl_s: float = ROUTED_TTL_S,
        heal: Heal | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        if block_size is not None and block_size < 1:
            raise InvalidRequest(f"block_size: expected at least 1, got {block_size}")
        for name, weight in (tier_weights or {}).items():
            if not weight >= 0:
                raise InvalidRequest(f"tier_weights[{name!r}]: expected a number of at least 0, got {weight!r}")
        if not speculative_weight >= 0:
            raise InvalidRequest(f"speculative_weight: expected a number of at least 0, got {speculative_weight!r}")
        self.prompts = prompts or Prompts()
        self._loop = ClosedLoop(index, block_size, ttl_s=routed_ttl_s, heal=heal)
        self._speculative_weight = speculative_weight
        self._index = index
        self._block_size = block_size
        self._weights = {**TIER_WEIGHTS, **{name.lower(): weight for name, weight in (tier_weights or {}).items()}}

    def __repr__(self) -> str:
        return f"PrefixScorer({self._index!r}, block_size={self._block_size})"

    def block_size(self, model: str) -> int:
        """Give the block size that answers for this model are counted in; 16 before the model's first event."""
        return self._block_size or self._index.block_size(model) or 16

    def answers_at_once(self, prompt: Prompt) -> bool:
        """Say whether an event loop may call `match` and `score` for this prompt itself.

        So it is where nobody else is waited for, as Redis is, and the prompt is short.
        """
        return prompt.length <= AT_ONCE_TOKENS and getattr(self._index, "never_waits", False)

    def match(
        self,
        token_ids: Asked,
        *,
        model: str | None = None,
        pods: Collection[str] | None = None,
        lora_name: str | int | None = None,
        cache_salt: str | None = None,
        mm_items: Sequence[ImageItem] = (),
        holders_only: bool = False,
    ) -> list[PodMatch]:
        """Say what each rank of each pod holds of a prompt, highest score first.

        Pods that hold nothing are in the answer with score 0, unless `holders_only`, which is the cheaper question to a
        large fleet. A pod whose state is not known says so in `trust`; pods asked for by name that nobody follows are
        left out. `mm_items` are (identifier, first token, number of tokens).

        Who asks again and again about a growing conversation gives a `Prompt` that he keeps and extends, in the place
        of `token_ids` and all that describes them: its start is hashed once.

        Raises `InvalidRequest` for values that are no token ids or items, and for tokens without a model.
        """
        prompt = _prompt_of(token_ids, model, lora_name, cache_salt, mm_items)
        amends, notes = self._loop.amends, self._loop.notes_anything
        leaves_out = holders_only and not amends and not notes  # what the loop knows of a pod may be all there is
        held = self._index.match(prompt, pods=_names_of(pods), block_size=self._block_size, holders_only=leaves_out)
        size = self.block_size(prompt.model)
        if amends:
            held = self._loop.amended(held, prompt, size)
        judge = _Judge(self._weights, size)
        matches = []
        runs_before, score, tiers = None, 0.0, dict[str, int]()
        for holding in held:
            (pod, rank), degraded, tokens, runs = holding.source, holding.degraded, holding.tokens, holding.runs
            if runs is not runs_before:  # most hold the same, as nothing
                score, tiers = judge.judge(runs)
                runs_before = runs
            trust = "degraded" if degraded else "exact"
            matches.append(
                PodMatch(
                    pod, rank, tokens // size, tokens, holding.reusable_tokens, score, tiers.copy(), trust, degraded
                )
            )
        if notes:
            matches = [self._noted(match, prompt, size) for match in matches]
        if holders_only and not leaves_out:
            matches = [match for match in matches if match.tokens or match.speculative_blocks]
        # twice without a function of ours for each is faster than once with one
        matches.sort(key=_BY_NAME)
        matches.sort(key=_BY_SCORE, reverse=True)
        return matches

    def _noted(self, match: PodMatch, prompt: Prompt, size: int) -> PodMatch:
        blocks, reason = self._loop.notes_of(Source(match.pod, match.rank), match.tokens, prompt, size)
        if not blocks and not reason:
            return match
        return msgspec.structs.replace(
            match,
            score=match.score + self._speculative_weight * blocks,
            trust="degraded" if reason else match.trust,
            reason=match.reason or reason,
            speculative_blocks=blocks,
            speculative_tokens=blocks * size,
        )

    def score(
        self,
        token_ids: Asked,
        *,
        model: str | None = None,
        pods: Collection[str] | None = None,
        lora_name: str | int | None = None,
        cache_salt: str | None = None,
        mm_items: Sequence[ImageItem] = (),
    ) -> dict[str, float]:
        """Give the score of each pod that holds at least the first block, that of its best rank, highest first.

        Takes what `match` takes and raises `InvalidRequest` as it does.
        """
        if self._loop.amends or (self._speculative_weight and self._loop.speculates):
            matches = self.match(
                token_ids, model=model, pods=pods, lora_name=lora_name, cache_salt=cache_salt, mm_items=mm_items
            )
            return scores_of(matches)
        prompt = _prompt_of(token_ids, model, lora_name, cache_salt, mm_items)
        held = self._index.match(prompt, pods=_names_of(pods), block_size=self._block_size, holders_only=True)
        judge = _Judge(self._weights, self.block_size(prompt.model))
        best: dict[str, float] = {}
        runs, score = None, 0.0
        for holding in held:
            if holding.runs is not runs:
                runs = holding.runs
                score, _ = judge.judge(runs)
            pod = holding.source[0]
            if score > best.get(pod, -1.0):
                best[pod] = score
        order = [(-score, pod) for pod, score in best.items()]
        order.sort()
        return {pod: -score for score, pod in order}

    def routed(
        self,
        pod: str,
        token_ids: Asked,
        *,
        model: str | None = None,
        rank: int | None = None,
        lora_name: str | int | None = None,
        cache_salt: str | None = None,
        mm_items: Sequence[ImageItem] = (),
    ) -> bool:
        """Say that a prompt is sent to a pod now; give whether the index knows the pod.

        For `routed_ttl_s` seconds matches report the prompt's blocks as `speculative_blocks` of the pod, and what was
        predicted is remembered until `observe`. Without a `rank` the one that holds the most is meant. The rest is as
        in `match`.
        """
        prompt = _prompt_of(token_ids, model, lora_name, cache_salt, mm_items)
        return self._loop.routed(pod, rank, prompt, self.block_size(prompt.model))

    def observe(
        self,
        pod: str,
        token_ids: Asked,
        *,
        cached_tokens: int,
        model: str | None = None,
        rank: int | None = None,
        lora_name: str | int | None = None,
        cache_salt: str | None = None,
        mm_items: Sequence[ImageItem] = (),
    ) -> Observation:
        """Say how many tokens of a prompt the engine really reused.

        vLLM says it as ``usage.prompt_tokens_details.cached_tokens``, with ``--enable-prompt-tokens-details``.
        Compared with what was predicted when the prompt was `routed`; without that, with what the index says now. Then
        an answer that covers the whole prompt is no evidence of a mistake, as the run itself may have put it there.
        The rest is as in `routed`. Raises `InvalidRequest` also where more is said to be reused than the prompt has.
        """
        prompt = _prompt_of(token_ids, model, lora_name, cache_salt, mm_items)
        return self._loop.observe(pod, rank, prompt, self.block_size(prompt.model), cached_tokens)

    def observations(self) -> list[Tally]:
        """Give what was observed so far of each source that is followed."""
        return self._loop.tallies()

    def stats(self) -> dict[str, int]:
        """Give counters and gauges of what was routed and observed; counters end in ``_total``."""
        return self._loop.stats()

    async def arouted(
        self, pod: str, token_ids: Asked, *, rank: int | None = None, **about: Unpack[TokenOptions]
    ) -> bool:
        """Do what `routed` does, without blocking the event loop."""
        return await asyncio.to_thread(self.routed, pod, token_ids, rank=rank, **about)

    async def aobserve(
        self,
        pod: str,
        token_ids: Asked,
        *,
        cached_tokens: int,
        rank: int | None = None,
        **about: Unpack[TokenOptions],
    ) -> Observation:
        """Do what `observe` does, without blocking the event loop."""
        return await asyncio.to_thread(self.observe, pod, token_ids, cached_tokens=cached_tokens, rank=rank, **about)

    async def amatch(
        self,
        token_ids: Asked,
        *,
        pods: Collection[str] | None = None,
        holders_only: bool = False,
        **about: Unpack[TokenOptions],
    ) -> list[PodMatch]:
        """Do what `match` does, without blocking the event loop."""
        return await asyncio.to_thread(self.match, token_ids, pods=pods, holders_only=holders_only, **about)

    async def ascore(
        self, token_ids: Asked, *, pods: Collection[str] | None = None, **about: Unpack[TokenOptions]
    ) -> dict[str, float]:
        """Do what `score` does, without blocking the event loop."""
        return await asyncio.to_thread(self.score, token_ids, pods=pods, **about)


class _Judge:
    """Says what runs of blocks are worth. The sources of one answer mostly share theirs, so each is judged once."""

    __slots__ = ("_known", "_size", "_weights")

    def __init__(self, weights: Mapping[str, float], size: int) -> None:
        self._weights = weights
        self._size = size
        self._known: dict[int, tuple[float, dict[str, int]]] = {}

    def judge(self, runs: tuple[Run, ...]) -> tuple[float, dict[str, int]]:
        """Give the score of some runs and their blocks by best tier. The runs must stay alive as long as the judge."""
        known = self._known.get(id(runs))
        if known is not None:
            return known
        tokens_by_tier: dict[str, int] = {}
        worth = 0.0
        for tokens, media in runs:
            medium = media[0] if len(media) == 1 else max(media, key=self._weight)
            worth += tokens * self._weight(medium)
            tier = tier_of(medium)
            tokens_by_tier[tier] = tokens_by_tier.get(tier, 0) + tokens
        size = self._size
        judged = self._known[id(runs)] = worth / size, {tier: n // size for tier, n in tokens_by_tier.items()}
        return judged

    def _weight(self, medium: str) -> float:
        weight = self._weights.get(medium)
        return self._weights[tier_of(medium)] if weight is None else weight


def _prompt_of(
    token_ids: Asked,
    model: str | None,
    lora_name: str | int | None,
    cache_salt: str | None,
    mm_items: Sequence[ImageItem],
) -> Prompt:
    if isinstance(token_ids, Prompt):
        if model not in (None, token_ids.model) or lora_name is not None or cache_salt is not None or mm_items:
            raise InvalidRequest("prompt: says its model, adapter, salt and items itself; give them to Prompt(...)")
        return token_ids
    if model is None:
        raise InvalidRequest("model: expected its name, got None")
    try:
        return Prompt(token_ids, model, lora_name=lora_name, cache_salt=cache_salt, mm_items=mm_items)
    except InvalidQuestion as error:
        raise InvalidRequest(str(error)) from error


def _names_of(pods: Collection[str] | None) -> Collection[str] | None:
    if isinstance(pods, str):
        raise InvalidRequest(f"pods: expected a list of names, got the text {pods!r}")
    return pods
