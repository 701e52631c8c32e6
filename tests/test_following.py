"""The index against simulated engines, in every dialect."""

import random

import pytest

from kvevents import EventPool, Message
from kvevents.testing import DIALECTS
from kvindex.engine import SimulatedEngine
from kvindex.fleet import on_the_wire
from scorer import PrefixScorer

from .conftest import payload


def prompts(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        prefix = [rng.randrange(3)] * rng.randrange(0, 24)
        yield prefix + [rng.randrange(3) for _ in range(rng.randrange(1, 12))]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_index_follows_the_engine(dialect, open_new):
    engine, index = SimulatedEngine(block_size=4, num_blocks=40), open_new()
    scorer = PrefixScorer(index)
    with EventPool(index) as pool:
        for seq, tokens in enumerate(prompts(300, 2)):
            events = engine.run(tokens, [1, 2, 1]).events if seq % 97 else engine.reset()
            pool.submit(Message(b"kv@a@m", seq, payload(*(on_the_wire(dialect, event, 4) for event in events))))
            if seq % 20 == 0:
                pool.drain()
                for asked in prompts(20, seq):
                    (match,) = scorer.match(asked, model="m")
                    assert match.blocks == engine.hit_blocks(asked)
                    assert match.trust == "exact"


@pytest.mark.parametrize("dialect", ["vllm-map", "vllm-array", "sglang"])
def test_salted_and_adapted_prompts_are_apart(dialect, open_new):
    engine, index = SimulatedEngine(block_size=4, num_blocks=100), open_new()
    tokens = list(range(12))
    events = (
        engine.run(tokens, [], lora_name="ad", cache_salt="s").events + engine.run(tokens, [], cache_salt="s").events
    )
    with EventPool(index) as pool:
        pool.submit(Message(b"kv@a@m", 0, payload(*(on_the_wire(dialect, event, 4) for event in events))))
        pool.drain()
    for lora in (None, "ad", "x"):
        for salt in (None, "s", "ad"):
            (match,) = PrefixScorer(index).match(tokens, model="m", lora_name=lora, cache_salt=salt)
            assert match.blocks == engine.hit_blocks(tokens, lora_name=lora, cache_salt=salt)
