"""Messages that are missing are asked for again: a real publisher that loses some, and a pool that follows it."""

import socket
import time

import pytest

from indexer import Prompt, Source
from kvevents import EventPool, replays
from kvevents import recovery as recoveries
from kvevents.faults import Proxy
from kvevents.testing import Publisher, cleared, removed, stored

from .conftest import MODEL

POD = "pod-a"
SECONDS = 20


class Engine:
    """A cache whose blocks each hold four tokens, and what it says of them."""

    def __init__(self, **more):
        more = {"replay": "tcp://127.0.0.1:0"} | more
        self.publisher = Publisher("tcp://127.0.0.1:0", **more)
        self.held = {}
        self.names = 0

    def store(self, *, lost=False):
        self.names += 1
        self.held[self.names] = [self.names % 1000] * 4
        self.publisher.publish([stored("vllm-map", [self.names], None, self.held[self.names], 4)], lost=lost)

    def remove(self, name, *, lost=False):
        del self.held[name]
        self.publisher.publish([removed("vllm-map", [name])], lost=lost)

    def clear(self):
        self.held.clear()
        self.publisher.publish([cleared("vllm-map")])

    def restart(self):
        self.held.clear()
        self.publisher.restart()

    def follow(self, pool, pod=POD, **more):
        pool.subscribe(pod, self.publisher.endpoint, replay=self.publisher.replay, model=MODEL, **more)


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.publisher.close()


@pytest.fixture
def index(open_new):
    index = open_new()
    yield index
    index.close()


def status(index, pod=POD):
    found = [status for status in index.sources() if status.source == Source(pod)]
    return found[0] if found else None


def is_exact(index, engine, pod=POD):
    """Whether the index has what the engine has, and says so."""
    known = status(index, pod)
    if known is None or known.degraded or known.blocks != len(engine.held):
        return False
    for tokens in engine.held.values():
        if {h.source.pod: h.tokens for h in index.match(Prompt(tokens, MODEL))}[pod] != 4:
            return False
    return True


def until(true):
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@pytest.mark.parametrize("framing", ["new", "old"])
def test_who_comes_late_hears_all_of_it(index, framing):
    engine = Engine(framing=framing)
    for _ in range(300):
        engine.store()
    engine.remove(7)
    with EventPool(index) as pool:
        engine.follow(pool)
        until(lambda: is_exact(index, engine))
        engine.store()
        until(lambda: is_exact(index, engine))
        pool.drain()
        assert pool.stats()["gaps_total"] == 0
        assert pool.stats()["replays_total"] >= 1
    engine.publisher.close()


def test_a_pod_without_a_rank_0_is_not_taken_to_have_one(index):
    engine = Engine(rank=3)
    engine.store()
    with EventPool(index) as pool:
        engine.follow(pool)
        until(lambda: any(status.blocks for status in index.sources()))
        pool.drain()
        assert [(status.source, status.degraded) for status in index.sources()] == [(Source(POD, 3), "")]
    engine.publisher.close()


def test_what_could_not_be_used_is_held_against_a_pod_whose_messages_are_all_there(index, engine):
    with EventPool(index) as pool:
        engine.store()
        engine.publisher.publish([removed("vllm-map", ["no name"])])
        engine.follow(pool)
        until(lambda: status(index).degraded.startswith("unread"))
        engine.store(lost=True)
        engine.store()  # all is asked for and had again, that event too
        until(lambda: status(index).blocks == 3)
        pool.drain()
        assert status(index).degraded.startswith("unread")
        engine.restart()
        engine.store()
        until(lambda: is_exact(index, engine))


def test_an_engine_that_said_nothing_yet_is_known_to_hold_nothing(index, engine):
    with EventPool(index) as pool:
        engine.follow(pool)
        until(lambda: is_exact(index, engine))
        assert status(index).blocks == 0
        engine.store()
        until(lambda: is_exact(index, engine))


def test_lost_messages_are_had_again(index, engine):
    with EventPool(index) as pool:
        engine.follow(pool)
        until(lambda: is_exact(index, engine))
        engine.publisher.wait_for_subscribers()
        for number in range(200):
            if number % 7 == 3 and engine.held:
                engine.remove(next(iter(engine.held)), lost=number % 3 == 0)
            else:
                engine.store(lost=number % 5 == 0)
        engine.store()
        until(lambda: is_exact(index, engine))
        lost = sum(number % 3 == 0 if number % 7 == 3 else number % 5 == 0 for number in range(200))
        assert pool.stats()["gaps_total"] == 0
        assert lost <= pool.stats()["recovered_total"] <= 201
        assert pool.stats()["applied_total"] == 201


def test_the_last_messages_before_a_silence_are_had_again(index, engine, monkeypatch):
    monkeypatch.setattr(recoveries, "SILENCE_S", 0.2)
    with EventPool(index) as pool:
        engine.follow(pool)
        engine.store()
        until(lambda: is_exact(index, engine))
        engine.store(lost=True)
        engine.remove(1, lost=True)
        until(lambda: is_exact(index, engine))


