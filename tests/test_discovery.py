"""Pods that come and go: the follower, a real pool behind it, and pods that are told over HTTP."""

import contextlib
import threading

import pytest
from litestar.testing import TestClient

from indexer import Source, open_index
from kvevents import DiscoveryError, EventPool, PodTaken, SubscriptionError
from kvevents.discovery import Endpoint, Follower, Found, PodEntry, Subscriptions, found_in
from kvevents.discovery import follower as follower_module
from kvevents.testing import Publisher, stored
from kvindex.http import create_app
from scorer import PrefixScorer

from .conftest import Followed, until
from .discovering import MODEL, following, pod


class Told:
    """A source that says what a test tells it: pods, or an error."""

    def __init__(self, label="told"):
        self.label = label
        self._says = []
        self._said = threading.Condition()

    def say(self, what):
        with self._said:
            self._says.append(what)
            self._said.notify_all()

    def watch(self, stop):
        while not stop.is_set():
            with self._said:
                if not self._says:
                    self._said.wait(0.01)
                    continue
                what = self._says.pop(0)
            if isinstance(what, Exception):
                raise what
            yield what


@pytest.fixture
def index():
    with contextlib.closing(open_index()) as index:
        yield index


def held(index):
    return PrefixScorer(index).score(list(range(16)), model=MODEL)


def publish(publisher, name=1):
    publisher.wait_for_subscribers()
    publisher.publish([stored("vllm-map", [name], None, list(range(16)), 16)])


def test_pods_are_added_and_removed_without_touching_the_others(index):
    told = Told()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(EventPool(index))
        first, second, third = (stack.enter_context(Publisher("tcp://127.0.0.1:0")) for _ in range(3))
        stack.enter_context(following(Subscriptions(pool), told))
        told.say([pod("a", first.endpoint, uid="1"), pod("b", second.endpoint, uid="1")])
        publish(first)
        publish(second)
        until(lambda: held(index) == {"a": 1.0, "b": 1.0})
        incarnation = {status.source.pod: status.incarnation for status in index.sources()}
        told.say([pod("a", first.endpoint, uid="1")])
        until(lambda: held(index) == {"a": 1.0})
        # back under another address
        told.say([pod("b", third.endpoint, uid="1"), pod("a", first.endpoint, uid="1")])
        publish(third)
        until(lambda: held(index) == {"a": 1.0, "b": 1.0})
        # the same name and address, another life
        told.say([pod("b", third.endpoint, uid="2"), pod("a", first.endpoint, uid="1")])
        until(lambda: held(index) == {"a": 1.0})
        assert {status.source.pod: status.incarnation for status in index.sources()}["a"] == incarnation["a"]
        assert first.subscribers == 1
        assert pool.sequences()[Source("a")] == 0


def test_an_error_keeps_all_pods_and_is_said_once(capsys):
    followed, told, other = Followed(), Told("first"), Told("second")
    with following(followed, told, other) as follower:
        assert follower.waiting() == ["first", "second"]
        told.say([pod("a", "tcp://h:1")])
        other.say([pod("b", "tcp://h:2")])
        until(lambda: set(followed.pods) == {"a", "b"})
        for _ in range(3):
            told.say(DiscoveryError("it is down"))
        told.say(ZeroDivisionError("a defect"))
        until(lambda: follower.stats()["errors_total"] == 4)
        assert set(followed.pods) == {"a", "b"}
        assert follower.stats()["sources_unavailable"] == 1
        other.say([pod("b", "tcp://h:2"), pod("c", "tcp://h:3")])
        until(lambda: set(followed.pods) == {"a", "b", "c"})
        told.say([pod("a", "tcp://h:1")])
        until(lambda: follower.stats()["sources_unavailable"] == 0)
        assert followed.changes("a") == ["+"]
    said = capsys.readouterr().out
    assert said.count("discovery_unavailable") == 1
    assert said.count("discovery_back") == 1


def test_two_sources_of_one_name_agree_on_the_first():
    followed, told, other = Followed(), Told(), Told()
    fixed = [pod("f", "tcp://h:9")]
    with following(followed, told, other, fixed=fixed) as follower:
        other.say([pod("a", "tcp://h:2"), pod("f", "tcp://h:8")])
        until(lambda: "a" in followed.pods)
        told.say([pod("a", "tcp://h:1")])
        until(lambda: followed.pods["a"].endpoints[0].endpoint == "tcp://h:1")
        assert followed.pods["f"].endpoints[0].endpoint == "tcp://h:9"
        assert follower.stats()["conflicts"] == 2
        told.say([])
        until(lambda: followed.pods["a"].endpoints[0].endpoint == "tcp://h:2")


def test_a_pod_that_cannot_be_followed_leaves_the_others_and_is_tried_again(index):
    told = Told()
    with EventPool(index) as pool, following(Subscriptions(pool), told) as follower:
        half = Found(name="bad", endpoints=(Endpoint("tcp://127.0.0.1:1"), Endpoint("tcp://nonsense")))
        told.say([half, pod("a", "tcp://127.0.0.1:2")])
        until(lambda: set(pool.connected()) == {"a"})
        until(lambda: follower.stats()["pods_failed"] == 1)
        told.say([pod("bad", "tcp://127.0.0.1:1"), pod("a", "tcp://127.0.0.1:2")])
        until(lambda: set(pool.connected()) == {"a", "bad"})
        until(lambda: follower.stats()["pods_failed"] == 0)


