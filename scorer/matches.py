"""What a scorer says of each rank of each pod."""

from collections.abc import Iterable, Mapping, Sequence

import msgspec


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
    speculative_blocks: int = 0
    """Blocks beyond `blocks` that requests lately sent there will have put there, see `PrefixScorer.routed`. Not in
    `tokens`, and in `score` only by `speculative_weight`."""
    speculative_tokens: int = 0
    """The same in tokens."""


def scores_of(matches: Sequence[PodMatch]) -> dict[str, float]:
    """Give the score of the best rank of each pod that holds at least the first block of a prompt."""
    scores: dict[str, float] = {}
    for match in matches:
        if (match.tokens or match.score) and match.score > scores.get(match.pod, -1.0):
            scores[match.pod] = match.score
    return scores


def sum_of_scores(answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Add up the scores of several prompts, highest first."""
    if len(answers) == 1:
        return dict(answers[0])
    total: dict[str, float] = {}
    for answer in answers:
        for pod, score in answer.items():
            total[pod] = total.get(pod, 0.0) + score
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def sum_of_matches(answers: Iterable[list[PodMatch]]) -> list[PodMatch]:
    """Add up the matches of several prompts, highest score first. A rank is exact where all of its answers are."""
    each = iter(answers)
    first = next(each, [])
    total: dict[tuple[str, int], PodMatch] = {}
    for match in (match for answer in each for match in answer):
        total = total or {(match.pod, match.rank): match for match in first}
        before = total.get((match.pod, match.rank))
        total[match.pod, match.rank] = match if before is None else _sum(before, match)
    return sorted(total.values(), key=lambda match: (-match.score, match.pod, match.rank)) if total else first


def _sum(one: PodMatch, other: PodMatch) -> PodMatch:
    return PodMatch(
        pod=one.pod,
        rank=one.rank,
        blocks=one.blocks + other.blocks,
        tokens=one.tokens + other.tokens,
        reusable_tokens=one.reusable_tokens + other.reusable_tokens,
        score=one.score + other.score,
        tiers={tier: one.tiers.get(tier, 0) + other.tiers.get(tier, 0) for tier in one.tiers | other.tiers},
        trust=max(one.trust, other.trust, key=lambda trust: trust != "exact"),
        reason=one.reason or other.reason,
        speculative_blocks=one.speculative_blocks + other.speculative_blocks,
        speculative_tokens=one.speculative_tokens + other.speculative_tokens,
    )
