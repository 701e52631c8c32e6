"""An index of one's own behind the same contract: it keeps a journal of what was asked, and what the best answer was.

    index = JournalIndex(open_index("memory://"))
    pool, scorer = EventPool(index), PrefixScorer(index)

All that takes an `indexer.Index` takes this one. What it does itself is `match`; the rest it hands to another index.
"""

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from indexer import Copies, Events, Holding, Index, Prompt, Source, SourceStatus, open_index


class LookUp(NamedTuple):
    """One question and the most that a source held."""

    model: str
    asked_tokens: int
    held_tokens: int


class JournalIndex:
    """Remembers the last `size` look-ups of an index, for the share of prompts that could be reused anywhere."""

    def __init__(self, index: Index, size: int = 10_000) -> None:
        self._index = index
        self.journal: deque[LookUp] = deque(maxlen=size)

    def __repr__(self) -> str:
        return f"JournalIndex({self._index!r}, {len(self.journal)} look-ups)"

    def held_share(self, model: str) -> float:
        """Give the share of all tokens asked about that some source held."""
        asked = [one for one in list(self.journal) if one.model == model]
        return sum(one.held_tokens for one in asked) / max(1, sum(one.asked_tokens for one in asked))

    def match(
        self,
        prompt: Prompt,
        *,
        pods: Collection[str] | None = None,
        block_size: int | None = None,
        holders_only: bool = False,
    ) -> list[Holding]:
        """Say what each source holds of a prompt, and note it."""
        held = self._index.match(prompt, pods=pods, block_size=block_size, holders_only=holders_only)
        # appending to a deque is atomic: scorers ask from many threads
        self.journal.append(LookUp(prompt.model, prompt.length, max((one.tokens for one in held), default=0)))
        return held

    # What follows writes the index, or describes it: no business of a journal.

    @property
    def decoder(self) -> Any:  # noqa: ANN401  (between the index and its pool)
        """What reads payload frames for the index."""
        return self._index.decoder

    def register(
        self, source: Source, *, model: str, copies: Copies = "count", fleet_wide: bool = False, degraded: str = ""
    ) -> None:
        """Begin to follow a source."""
        self._index.register(source, model=model, copies=copies, fleet_wide=fleet_wide, degraded=degraded)

    def apply(self, source: Source, events: Events) -> None:
        """Apply events."""
        self._index.apply(source, events)

    def apply_all(self, source: Source, batches: Sequence[Events], *, last_seq: int | None = None) -> None:
        """Apply batches of events."""
        self._index.apply_all(source, batches, last_seq=last_seq)

    def restart(self, source: Source) -> None:
        """Forget what a source holds."""
        self._index.restart(source)

    def degrade(self, source: Source, reason: str) -> None:
        """Say why answers may be wrong."""
        self._index.degrade(source, reason)

    def recount(self, source: Source, keys: Collection[int]) -> bool:
        """Count one copy of blocks."""
        return self._index.recount(source, keys)

    def surplus(self, source: Source, keys: Collection[int]) -> int:
        """Say how many copies that would take."""
        return self._index.surplus(source, keys)

    def expire(self) -> None:
        """Drop what outlived its time."""
        self._index.expire()

    def forget(self, pod: str) -> None:
        """Stop following a pod."""
        self._index.forget(pod)

    def release(self, pod: str) -> None:
        """Leave a pod to somebody else."""
        self._index.release(pod)

    def block_size(self, model: str) -> int | None:
        """Give the block size of a model."""
        return self._index.block_size(model)

    def sources(self) -> list[SourceStatus]:
        """Describe all sources."""
        return self._index.sources()

    def stats(self) -> dict[str, int]:
        """Give counters and gauges."""
        return self._index.stats()

    def close(self) -> None:
        """Close the index."""
        self._index.close()


def open_journal(url: str, size: int = 10_000) -> Index:
    """Open an index with a journal. That it is declared as an `Index` has the type checker compare the two."""
    return JournalIndex(open_index(url), size)
