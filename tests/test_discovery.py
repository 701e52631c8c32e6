"""Pods that come and go: the follower, a real pool behind it, and every source but Kubernetes."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dnslib
import dnslib.server
import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar.testing import TestClient

from indexer import Source, open_index
from kvevents import DiscoveryError, EventPool, PodTaken, SubscriptionError
from kvevents.discovery import (
    DnsDiscovery,
    DnsFollow,
    Endpoint,
    FileDiscovery,
    Follower,
    Found,
    PodEntry,
    SglangDiscovery,
    SglangFollow,
    Subscriptions,
    found_in,
    sglang,
)
from kvevents.discovery import follower as follower_module
from kvevents.discovery.entry import RankEntry
from kvevents.discovery.identity import Aliases, normalise
from kvevents.endpoints import check_endpoint, endpoint_of_rank
from kvevents.testing import Publisher, stored
from kvindex.config import load
from kvindex.errors import ConfigError
from kvindex.http import create_app
from kvindex.pods import sources_of
from scorer import PrefixScorer

from .conftest import Followed, until

MODEL = "m"


def pod(name, *endpoints, **more):
    return Found(name=name, endpoints=tuple(Endpoint(one, model=MODEL) for one in endpoints), **more)


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


@contextlib.contextmanager
def following(target, *sources, **more):
    follower = Follower(target, sources, retry_s=0.001, retry_max_s=0.01, **more)
    follower.start()
    try:
        yield follower
    finally:
        follower.close()


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


# --- ranks and endpoints


@pytest.mark.parametrize(
    ("endpoint", "rank", "expected"),
    [
        ("tcp://10.0.0.7:5557", 0, "tcp://10.0.0.7:5557"),
        ("tcp://10.0.0.7:5557", 3, "tcp://10.0.0.7:5560"),
        ("tcp://[fd00::7]:5557", 1, "tcp://[fd00::7]:5558"),
        ("inproc://a", 2, "inproc://a_dp2"),
        ("ipc:///a", 0, "ipc:///a"),
    ],
)
def test_the_endpoint_of_a_rank(endpoint, rank, expected):
    assert endpoint_of_rank(endpoint, rank) == expected


@pytest.mark.parametrize(
    ("endpoint", "rank"), [("tcp://h:65535", 1), ("ipc:///a", 1), ("tcp://h:70000", 0), ("tcp://h:1", -1)]
)
def test_a_rank_that_cannot_be(endpoint, rank):
    with pytest.raises(SubscriptionError):
        endpoint_of_rank(endpoint, rank)


def test_ports_that_there_are_not_are_refused(index):
    check_endpoint("tcp://*:0", bind=True)
    with EventPool(index) as pool:
        for port in ("65536", "70000", "99999999999999999999999", "0"):
            with pytest.raises(SubscriptionError, match="expected a port from 1 to 65535"):
                pool.subscribe("a", f"tcp://127.0.0.1:{port}")
        with pytest.raises(SubscriptionError, match="70000"):
            pool.subscribe("a", "tcp://127.0.0.1:5557", replay="tcp://127.0.0.1:70000")
        with pytest.raises(SubscriptionError, match="expected a port from 0"):
            pool.bind("tcp://127.0.0.1:65536")
        assert pool.connected() == {}


def test_ranks_by_offset_and_by_list():
    ranks = [RankEntry(endpoint="tcp://10.0.0.7:1"), RankEntry(endpoint="tcp://10.0.0.8:1", replay="tcp://10.0.0.8:2")]
    (listed,) = found_in([PodEntry(pod="a", endpoints=ranks)])
    assert [(one.endpoint, one.replay) for one in listed.endpoints] == [(one.endpoint, one.replay) for one in ranks]
    (by_list,) = found_in(
        [
            PodEntry(pod="a", endpoint="tcp://10.0.0.7:5557", model=MODEL),
            PodEntry(pod="a", endpoint="tcp://10.0.0.8:5557", replay="tcp://10.0.0.8:5657", ranks=[0, 2]),
        ]
    )
    assert [(one.endpoint, one.replay) for one in by_list.endpoints] == [
        ("tcp://10.0.0.7:5557", None),
        ("tcp://10.0.0.8:5557", "tcp://10.0.0.8:5657"),
        ("tcp://10.0.0.8:5559", "tcp://10.0.0.8:5659"),
    ]
    assert set(by_list.aliases) == {"10.0.0.7", "10.0.0.8"}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"endpoint": "tcp://h:1", "endpoints": [{"endpoint": "tcp://h:1"}]},
        {"endpoints": [{"endpoint": "tcp://h:1"}], "ranks": 2},
        {"endpoint": "tcp://h:5557", "replay": "tcp://h:5558", "ranks": 2},
        {"endpoint": "tcp://h:65535", "ranks": 2},
        {"endpoint": "tcp://h:1", "ranks": 0},
        {"endpoint": "tcp://h:1", "ranks": []},
        {"endpoint": ""},
        {"endpoint": "tcp://h:1", "copies": "x"},
    ],
)
def test_pods_that_make_no_sense_are_refused_wherever_they_are_said(tmp_path, wrong):
    file = tmp_path / "pods.json"
    file.write_text(json.dumps([{"pod": "a"} | wrong]))
    with pytest.raises(DiscoveryError, match=r"pods\.json"):
        FileDiscovery(file, interval_s=1).read()
    with pytest.raises(ConfigError, match="pods"):
        load(None, {"KVINDEX_PODS": json.dumps([{"pod": "a"} | wrong])})


# --- names


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("http://10.0.0.7:8000/v1", "10.0.0.7:8000"),
        ("[FD00:0::7]:8000", "[fd00::7]:8000"),
        ("fd00:0:0::7", "fd00::7"),
        ("[fd00::7]", "fd00::7"),
        ("VLLM-0", "vllm-0"),
        ("ns/pod", "ns/pod"),
        ("https://vllm-0.svc:443", "vllm-0.svc:443"),
        ("", ""),
    ],
)
def test_one_spelling(text, same):
    assert normalise(text) == normalise(same) == same


@given(st.text())
def test_any_text_has_one_spelling(text):
    assert normalise(normalise(text)) == normalise(text) or "://" in normalise(text)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_an_address_is_known_in_every_spelling(ip, port):
    known = Aliases({"x": pod("x", "tcp://h:1", ip=str(ip), port=port)})
    bracketed = f"[{ip.exploded}]" if ip.version == 6 else str(ip)
    for asked in (ip.exploded, ip.compressed, f"{bracketed}:{port}", f"HTTP://{bracketed}:{port}/", "X"):
        assert known.resolve([asked]) == ["x"]


def test_an_exact_name_goes_first_and_an_address_of_several_means_all():
    pods = {name: pod(name, "tcp://h:1", ip="10.0.0.7", port=port) for name, port in (("a", 1), ("b", 2))}
    known = Aliases(pods | {"10.0.0.9": pod("10.0.0.9", "tcp://h:1"), "c": pod("c", "tcp://h:1", ip="10.0.0.9")})
    assert known.resolve(["10.0.0.7", "a"]) == ["a", "b"]
    assert known.resolve(["10.0.0.7:2"]) == ["b"]
    assert known.resolve(["10.0.0.9"]) == ["10.0.0.9"]


# --- a file


def test_a_file_is_followed_through_every_change(tmp_path):
    file, followed = tmp_path / "pods.yaml", Followed()
    with following(followed, FileDiscovery(file, interval_s=0.005)) as follower:
        until(lambda: follower.stats()["errors_total"])
        file.write_text("- {pod: a, endpoint: 'tcp://h:1', uid: '1'}\n- {pod: b, endpoint: 'tcp://h:2', uid: '1'}\n")
        until(lambda: set(followed.pods) == {"a", "b"})
        for broken in (
            "",
            "- {pod: a, endpoint",
            "pods:\n- {pod: a}",
            "x: 1",
            "3",
            "- {pod: a, unknown: 1}",
            "[" * 5000,
        ):
            errors = follower.stats()["errors_total"]
            file.write_text(broken)
            until(lambda errors=errors: follower.stats()["errors_total"] > errors + 1)
            assert set(followed.pods) == {"a", "b"}
        file.unlink()
        # another address, and a link as Kubernetes swaps those of a ConfigMap
        (tmp_path / "new").write_text(
            "pods:\n- {pod: a, endpoint: 'tcp://h:1', uid: '1'}\n- {pod: b, endpoint: 'tcp://h:3'}"
        )
        file.symlink_to(tmp_path / "new")
        until(lambda: followed.pods["b"].endpoints[0].endpoint == "tcp://h:3")
        assert followed.changes("a") == ["+1"]
        (tmp_path / "new").write_text("[]")
        until(lambda: not followed.pods)


LEVELS = "\n".join(f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))
MERGES = "\n".join(f"- &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 9))
ENDS = "- &e [" + ", ".join(["{endpoint: 'tcp://h:1'}"] * 1_000) + "]"
RANKS = "\n".join(f"- {{pod: p{n}, endpoints: *e}}" for n in range(2_000))


@pytest.mark.parametrize(
    "text",
    [f"- &a0 [1, 2]\n{LEVELS}", f"- &m0 {{pod: x, endpoint: 'tcp://h:1'}}\n{MERGES}", f"{ENDS}\n{RANKS}"],
    ids=["aliases", "merges", "endpoints"],
)
def test_a_file_that_says_little_and_means_much_is_refused(tmp_path, text):
    path = tmp_path / "pods.yaml"
    path.write_text(text)
    with pytest.raises(DiscoveryError, match="more than 1000000 values, aliases included"):
        FileDiscovery(path, interval_s=1.0).read()


def test_a_file_may_use_aliases_and_itself_is_none(tmp_path):
    path = tmp_path / "pods.yaml"
    path.write_text("- &a {pod: a, endpoint: 'tcp://h:1', model: m}\n- {<<: *a, pod: b}\n")
    assert [(found.name, found.endpoints[0].model) for found in FileDiscovery(path, interval_s=1.0).read()] == [
        ("a", "m"),
        ("b", "m"),
    ]
    for text in ("&a [*a]", "[" * 50_000, "- " + "9" * 10_000, "[]]"):
        path.write_text(text)
        with pytest.raises(DiscoveryError, match="pods"):
            FileDiscovery(path, interval_s=1.0).read()


def test_a_file_may_be_json_and_is_worked_out_once(tmp_path, monkeypatch):
    path = tmp_path / "pods.json"
    source = FileDiscovery(path, interval_s=1.0)
    path.write_text('[{"pod": "a", "endpoint": "tcp://h:1"}]')
    first = source.read()
    monkeypatch.setattr(source, "_parse", None)
    assert source.read() is first
    monkeypatch.undo()
    for text in ("[{]", '"\\ud800"', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(DiscoveryError, match="pods"):
            source.read()


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


def test_a_file_may_be_toml(tmp_path):
    file = tmp_path / "pods.toml"
    file.write_text('[[pods]]\npod = "a"\nendpoint = "tcp://h:1"\nranks = 2\n')
    (found,) = FileDiscovery(file, interval_s=1).read()
    assert [one.endpoint for one in found.endpoints] == ["tcp://h:1", "tcp://h:2"]
    file.write_bytes(b"\xff")
    with pytest.raises(DiscoveryError):
        FileDiscovery(file, interval_s=1).read()


# --- DNS


class Zone(dnslib.server.BaseResolver):
    """A DNS server on loopback that answers with `records`, or with an error."""

    def __init__(self):
        self.records = {"A": [], "AAAA": []}
        self.rcode = "NOERROR"
        self._servers = []
        while len(self._servers) < 2:  # the port of the one may be taken for the other
            udp = dnslib.server.DNSServer(self, address="127.0.0.1", port=0, logger=_QUIET)
            self.port = udp.server.server_address[1]
            try:
                tcp = dnslib.server.DNSServer(self, address="127.0.0.1", port=self.port, tcp=True, logger=_QUIET)
            except OSError:
                udp.server.server_close()
            else:
                self._servers = [udp, tcp]
        for server in self._servers:
            server.start_thread()

    def resolve(self, request, handler):
        reply = request.reply()
        reply.header.rcode = getattr(dnslib.RCODE, self.rcode)
        kind = dnslib.QTYPE[request.q.qtype]
        for address in self.records[kind]:
            record = getattr(dnslib, kind)(address)
            reply.add_answer(dnslib.RR(request.q.qname, request.q.qtype, rdata=record, ttl=30))
        return reply

    def close(self):
        for server in self._servers:
            server.stop()
            server.server.server_close()
            server.thread.join()


_QUIET = dnslib.server.DNSLogger(log="-recv,-send,-request,-reply,-truncated,-error,-data", prefix=False)


@pytest.fixture
def zone():
    zone = Zone()
    yield zone
    zone.close()


def test_all_addresses_of_a_name_are_followed(zone):
    followed = Followed()
    follow = DnsFollow(
        name="vllm.inference.svc", server=f"127.0.0.1:{zone.port}", model=MODEL, ranks=2, replay_port=5600
    )
    zone.records["A"] = ["10.0.0.1", "10.0.0.2"]
    zone.records["AAAA"] = ["fd00::1"]  # the same pods once more
    with following(followed, DnsDiscovery(follow, interval_s=0.01), identity="ip:port") as follower:
        until(lambda: set(followed.pods) == {"10.0.0.1:8000", "10.0.0.2:8000"})
        assert [(one.endpoint, one.replay) for one in followed.pods["10.0.0.1:8000"].endpoints] == [
            ("tcp://10.0.0.1:5557", "tcp://10.0.0.1:5600"),
            ("tcp://10.0.0.1:5558", "tcp://10.0.0.1:5601"),
        ]
        zone.records["A"] = ["10.0.0.9", "10.0.0.1"]  # one is back under another address
        until(lambda: set(followed.pods) == {"10.0.0.1:8000", "10.0.0.9:8000"})
        for rcode in ("SERVFAIL", "NXDOMAIN", "REFUSED"):
            errors = follower.stats()["errors_total"]
            zone.rcode = rcode
            zone.records["A"] = []
            until(lambda errors=errors: follower.stats()["errors_total"] > errors + 1)
            assert set(followed.pods) == {"10.0.0.1:8000", "10.0.0.9:8000"}
        zone.records["A"] = ["10.0.0.1"]
        zone.rcode = "NOERROR"
        until(lambda: set(followed.pods) == {"10.0.0.1:8000"})
        assert followed.changes("10.0.0.1:8000") == ["+"]
        zone.records["A"] = []
        until(lambda: "[fd00::1]:8000" in followed.pods)
        zone.records["AAAA"] = []
        until(lambda: not followed.pods)


def test_an_answer_too_long_for_a_datagram_is_whole(zone):
    zone.records["A"] = [f"10.1.{high}.{low}" for high in range(4) for low in range(200)]
    follow = DnsFollow(name="vllm", server=f"127.0.0.1:{zone.port}")
    assert len(DnsDiscovery(follow, interval_s=1).read()) == 800


def test_a_server_that_is_no_address_is_refused():
    for wrong in ("dns.example", "1.2.3.4:x", "[::1"):
        with pytest.raises(DiscoveryError, match="server"):
            DnsDiscovery(DnsFollow(name="a", server=wrong), interval_s=1)


# --- SGLang


SERVER_INFO = {
    "model_path": "/models/qwen",
    "served_model_name": "Qwen/Qwen3-8B",
    "page_size": 64,
    "dp_size": 2,
    "kv_events": {
        "publisher": "zmq",
        "endpoint_host": "*",
        "endpoint_port_base": 5557,
        "topic": "kv-events",
        "block_size": 64,
        "dp_size": 2,
        "replay_endpoint_port_base": 5657,
        "load_endpoint_port_base": 5757,
        "load_topic": "load",
    },
}


class Server:
    """An HTTP server that answers every path in `answers`."""

    def __init__(self):
        self.answers = {}
        answers = self.answers

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = answers.get(self.path)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_an_sglang_server_says_where_its_ranks_publish(server, path):
    server.answers[path] = SERVER_INFO
    found = SglangDiscovery(SglangFollow(url=server.url + "/"), interval_s=1).read()
    expected = [(f"tcp://127.0.0.1:{5557 + rank}", f"tcp://127.0.0.1:{5657 + rank}") for rank in (0, 1)]
    assert [(one.endpoint, one.replay) for one in found.endpoints] == expected
    assert {(one.model, one.topic) for one in found.endpoints} == {("Qwen/Qwen3-8B", "kv-events")}
    assert found.name == f"127.0.0.1:{server.port}"


def test_an_sglang_server_that_moves_or_fails_is_followed(server):
    followed = Followed()
    source = SglangDiscovery(SglangFollow(url=server.url, pod="sg-0", model="x"), interval_s=0.005)
    with following(followed, source) as follower:
        until(lambda: follower.stats()["errors_total"])
        server.answers["/server_info"] = SERVER_INFO
        until(lambda: "sg-0" in followed.pods)
        for broken in (b"", b"{", [], {}, {"kv_events": None}, {"kv_events": {"endpoint_port_base": 70000}}):
            errors = follower.stats()["errors_total"]
            server.answers["/server_info"] = broken
            until(lambda errors=errors: follower.stats()["errors_total"] > errors + 1)
            assert set(followed.pods) == {"sg-0"}
        events = SERVER_INFO["kv_events"] | {
            "endpoint_host": "10.0.0.8",
            "replay_endpoint_port_base": None,
            "dp_size": 1,
        }
        server.answers["/server_info"] = SERVER_INFO | {"kv_events": events}
        until(lambda: followed.pods["sg-0"].endpoints == (Endpoint("tcp://10.0.0.8:5557", None, "x", "kv-events"),))
        assert follower.resolve([server.url]) == ["sg-0"]


# --- HTTP and configuration


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        [],
        {"kv_events": []},
        {"kv_events": {}},
        {"kv_events": {"endpoint_port_base": "5557"}},
        {"kv_events": {"endpoint_port_base": 70_000}},
        {"kv_events": {"endpoint_port_base": 5557, "dp_size": 10**9}},
        {"kv_events": {"endpoint_port_base": 65_535, "dp_size": 2}},
        {"kv_events": {"endpoint_port_base": 5557, "endpoint_host": "a b"}},
        {"kv_events": {"endpoint_port_base": 5557, "topic": 5}},
    ],
    ids=str,
)
def test_an_sglang_server_that_answers_nonsense_is_an_error_of_that_source(server, answer):
    server.answers["/server_info"] = server.answers["/get_server_info"] = answer
    with pytest.raises(DiscoveryError, match="sglang"):
        SglangDiscovery(SglangFollow(url=server.url), interval_s=1.0).read()


def test_an_sglang_server_that_never_ends_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(sglang, "ANSWER_S", -1.0)
    server.answers["/server_info"] = {"kv_events": {"endpoint_port_base": 5557}}
    with pytest.raises(DiscoveryError, match="not answered whole"):
        SglangDiscovery(SglangFollow(url=server.url), interval_s=1.0).read()


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


def test_discovery_is_configured_by_file_and_environment(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        """
        [discovery]
        identity = "ip:port"
        interval = 2
        file = "pods.yaml"
        [[discovery.dns]]
        name = "vllm"
        ranks = [8, 9]
        [[discovery.kubernetes]]
        label_selector = "app=vllm"
        [[discovery.sglang]]
        url = "http://10.0.0.7:30000"
        """
    )
    config = load(file, {"KVINDEX_DISCOVERY_DNS": '[{"name": "other"}]', "KVINDEX_DISCOVERY_INTERVAL": "3"})
    assert (config.discovery.interval, config.discovery.identity) == (3.0, "ip:port")
    labels = [source.label for source in sources_of(config.discovery)]
    assert labels == [
        "file pods.yaml",
        "dns other",
        "kubernetes (own namespace) app=vllm",
        "sglang http://10.0.0.7:30000",
    ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("DNS", '[{"name": "a", "port": 70000}]', r"discovery\.dns\[0?.*\]\.port|discovery\.dns"),
        ("DNS", '[{"name": "a", "port": 65535, "ranks": 2}]', "65535"),
        ("DNS", '[{"name": "a", "replay_port": 5558, "ranks": 2}]', "another rank"),
        ("KUBERNETES", '[{"namespace": "a"}]', "label_selector"),
        ("SGLANG", '[{"url": "10.0.0.7"}]', "url"),
        ("IDENTITY", "uid", "identity"),
        ("INTERVAL", "0", "interval"),
    ],
)
def test_bad_discovery_is_refused_with_the_keys_path(name, text, says):
    with pytest.raises(ConfigError, match=says):
        load(None, {f"KVINDEX_DISCOVERY_{name}": text})


def test_the_examples_of_the_page_are_valid(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "discovery.md").read_text()
    examples = [part.partition("```")[0] for part in page.split("```toml\n")[1:]]
    assert examples
    for example in examples:
        file = tmp_path / "c.toml"
        file.write_text(example)
        assert load(file, {}) != load(None, {})
