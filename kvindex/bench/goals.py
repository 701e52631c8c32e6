"""The rows of the table: what each is called, its unit, and the project's floor and goal for it."""

from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table. Floor and goal are bounds in its unit: at least where more is better, else at most."""

    what: str
    unit: str
    more: bool = False
    """Whether more is better."""
    goal: float | None = None
    floor: float | None = None
    core_only: bool = True
    """Whether the goal is one for the compiled core and says nothing of plain Python."""

    def goal_holds(self, median: float, implementation: str) -> bool | None:
        """Say whether a figure reaches the goal; None where there is none for this implementation."""
        if self.core_only and implementation != "native":
            return None
        return self._reaches(self.goal, median)

    def floor_holds(self, median: float) -> bool | None:
        """Say whether a figure reaches the floor; None where there is none."""
        return self._reaches(self.floor, median)

    def _reaches(self, bound: float | None, median: float) -> bool | None:
        if bound is None:
            return None
        return median >= bound if self.more else median <= bound


HASH = "hash"
APPLY = "apply"
MATCH = "match"
SCORE = "score"
MEMORY = "memory"
SOCKET = "socket"
REDIS = "redis"

ROWS: dict[str, dict[str, Row]] = {
    HASH: {
        "hash": Row("hash tokens to block keys", "ns/block", goal=10),
        "hash_cold": Row("the same, tokens long out of the cache", "ns/block"),
        "hash_list": Row("the same, and keys as a list of numbers", "ns/block"),
    },
    APPLY: {
        "apply": Row("apply payload bytes, one worker", "M blocks/s", more=True, goal=7, floor=0.3),
        "apply_two": Row("apply payload bytes, two workers", "M blocks/s", more=True),
        "apply_scaling": Row("two workers against one", "times", more=True, goal=1.7),
        "cores_scaling": Row("what two cores are worth (hashing)", "times", more=True),
    },
    MATCH: {
        "match_p50": Row("match 2,048 blocks, p50", "us", goal=80),
        "match_p99": Row("match 2,048 blocks, p99", "us", goal=250),
        "match_pouring_p50": Row("the same while events pour in, p50", "us", goal=80),
        "match_pouring_p99": Row("the same while events pour in, p99", "us", goal=250),
    },
    SCORE: {
        "score_p50": Row("score 280 blocks, tokens to scores, p50", "us", goal=10),
        "score_p99": Row("score 280 blocks, tokens to scores, p99", "us"),
    },
    MEMORY: {
        "memory_shared": Row("memory, each chain on 8 pods", "bytes/pair", goal=48),
        "memory": Row("memory, each chain on one pod", "bytes/pair", goal=48),
    },
    SOCKET: {
        "visible_p50": Row("socket to visible in a score, p50", "ms"),
        "visible_p99": Row("socket to visible in a score, p99", "ms", goal=5, core_only=False),
        "visible_rate": Row("messages sent meanwhile, all pods", "1/s", more=True),
    },
    REDIS: {
        "redis_write": Row("Redis: write, one builder", "k blocks/s", more=True, goal=150, core_only=False),
        "redis_match_p50": Row("Redis: match 2,048 blocks, p50", "ms", goal=1.2, floor=5, core_only=False),
        "redis_match_p99": Row("Redis: match 2,048 blocks, p99", "ms"),
        "redis_memory": Row("Redis: memory that readers need", "bytes/pair", goal=16, core_only=False),
        "redis_memory_all": Row("Redis: memory with ledgers", "bytes/pair"),
    },
}
"""All rows, by measurement and by their names in JSON."""
