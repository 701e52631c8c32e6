"""A simulated pod whose events are lost now and then, and the scorer beside it."""

import random
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from indexer import BlockRemoved, BlockStored, Index, Source
from kvindex.engine import EngineEvent, Removed, Request, SimulatedEngine, Stored
from scorer import Observation, PrefixScorer

MODEL = "sim/model"
BLOCK = 16


class Losses(NamedTuple):
    """The share of events that never arrive; nobody can ask for them again."""

    removals: float = 0.0
    stores: float = 0.0


class Traffic(NamedTuple):
    """How a pod is used."""

    unseen: float = 0.0
    """The share of requests that others send it, which the scorer does not hear of."""
    generated: int = 0
    """Tokens of an answer, about."""
    at_once: int = 1
    """Requests that run at the same time and end in any order."""


class DriftingPod:
    """An engine that says less than it does. Its events reach the index at once, without a socket."""

    def __init__(self, index: Index, name: str, losses: Losses, *, num_blocks: int, seed: int = 0) -> None:
        self.source = Source(name)
        self.engine = SimulatedEngine(block_size=BLOCK, num_blocks=num_blocks, seed=seed)
        self.losses = losses
        self._index = index
        self._rng = random.Random(seed)
        index.register(self.source, model=MODEL)

    def request(self, scorer: PrefixScorer, prompt: Sequence[int], *, routed: bool = True) -> Observation:
        """Send a prompt here as a router does."""
        if routed:
            scorer.routed(self.source.pod, prompt, model=MODEL)
        ran = self.engine.run(prompt)
        self.hear(ran.events)
        return scorer.observe(self.source.pod, prompt, model=MODEL, cached_tokens=ran.cached_tokens)

    def serve(
        self, scorer: PrefixScorer, prompts: Iterator[list[int]], traffic: Traffic, *, seed: int
    ) -> Iterator[Observation]:
        """Send prompts here without end, and give what is observed of those that the scorer hears of."""
        rng = random.Random(seed)
        running: list[tuple[bool, list[int], Request]] = []
        while True:
            prompt, seen = next(prompts), rng.random() >= traffic.unseen
            if seen:
                scorer.routed(self.source.pod, prompt, model=MODEL)
            request = self.engine.begin(prompt)
            self.hear(request.events)
            request.events.clear()
            running.append((seen, prompt, request))
            if len(running) == traffic.at_once:
                seen, prompt, request = running.pop(rng.randrange(len(running)))
                answer = rng.choices(range(50_000), k=rng.randrange(2 * traffic.generated)) if traffic.generated else ()
                self.hear(self.engine.finish(request, answer))
                if seen:
                    yield scorer.observe(self.source.pod, prompt, model=MODEL, cached_tokens=request.cached_tokens)

    def hear(self, events: Sequence[EngineEvent]) -> None:
        """Apply what is not lost."""
        for event in events:
            if isinstance(event, Stored) and self._rng.random() >= self.losses.stores:
                told = BlockStored(
                    block_hashes=event.hashes,
                    parent_block_hash=event.parent,
                    token_ids=array("I", event.tokens),
                    block_size=BLOCK,
                )
                self._index.apply(self.source, [told])
            elif isinstance(event, Removed) and self._rng.random() >= self.losses.removals:
                self._index.apply(self.source, [BlockRemoved(block_hashes=[event.hash])])


def conversations(seed: int, *, count: int, blocks: int) -> Iterator[list[int]]:
    """Give prompts that come again and again in any order, some longer by a turn each time, up to twice as long."""
    rng = random.Random(seed)
    system = rng.choices(range(50_000), k=4 * BLOCK)

    def begin() -> list[int]:
        return system + rng.choices(range(50_000), k=rng.randrange(blocks // 2, blocks) * BLOCK)

    going = [begin() for _ in range(count)]
    while True:
        place = rng.randrange(count)
        yield going[place] + [7]
        going[place] = going[place] + rng.choices(range(50_000), k=rng.randrange(2 * BLOCK))
        if len(going[place]) > 2 * blocks * BLOCK:
            going[place] = begin()
