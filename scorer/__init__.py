"""Which pod holds how much of a prompt, and what that is worth."""

from scorer.errors import InvalidRequest, NoTokenizer, ScorerError
from scorer.observing import ERROR_BOUNDS, Heal, Observation, Outcome, Tally
from scorer.scorer import TIER_WEIGHTS, PodMatch, PrefixScorer, scores_of

__all__ = [
    "ERROR_BOUNDS",
    "TIER_WEIGHTS",
    "Heal",
    "InvalidRequest",
    "NoTokenizer",
    "Observation",
    "Outcome",
    "PodMatch",
    "PrefixScorer",
    "ScorerError",
    "Tally",
    "scores_of",
]
