"""Which pod holds how much of a prompt, and what that is worth."""

from scorer.errors import InvalidRequest, NoTokenizer, ScorerError, TemplateFailed, Unavailable, numbered
from scorer.matches import PodMatch, scores_of
from scorer.messages import normalised
from scorer.observing import ERROR_BOUNDS, Heal, Observation, Outcome, Tally
from scorer.prefix_store import PrefixStats, PrefixStore
from scorer.prompts import Prompts, RemoteTokenizer, Rendered, Timings
from scorer.rendering import Renderer
from scorer.requests import MAX_PROMPTS, Body, ChatBody, Name, TokenBody, check_items, field_of
from scorer.scorer import TIER_WEIGHTS, PrefixScorer
from scorer.tokenizers import ModelSettings, Tokenizers

__all__ = [
    "ERROR_BOUNDS",
    "MAX_PROMPTS",
    "TIER_WEIGHTS",
    "Body",
    "ChatBody",
    "Heal",
    "InvalidRequest",
    "ModelSettings",
    "Name",
    "NoTokenizer",
    "Observation",
    "Outcome",
    "PodMatch",
    "PrefixScorer",
    "PrefixStats",
    "PrefixStore",
    "Prompts",
    "RemoteTokenizer",
    "Rendered",
    "Renderer",
    "ScorerError",
    "Tally",
    "TemplateFailed",
    "Timings",
    "TokenBody",
    "Tokenizers",
    "Unavailable",
    "check_items",
    "field_of",
    "normalised",
    "numbered",
    "scores_of",
]
