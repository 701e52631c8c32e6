"""How much is measured."""

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

Figures: TypeAlias = Mapping[str, float]
"""The figures of one round, by the names of their rows."""


class Scale(NamedTuple):
    """How large what is measured is, and how often."""

    rounds: int = 5
    pairs: int = 500_000
    """(block, pod) in the index."""
    questions: int = 300
    """Questions of a round, of each kind."""
    memory_pairs: int = 5_000_000
    socket_rounds: int = 3
    socket_s: float = 2.0
    """How long pods publish in a round."""
    redis_rounds: int = 3
    redis_pairs: int = 300_000


QUICK = Scale(
    rounds=2,
    pairs=200_000,
    questions=60,
    memory_pairs=200_000,
    socket_rounds=1,
    socket_s=0.5,
    redis_rounds=1,
    redis_pairs=20_000,
)
"""A few seconds in all; its figures are rough."""