@pytest.mark.parametrize("on_gap", ["keep", "drop"])
def test_what_nobody_has_any_more_is_a_gap(index, on_gap):
    engine = Engine(buffer_steps=3)
    with EventPool(index, on_gap=on_gap) as pool:
        engine.follow(pool)
        engine.publisher.wait_for_subscribers()
        engine.store()
        until(lambda: is_exact(index, engine))
        for number in range(10):
            engine.store(lost=number < 9)
        until(lambda: status(index).degraded.startswith("gap: messages were lost"))
        pool.drain()
        assert status(index).blocks == (4 if on_gap == "keep" else 3)
        engine.restart()
        engine.store()
        until(lambda: is_exact(index, engine))
    engine.publisher.close()


def test_an_engine_that_restarts_in_place(index, engine):
    with EventPool(index) as pool:
        engine.follow(pool)
        for count in (5, 3, 30, 1, 60):  # fewer than before, and more
            for _ in range(count):
                engine.store()
            until(lambda: is_exact(index, engine))
            engine.restart()
        until(lambda: is_exact(index, engine))
        assert status(index).blocks == 0


def test_a_publisher_that_answers_nothing(index, monkeypatch):
    monkeypatch.setattr(replays, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        engine = Engine()
        engine.store()
        with EventPool(index) as pool:
            pool.subscribe(
                POD, engine.publisher.endpoint, replay=f"tcp://127.0.0.1:{mute.getsockname()[1]}", model=MODEL
            )
            engine.publisher.wait_for_subscribers()
            engine.store()
            until(lambda: pool.stats()["replays_failed_total"] > 0 and status(index).blocks == 1)
            assert status(index).degraded
            pool.drain()
    engine.publisher.close()


def test_a_network_that_is_cut_and_stands_still(index, engine, monkeypatch):
    monkeypatch.setattr(replays, "ANSWER_S", 0.3)
    monkeypatch.setattr(recoveries, "COOL_DOWN_S", 0.1)
    places = [int(place.rpartition(":")[2]) for place in (engine.publisher.endpoint, engine.publisher.replay)]
    with Proxy("127.0.0.1", places[0]) as events, Proxy("127.0.0.1", places[1]) as again, EventPool(index) as pool:
        pool.subscribe(POD, f"tcp://127.0.0.1:{events.port}", replay=f"tcp://127.0.0.1:{again.port}", model=MODEL)
        for number in range(6):
            engine.store()
            until(lambda: is_exact(index, engine))
            if number % 2:
                again.stall()
            events.cut()
            engine.store()
            engine.remove(next(iter(engine.held)))
            again.resume()


def test_what_is_dropped_for_want_of_room_is_had_again(index, engine):
    for _ in range(2000):
        engine.store()
    with EventPool(index, workers=1, queue_messages=64) as pool:
        engine.follow(pool)
        for _ in range(2000):
            engine.store()
        until(lambda: is_exact(index, engine))


def test_a_pod_that_is_given_up_while_it_is_replayed(index, engine):
    for _ in range(3000):
        engine.store()
    with EventPool(index) as pool:
        for _ in range(5):
            engine.follow(pool)
            pool.unsubscribe(POD)
        assert status(index) is None
        engine.follow(pool)
        until(lambda: is_exact(index, engine))


def test_a_message_that_cannot_be_read_is_missed_until_the_cache_is_cleared(index, engine, monkeypatch):
    monkeypatch.setattr(recoveries, "SILENCE_S", 0.1)
    with EventPool(index) as pool:
        engine.follow(pool)
        engine.store()
        until(lambda: is_exact(index, engine))
        engine.publisher.send(b"\xc1")
        engine.store()
        until(lambda: status(index).blocks == 2 and status(index).degraded.startswith("gap"))
        asked = pool.stats()["replays_total"]
        until(lambda: pool.stats()["replays_total"] > asked + 1)
        pool.drain()
        assert status(index).degraded
        engine.clear()
        until(lambda: is_exact(index, engine))


def test_the_topic_of_a_replay_names_the_model(index, engine):
    engine.publisher.topic = b"kv@elsewhere@" + MODEL.encode()
    engine.store()
    with EventPool(index) as pool:
        pool.subscribe(POD, engine.publisher.endpoint, replay=engine.publisher.replay)
        until(lambda: is_exact(index, engine))
        assert status(index).model == MODEL


def test_a_filter_that_keeps_out_what_a_pod_publishes_is_found_by_its_replay(index, engine):
    engine.publisher.topic = b"kv@pod-a@m"
    engine.store()
    with EventPool(index) as pool:
        engine.follow(pool, topic="kv@")
        engine.follow(pool, pod="deaf", topic="nope")
        until(lambda: pool.unheard() == {"deaf": "kv@pod-a@m"})
        until(lambda: is_exact(index, engine))
        pool.unsubscribe("deaf")
        until(lambda: pool.unheard() == {})


def test_lag_is_of_what_came_by_itself(index, engine):
    for _ in range(3):
        engine.store()
    with EventPool(index) as pool:
        engine.follow(pool)
        until(lambda: is_exact(index, engine))
        (heard,) = pool.heard().values()
        assert (heard.messages, heard.live_at, heard.lag_s) == (3, None, None)
        engine.store()
        until(lambda: is_exact(index, engine))
        (heard,) = pool.heard().values()
        assert heard.messages == 4
        assert 0.0 <= heard.lag_s < 60.0
        assert heard.live_at <= heard.at
