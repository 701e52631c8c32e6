"""Pods that cannot be reached, and publishers that answer badly."""

from contextlib import contextmanager

import pytest

from indexer import UNREACHABLE, Prompt
from kvevents import EventPool, pool, replays
from kvevents import recovery as recoveries
from kvevents.faults import Proxy
from kvevents.testing import Publisher, stored
from scorer import PrefixScorer

from .conftest import MODEL
from .test_replay import POD, Engine, is_exact, status, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pool, "_EXPIRE_EVERY_S", 0.02)
    monkeypatch.setattr(recoveries, "COOL_DOWN_S", 0.05)


@pytest.fixture
def index(open_new):
    index = open_new()
    yield index
    index.close()


@contextmanager
def through_proxies(engine, pool, *, replay=True):
    """Follow an engine through a network that can be broken."""

    def port(endpoint):
        return int(endpoint.rpartition(":")[2])

    live = Proxy("127.0.0.1", port(engine.publisher.endpoint))
    again = Proxy("127.0.0.1", port(engine.publisher.replay))
    with live, again:
        pool.subscribe(POD, live.endpoint, replay=again.endpoint if replay else None, model=MODEL)
        yield live


def leave(live):
    live.refuse()
    live.cut()


def reason(index):
    return status(index).degraded


def test_a_pod_that_cannot_be_reached_is_not_scored_until_it_can(index):
    engine = Engine()
    with EventPool(index, pod_timeout_s=0.2) as pool, through_proxies(engine, pool) as live:
        engine.store()
        until(lambda: is_exact(index, engine))
        scorer = PrefixScorer(index)
        asked = next(iter(engine.held.values()))
        assert scorer.score(asked, model=MODEL) == {POD: 1.0}
        pool._pod_timeout_s = 1e6
        leave(live)
        until(lambda: not pool.connected()[POD])
        assert scorer.score(asked, model=MODEL) == {POD: 1.0}
        pool._pod_timeout_s = 0.001
        until(lambda: reason(index).startswith(UNREACHABLE))
        (match,) = scorer.match(asked, model=MODEL)
        assert (match.tokens, match.score, match.trust, match.reason) == (0, 0.0, "degraded", reason(index))
        assert scorer.score(asked, model=MODEL) == {}
        live.accept()
        engine.store()
        until(lambda: is_exact(index, engine))
        assert scorer.score(asked, model=MODEL) == {POD: 1.0}
        assert pool.stats()["unreachable_total"] == 1
    engine.publisher.close()


def test_what_it_held_is_forgotten_after_as_long_again(index):
    engine = Engine()
    with EventPool(index, pod_timeout_s=0.1) as pool, through_proxies(engine, pool) as live:
        engine.store()
        until(lambda: is_exact(index, engine))
        leave(live)
        until(lambda: status(index).blocks == 0)
        assert reason(index).startswith(UNREACHABLE)
        until(lambda: pool.stats()["forgotten_total"] == 1)
        engine.store()
        live.accept()
        until(lambda: is_exact(index, engine))
    engine.publisher.close()


def test_a_pod_that_was_never_there_says_so(index):
    with EventPool(index, pod_timeout_s=0.1) as pool:
        pool.subscribe(POD, "tcp://127.0.0.1:9", model=MODEL)
        until(lambda: reason(index).startswith(UNREACHABLE))


def test_without_replay_nobody_knows_what_was_said_while_the_connection_was_lost(index):
    engine = Engine()
    with EventPool(index) as pool, through_proxies(engine, pool, replay=False) as live:
        engine.publisher.wait_for_subscribers()
        engine.store()
        until(lambda: is_exact(index, engine))
        live.cut()
        until(lambda: reason(index).startswith("unsure"))

        def is_heard():
            engine.store()  # the first may still go to the connection that was cut, as its proxy ends that later
            return status(index).blocks > 1

        until(is_heard)
        assert reason(index).startswith("unsure")
        engine.clear()
        until(lambda: is_exact(index, engine))
    engine.publisher.close()


def test_a_pod_that_came_by_itself_and_is_silent_for_long(index):
    with EventPool(index, silent_timeout_s=0.1) as pool:
        endpoint = pool.bind("tcp://127.0.0.1:0", model=MODEL)
        with Publisher(endpoint, topic=f"kv@{POD}@{MODEL}".encode(), connect=True) as publisher:
            publisher.wait_for_subscribers()
            publisher.publish([stored("vllm-map", [1], None, [1, 2, 3, 4], 4)])
            until(lambda: status(index) is not None)
            until(lambda: reason(index).startswith(UNREACHABLE))
            assert index.match(Prompt([1, 2, 3, 4], MODEL), holders_only=True) == []
            until(lambda: status(index) is None)
            publisher.publish([stored("vllm-map", [2], 1, [5, 6, 7, 8], 4)])
            until(lambda: status(index) is not None and reason(index).startswith("gap"))


@pytest.mark.parametrize("most", [0, 1, 7])
def test_a_publisher_that_answers_half(index, monkeypatch, most):
    monkeypatch.setattr(replays, "ANSWER_S", 0.3)
    engine = Engine()
    for _ in range(10):
        engine.store()
    engine.publisher.answers_at_most = most
    with EventPool(index) as pool:
        engine.follow(pool)
        until(lambda: pool.stats()["replays_failed_total"] > 1)
        assert status(index).degraded
        engine.publisher.answers_at_most = None
        until(lambda: is_exact(index, engine))
    engine.publisher.close()


def test_a_publisher_that_answers_late_and_forgets(index):
    engine = Engine()
    for _ in range(10):
        engine.store()
    engine.publisher.answer_delay_s = 0.2
    with EventPool(index) as pool:
        engine.follow(pool)
        until(lambda: is_exact(index, engine))
        engine.publisher.buffer_steps = 2
        for _ in range(4):
            engine.store(lost=True)
        engine.store()
        until(lambda: status(index).degraded.startswith("gap"))
    engine.publisher.close()


def test_restarts_are_told_from_what_is_read_anew(index):
    engine = Engine()
    with EventPool(index) as pool:
        engine.follow(pool)
        engine.store()
        until(lambda: is_exact(index, engine))
        engine.restart()
        engine.store()
        until(lambda: is_exact(index, engine))
        stats = pool.stats()
        assert (stats["restarts_total"], stats["rebuilds_total"]) == (1, 0)
    engine.publisher.close()


@pytest.mark.parametrize("name", ["pod_timeout_s", "silent_timeout_s"])
def test_timeouts_are_more_than_nothing(index, name):
    with pytest.raises(ValueError, match=name):
        EventPool(index, **{name: 0})
