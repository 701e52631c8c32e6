"""How an engine's own prefix look-up uses its cache groups.

A model whose layers all see the whole prompt has one group, and a hit is the longest run of blocks from the start. A
hybrid model has more: a full-attention group needs every block from the start, a sliding-window group only the blocks
that its last window covers, and a hit is the longest prefix that every group can serve (vLLM
`v1/core/kv_cache_coordinator.py`, `v1/core/single_type_kv_cache_manager.py`).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class GroupSpec(NamedTuple):
    """What a cache group needs to serve a prefix."""

    block_size: int
    tail: int | None
    """How many blocks before the prefix's end must be there; None: all."""

    @classmethod
    def of(cls, kind: str | None, sliding_window: int | None, block_size: int) -> "GroupSpec":
        """Read what an event says of its group. Kinds that are not known need all blocks, which never overstates."""
        if kind is not None and kind.startswith("mamba"):
            return cls(block_size, 1)  # the last state stands for everything before it
        if sliding_window is not None and sliding_window > 0 and (kind is None or "sliding_window" in kind):
            return cls(block_size, max(1, math.ceil((sliding_window - 1) / block_size)))
        return cls(block_size, None)


class GroupBlocks(NamedTuple):
    """The blocks of a prompt that one group holds: spans of block numbers ``start <= i < end``, apart and in order."""

    spec: GroupSpec
    spans: Sequence[tuple[int, int]]

    def longest(self, tokens: int) -> int:
        """Give the longest prefix up to `tokens` that the group can serve, in tokens."""
        size, tail = self.spec
        limit = tokens // size
        if tail is None:
            if not self.spans or self.spans[0][0]:
                return 0
            return min(self.spans[0][1], limit) * size
        place = bisect_right(self.spans, (limit, 0))
        for start, stop in reversed(self.spans[:place]):
            end = min(stop, limit)
            if end - start >= min(tail, end):
                return end * size
        return 0


def longest_prefix(groups: Sequence[GroupBlocks], tokens: int) -> int:
    """Give the longest prefix up to `tokens`, in tokens, that all groups can serve."""
    step = math.lcm(*(group.spec.block_size for group in groups))
    length = tokens // step * step
    while length > 0:
        served = min(group.longest(length) for group in groups) // step * step
        if served == length:
            return length
        length = served
    return 0
