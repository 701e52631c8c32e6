"""Which pod holds how much of a prompt, and what that is worth."""

from scorer.errors import InvalidRequest, ScorerError
from scorer.scorer import TIER_WEIGHTS, PodMatch, PrefixScorer, scores_of

__all__ = ["TIER_WEIGHTS", "InvalidRequest", "PodMatch", "PrefixScorer", "ScorerError", "scores_of"]
