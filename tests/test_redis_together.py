"""Several writers and readers of one index in Redis at once."""

import asyncio
from collections import Counter
from contextlib import suppress
from functools import partial

from indexer import AllBlocksCleared, AsyncRedisReader, IndexUnavailable, MemoryIndex, Prompt, RedisIndex, Source

from . import test_threads as threads
from .conftest import MODEL, NEEDS_REDIS, blocks_in, stored
from .redis_fleet import begun, by_source, nothing_waits, same_content, same_sources, tokens_of

pytestmark = NEEDS_REDIS
TEXT = list(range(4 * 600))  # a prompt that is read in several rounds


def test_two_builders_race_on_the_same_blocks(redis_url, monkeypatch):
    monkeypatch.setattr(threads, "ROUNDS", 25)
    scripts = list(threads.SCRIPTS)
    builders = [begun(redis_url, scripts[part::2]) for part in range(2)]
    for source in threads.KEEPERS:
        builders[scripts.index(source) % 2].apply(source, [threads.chunk(0, 100)])
    writing, answered = list(scripts), []

    def write(source):
        try:
            threads.perform(builders[scripts.index(source) % 2], source)
        finally:
            writing.remove(source)

    def check(holdings):
        for source in threads.KEEPERS:
            assert holdings[source].tokens == 400
        for source, holding in holdings.items():
            if source not in threads.KEEPERS:
                assert holding.tokens <= 4 * threads.LEVELS.get(source, 0)

        answered.append(holdings)

    def read():
        reader = RedisIndex(redis_url)
        while writing:
            with suppress(IndexUnavailable):  # everything changes all the time
                check(by_source(reader.match(Prompt(threads.TOKENS, MODEL))))
            for builder in builders:
                builder.expire()

    async def read_in_a_loop():
        reader = AsyncRedisReader(redis_url)
        while writing:
            with suppress(IndexUnavailable):
                check(by_source(await reader.match(Prompt(threads.TOKENS, MODEL))))
        await reader.close()

    threads.together(*[partial(write, source) for source in scripts], read, lambda: asyncio.run(read_in_a_loop()))
    memory = MemoryIndex()
    for source in scripts:
        memory.register(source, model=MODEL)
    for source in threads.KEEPERS:
        memory.apply(source, [threads.chunk(0, 100)])
    for source in scripts:
        threads.perform(memory, source)
    while sum(builder.sweep() for builder in builders):
        pass
    assert answered
    assert nothing_waits(*builders)
    assert same_sources(builders[0], memory)
    assert same_content(builders[0], memory)


def test_readers_see_all_of_a_pod_or_nothing(redis_url):
    tokens = {"comes": TEXT, "decoy": [7] * len(TEXT)}
    index = begun(redis_url, [Source(pod) for pod in tokens])
    again = {pod: stored(range(600), text) for pod, text in tokens.items()}
    writing, seen = [True], Counter()

    def write():
        try:
            for number in range(60):
                for pod, event in again.items():  # each takes the slots that the other gave up
                    how = number % 3
                    if how == 0:
                        index.apply(Source(pod), [AllBlocksCleared(), event])
                        continue
                    if how == 1:
                        index.restart(Source(pod))
                    else:
                        index.forget(pod)
                        index.register(Source(pod), model=MODEL)
                    index.expire()
                    index.apply(Source(pod), [event])
        finally:
            writing.clear()

    def check(held):
        for pod, found in held.items():
            assert found in ((0, len(TEXT)) if pod == "comes" else (0,))
            seen[pod, found] += 1

    def read():
        reader = RedisIndex(redis_url)
        while writing:
            with suppress(IndexUnavailable):  # everything changes all the time
                check(tokens_of(reader, TEXT))

    async def read_in_a_loop():
        reader = AsyncRedisReader(redis_url)
        while writing:
            with suppress(IndexUnavailable):
                check({holding.source.pod: holding.tokens for holding in await reader.match(Prompt(TEXT, MODEL))})
        await reader.close()

    threads.together(write, read, lambda: asyncio.run(read_in_a_loop()))
    assert set(seen) == {("comes", 0), ("comes", len(TEXT)), ("decoy", 0)}
    assert blocks_in(index) == 1200