def test_a_pod_that_is_dropped_stays_away_until_it_is_another_one():
    followed, told = Followed(), Told()
    with following(followed, told) as follower:
        told.say([pod("a", "tcp://h:1", uid="1")])
        until(lambda: "a" in followed.pods)
        assert follower.drop("a")
        assert not follower.drop("a")
        told.say([pod("a", "tcp://h:1", uid="1"), pod("b", "tcp://h:2")])
        until(lambda: set(followed.pods) == {"b"})
        told.say([pod("a", "tcp://h:1", uid="2")])
        until(lambda: set(followed.pods) == {"a"})


def test_a_fixed_pod_that_cannot_be_followed_is_an_error_at_once(index):
    with EventPool(index) as pool, pytest.raises(SubscriptionError, match="nonsense"):
        Follower(Subscriptions(pool), fixed=[pod("a", "tcp://nonsense")]).start()


def test_what_follows_no_pods_knows_their_names():
    with following(None, fixed=found_in([PodEntry(pod="a", endpoint="tcp://10.0.0.7:5557")])) as follower:
        assert follower.resolve(["10.0.0.7"]) == ["a"]
        with pytest.raises(PodTaken, match="follows no pods"):
            follower.put("b", pod("b", "tcp://h:1"))


def test_more_pods_than_a_fleet_has_are_an_error(monkeypatch):
    monkeypatch.setattr(follower_module, "MAX_PODS", 2)
    followed, told = Followed(), Told()
    with following(followed, told) as follower:
        told.say([pod("a", "tcp://h:1"), pod("b", "tcp://h:2")])
        until(lambda: len(followed.pods) == 2)
        told.say([pod(name, "tcp://h:1") for name in "abc"])
        until(lambda: follower.stats()["sources_unavailable"] == 1)
    assert set(followed.pods) == {"a", "b"}


def test_who_only_reads_does_not_wait_for_a_pod_that_is_being_subscribed():
    begun, go_on = threading.Event(), threading.Event()

    class Slow:
        def update(self, wanted):
            if wanted:
                begun.set()
                assert go_on.wait(20.0)
            return {}

    told = Told()
    with following(Slow(), told) as follower:
        told.say([pod("a", "tcp://h:1")])
        assert begun.wait(20.0)
        assert (set(follower.pods()), follower.waiting(), follower.stats()["pods"]) == ({"a"}, [], 1)
        assert follower.resolve(["a"]) == ["a"]
        go_on.set()


def test_pods_are_registered_over_http(index):
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(EventPool(index))
        first, second = (stack.enter_context(Publisher("tcp://127.0.0.1:0")) for _ in range(2))
        fixed = [pod("fixed", "tcp://127.0.0.1:1")]
        follower = stack.enter_context(following(Subscriptions(pool), fixed=fixed))
        app = create_app(PrefixScorer(index), index, pool, follower, max_tokens=100, max_body_bytes=4096)
        client = stack.enter_context(TestClient(app))
        body = {"endpoint": first.endpoint, "model": MODEL, "address": "10.0.0.7:8000"}
        assert client.put("/v1/pods/a", json=body).status_code == 201
        publish(first)
        until(lambda: held(index) == {"a": 1.0})
        assert client.put("/v1/pods/a", json=body).status_code == 204
        assert held(index) == {"a": 1.0}
        asked = {"model": MODEL, "token_ids": list(range(16)), "pods": ["http://10.0.0.7:8000"]}
        assert client.post("/v1/score", json=asked).json()["scores"] == {"a": 1.0}
        moved = body | {"endpoint": second.endpoint}
        assert client.put("/v1/pods/a", json=moved).status_code == 204
        assert held(index) == {}
        second.wait_for_subscribers()
        for wrong in (
            {},
            {"endpoint": "tcp://h:70000"},
            {"endpoint": "nonsense"},
            {"endpoint": first.endpoint, "x": 1},
        ):
            answer = client.put("/v1/pods/a", json=wrong)
            assert (answer.status_code, answer.json()["status"]) == (400, 400), wrong
        assert follower.pods()["a"].endpoints[0].endpoint == second.endpoint
        assert second.subscribers == 1
        assert client.put("/v1/pods/fixed", json=body).status_code == 409
        paths = client.get("/schema/openapi.json").json()["paths"]
        assert paths["/v1/pods/{pod}"]["put"]["responses"].keys() >= {"201", "204", "400", "409"}
        assert "kvindex_discovery_pods 2.0" in client.get("/metrics").text
        assert client.delete("/v1/pods/10.0.0.7:8000").status_code == 204
        assert client.delete("/v1/pods/a").status_code == 404
        assert client.delete("/v1/pods/fixed").status_code == 204
        assert set(pool.connected()) == set()
        assert client.put("/v1/pods/fixed", json=body).status_code == 201


def test_readiness_waits_for_the_first_answer_of_every_source(index):
    told = Told("somewhere")
    with EventPool(index) as pool, following(Subscriptions(pool), told) as follower:
        app = create_app(PrefixScorer(index), index, pool, follower, max_tokens=100, max_body_bytes=4096)
        with TestClient(app) as client:
            assert client.get("/readyz").json()["not_answered"] == ["somewhere"]
            told.say([])
            until(lambda: client.get("/readyz").status_code == 200)
