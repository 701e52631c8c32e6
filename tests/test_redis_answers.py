"""The index in Redis beside the one in this process: the same answers."""

import asyncio
from functools import partial

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from indexer import AsyncRedisReader, MemoryIndex, Prompt, RedisIndex, prompt

from .conftest import HAS_CORE, MODEL, NEEDS_REDIS, POD, blocks_in, stored
from .redis_fleet import Fleet, by_source, same_content, same_sources
from .redis_server import somewhere
from .test_differential import LIMITS, SEEDS, SOURCES, Twins, drive, question

pytestmark = NEEDS_REDIS
PROMPTS = [prompt.Prompt]
if HAS_CORE:
    from indexer import _native

    PROMPTS.append(_native.Prompt)


class RedisTwins(Twins):
    """An index in memory and one in Redis."""

    def __init__(self, url, limits=None):
        self.both = [MemoryIndex(limits), RedisIndex(url, limits)]
        self.log = []
        self.asked = 0

    def close(self):
        assert same_content(self.both[1], self.both[0]) or self.swept()
        for source in SOURCES:
            self.do("forget", (source.pod,))
        assert blocks_in(self.both[1]) == 0
        for index in self.both:
            index.close()

    def swept(self):
        while self.both[1].sweep():
            pass
        return same_content(self.both[1], self.both[0])

    def compare(self):
        stats, other = (index.stats() for index in self.both)
        assert {name: n for name, n in stats.items() if name not in ("bytes", "blocks")}.items() <= other.items()
        assert same_sources(self.both[1], self.both[0])
        return stats

    def ask(self, about, more, asked):
        self.asked += 1
        memory, redis = self.both
        answer = memory.match(prompt.Prompt(*about, **more), **asked)
        found = redis.match(PROMPTS[self.asked % len(PROMPTS)](*about, **more), **asked)
        assert by_source(answer) == by_source(found)
        for model in ("m", "n", "unknown"):
            self.do("block_size", (model,))
        return answer


@given(SEEDS, st.sampled_from(LIMITS))
@settings(max_examples=60, deadline=None)
def test_random_streams(redis_place, seeds, limits):
    seeds, twins = [seed for some in seeds for seed in some], RedisTwins(somewhere(redis_place), limits)
    try:
        for _ in drive(twins, seeds, 2):
            pass
    finally:
        note("\n".join(map(repr, twins.log)))
    twins.close()


@pytest.mark.parametrize("limits", LIMITS, ids=["wide", "silent tiers age", "tight"])
def test_long_streams_in_which_everything_happens(redis_url, limits):
    twins = RedisTwins(redis_url, limits)
    answers = list(drive(twins, range(1200), 1))
    assert {holding.degraded.partition(":")[0] for holding in answers} >= {"", "gap", "unplaced"}
    assert max(holding.tokens for holding in answers) >= (100 if limits is LIMITS[-1] else 200)
    assert not {twins.both[1].stats()[name] for name in ("write_failures_total", "rewritten_total")} - {0}
    twins.close()


def test_a_reader_that_asked_before_learns_of_images_without_a_place(redis_url):
    index, reader, images = RedisIndex(redis_url), RedisIndex(redis_url), [("cat", 0, 4)]
    index.register(POD, model=MODEL)
    index.apply(POD, [stored([1], range(4))])
    asked = partial(reader.match, Prompt(range(4), MODEL, mm_items=images))
    assert asked()[0].tokens == 0
    bare = stored([2], range(4), extras=prompt.image_extras(images, 4, range(1), bare=True), bare_images=True)
    index.apply(POD, [bare])
    assert asked()[0].tokens == 4


def test_an_event_loop_gets_the_same_answers(redis_url):
    fleet = Fleet(redis_url)
    fleet.live(60)

    async def ask():
        reader = AsyncRedisReader(redis_url)
        for _ in range(60):
            about, more, asked = question(fleet.rng)
            for made in PROMPTS:
                expected = by_source(fleet.memory.match(Prompt(*about, **more), **asked))
                assert by_source(await reader.match(made(*about, **more), **asked)) == expected
        await reader.close()
        await reader.close()

    asyncio.run(ask())
