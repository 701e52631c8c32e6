"""The index in Redis behind a network that is slow, stands still for a while, or cuts connections."""

import asyncio
import random
import threading
from contextlib import suppress

import pytest

from indexer import IndexUnavailable, Prompt, RedisIndex
from indexer.redis.reader import AsyncRedisReader
from kvevents.faults import Proxy

from .conftest import MODEL, NEEDS_REDIS
from .redis_fleet import FLEET, Fleet, by_source, nothing_waits, same_content
from .test_differential import question

pytestmark = NEEDS_REDIS


@pytest.fixture
def proxy(own_server):
    """What lies between the index and the server."""
    with Proxy("127.0.0.1", own_server.port) as proxy:
        yield proxy


@pytest.fixture
def made(proxy):
    """What a test opens, to be closed after it."""
    made = []
    yield made
    for one in made:
        one.close()


@pytest.fixture
def open_fleet(proxy, made):
    """Opens a fleet whose builders and reader are behind the proxy."""

    def opened(timeout, builders=1):
        fleet = Fleet(through(proxy, timeout), builders)
        made.extend([*fleet.builders, fleet.reader])
        return fleet

    return opened


def through(proxy, timeout):
    return f"redis://127.0.0.1:{proxy.port}/0?timeout={timeout}"


def same_in_an_event_loop(fleet, url, questions=40):
    """Whether a reader in an event loop gives the answers of the memory index to questions asked all at once."""
    asked = [question(fleet.rng) for _ in range(questions)]

    async def ask():
        reader = AsyncRedisReader(url)
        matches = [reader.match(Prompt(*about, **more), **which) for about, more, which in asked]
        answers = await asyncio.gather(*matches)
        await reader.close()
        return answers

    expected = [fleet.memory.match(Prompt(*about, **more), **which) for about, more, which in asked]
    return list(map(by_source, asyncio.run(ask()))) == list(map(by_source, expected))


def same_beside_the_proxy(fleet, own_server):
    """Whether all is in Redis as in memory, and nothing else, seen by one who does not depend on the network."""
    index = RedisIndex(own_server.url)
    done = same_content(index, fleet.memory) and nothing_waits(*fleet.builders)
    index.close()
    return done


async def refused(url):
    reader = AsyncRedisReader(url)
    with pytest.raises(IndexUnavailable, match=r"127\.0\.0\.1"):
        await reader.match(Prompt(range(8), MODEL))
    await reader.close()


def test_a_slow_network_changes_no_answer(own_server, proxy, open_fleet):
    fleet = open_fleet(5, builders=2)
    proxy.delay(0.02)
    for _ in range(2):
        fleet.live(20)
        assert fleet.agree(10)
        assert same_in_an_event_loop(fleet, through(proxy, 5))
    assert not any(builder.stats()["write_failures_total"] for builder in fleet.builders)
    proxy.delay(0)
    fleet.settle()
    assert same_beside_the_proxy(fleet, own_server)


@pytest.mark.parametrize("direction", ["both", "there", "back"])
def test_a_stall_longer_than_the_timeout(own_server, proxy, open_fleet, direction):
    fleet = open_fleet(0.1, builders=2)
    for round_ in range(2):
        fleet.live(30)
        fleet.settle()
        proxy.stall(direction)
        with pytest.raises(IndexUnavailable, match=r"127\.0\.0\.1"):
            fleet.reader.match(Prompt(range(8), "m"))
        with pytest.raises(IndexUnavailable, match=r"127\.0\.0\.1"):
            fleet.reader.sources()
        asyncio.run(refused(through(proxy, 0.1)))
        fleet.live(30 * (round_ + 1))
        for builder in fleet.builders:
            builder.expire()
            assert builder.stats()["write_failures_total"]
        proxy.resume()
        fleet.settle()
        assert same_beside_the_proxy(fleet, own_server)
        assert same_in_an_event_loop(fleet, through(proxy, 5))


@pytest.mark.parametrize("seed", range(3))
def test_connections_that_are_cut_while_it_writes(own_server, proxy, open_fleet, seed):
    fleet, rng = open_fleet(5, builders=2), random.Random(seed)
    fleet.rng.seed(seed)
    fleet.live(20)
    stop = threading.Event()

    def cut():
        while not stop.wait(rng.choice([0.0, 0.001, 0.005, 0.02])):
            proxy.cut()

    def read():
        while not stop.is_set():
            with suppress(IndexUnavailable):
                assert isinstance(fleet.reader.match(Prompt(range(8), "m")), list)

    for _ in range(3):
        stop.clear()
        threads = [threading.Thread(target=cut), threading.Thread(target=read)]
        for thread in threads:
            thread.start()
        fleet.live(150)
        while not all(builder.stats()["write_failures_total"] for builder in fleet.builders):
            fleet.live(20)
        for builder in fleet.builders:
            builder.expire()
        stop.set()
        for thread in threads:
            thread.join()
        fleet.settle()
        assert same_beside_the_proxy(fleet, own_server)


def test_connections_that_are_refused_for_a_while(own_server, proxy, open_fleet):
    fleet = open_fleet(5)
    fleet.live(30)
    for _ in range(3):
        proxy.refuse()
        proxy.cut()
        with pytest.raises(IndexUnavailable, match="refused"):
            fleet.reader.match(Prompt(range(8), "m"))
        fleet.live(30)
        assert fleet.builders[0].stats()["write_failures_total"]
        proxy.accept()
        fleet.settle()
        assert same_beside_the_proxy(fleet, own_server)
    assert len(fleet.reader.sources()) == len(FLEET)
