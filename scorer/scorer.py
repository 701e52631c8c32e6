"""From what the sources hold of a prompt to scores."""

import asyncio
from collections.abc import Collection, Mapping, Sequence

import msgspec

from indexer import Holding, ImageItem, Index, InvalidQuestion, Prompt, TokenIds, tier_of
from scorer.errors import InvalidRequest

TIER_WEIGHTS: Mapping[str, float] = {"gpu": 1.0, "cpu": 0.8, "disk": 0.5, "shared": 0.3}
"""What a block is worth by where it lies, where the caller does not say."""


class PodMatch(msgspec.Struct, frozen=True, gc=False):
    """How much of a prompt one rank of a pod holds."""

    pod: str
    rank: int
    blocks: int
    """Leading blocks held without a gap, on any tier."""
    tokens: int
    """The same in tokens."""
    reusable_tokens: int
    """What the engine can reuse of them: it always computes at least the last token of a prompt."""
    score: float
    """The blocks, each weighted by the best tier that holds it."""
    tiers: dict[str, int]
    """The blocks by best tier."""
    trust: str
    """``exact``, or ``degraded``: then `reason` says why."""
    reason: str = ""


class PrefixScorer:
    """Says which pods hold how much of a prompt.

    `block_size` asks only for chains of blocks of that many tokens; without it every size in use is asked for, and
    blocks are counted in the size that most pods use. `tier_weights` changes weights by tier (``gpu``, ``cpu``,
    ``disk``, ``shared``) or by an engine's own word for a medium.

    All methods may be called from any thread; they never change the index.
    """

    def __init__(
        self, index: Index, block_size: int | None = None, *, tier_weights: Mapping[str, float] | None = None
    ) -> None:
        if block_size is not None and block_size < 1:
            raise InvalidRequest(f"block_size: expected at least 1, got {block_size}")
        for name, weight in (tier_weights or {}).items():
            if not weight >= 0:
                raise InvalidRequest(f"tier_weights[{name!r}]: expected a number of at least 0, got {weight!r}")
        self._index = index
        self._block_size = block_size
        self._weights = {**TIER_WEIGHTS, **{name.lower(): weight for name, weight in (tier_weights or {}).items()}}

    def __repr__(self) -> str:
        return f"PrefixScorer({self._index!r}, block_size={self._block_size})"

    def block_size(self, model: str) -> int:
        """Give the block size that answers for this model are counted in; 16 before the model's first event."""
        return self._block_size or self._index.block_size(model) or 16

    def match(
        self,
        token_ids: TokenIds,
        *,
        model: str,
        pods: Collection[str] | None = None,
        lora_name: str | int | None = None,
        cache_salt: str | None = None,
        mm_items: Sequence[ImageItem] = (),
    ) -> list[PodMatch]:
        """Say what each rank of each pod holds of a prompt, highest score first.

        Pods that hold nothing are in the answer with score 0. A pod whose state is not known says so in `trust`; pods
        asked for by name that nobody follows are left out. `mm_items` are (identifier, first token, number of tokens).

        Raises `InvalidRequest` for values that are no token ids or items.
        """
        held = self._ask(token_ids, model, pods, lora_name, cache_salt, mm_items)
        size = self.block_size(model)
        matches = [self._judge(holding, size) for holding in held]
        matches.sort(key=lambda match: (-match.score, match.pod, match.rank))
        return matches

    def score(
        self,
        token_ids: TokenIds,
        *,
        model: str,
        pods: Collection[str] | None = None,
        lora_name: str | int | None = None,
        cache_salt: str | None = None,
        mm_items: Sequence[ImageItem] = (),
    ) -> dict[str, float]:
        """Give the score of each pod that holds at least the first block, that of its best rank, highest first.

        Raises `InvalidRequest` as `match` does.
        """
        return scores_of(
            self.match(token_ids, model=model, pods=pods, lora_name=lora_name, cache_salt=cache_salt, mm_items=mm_items)
        )

    async def amatch(
        self,
        token_ids: TokenIds,
        *,
        model: str,
        pods: Collection[str] | None = None,
        lora_name: str | int | None = None,
        cache_salt: str | None = None,
        mm_items: Sequence[ImageItem] = (),
    ) -> list[PodMatch]:
        """Do what `match` does, without blocking the event loop."""
        return await asyncio.to_thread(
            self.match,
            token_ids,
            model=model,
            pods=pods,
            lora_name=lora_name,
            cache_salt=cache_salt,
            mm_items=mm_items,
        )

    async def ascore(
        self,
        token_ids: TokenIds,
        *,
        model: str,
        pods: Collection[str] | None = None,
        lora_name: str | int | None = None,
        cache_salt: str | None = None,
        mm_items: Sequence[ImageItem] = (),
    ) -> dict[str, float]:
        """Do what `score` does, without blocking the event loop."""
        matches = await self.amatch(
            token_ids, model=model, pods=pods, lora_name=lora_name, cache_salt=cache_salt, mm_items=mm_items
        )
        return scores_of(matches)

    def _ask(
        self,
        token_ids: TokenIds,
        model: str,
        pods: Collection[str] | None,
        lora_name: str | int | None,
        cache_salt: str | None,
        mm_items: Sequence[ImageItem],
    ) -> list[Holding]:
        if isinstance(pods, str):
            raise InvalidRequest(f"pods: expected a list of names, got the text {pods!r}")
        try:
            prompt = Prompt(token_ids, model, lora_name=lora_name, cache_salt=cache_salt, mm_items=mm_items)
        except InvalidQuestion as error:
            raise InvalidRequest(str(error)) from error
        return self._index.match(prompt, pods=pods, block_size=self._block_size)

    def _judge(self, holding: Holding, size: int) -> PodMatch:
        tokens_by_tier: dict[str, int] = {}
        worth = 0.0
        for run in holding.runs:
            medium = max(run.media, key=self._weight)
            worth += run.tokens * self._weight(medium)
            tier = tier_of(medium)
            tokens_by_tier[tier] = tokens_by_tier.get(tier, 0) + run.tokens
        return PodMatch(
            pod=holding.source.pod,
            rank=holding.source.rank,
            blocks=holding.tokens // size,
            tokens=holding.tokens,
            reusable_tokens=holding.reusable_tokens,
            score=worth / size,
            tiers={tier: tokens // size for tier, tokens in tokens_by_tier.items()},
            trust="degraded" if holding.degraded else "exact",
            reason=holding.degraded,
        )

    def _weight(self, medium: str) -> float:
        weight = self._weights.get(medium)
        return self._weights[tier_of(medium)] if weight is None else weight


def scores_of(matches: Sequence[PodMatch]) -> dict[str, float]:
    """Give the score of the best rank of each pod that holds at least the first block of a prompt."""
    scores: dict[str, float] = {}
    for match in matches:
        if match.tokens and match.score > scores.get(match.pod, -1.0):
            scores[match.pod] = match.score
    return scores
