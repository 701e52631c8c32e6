"""What is said of a pod: the endpoints of its ranks, and the names it goes by."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer import open_index
from kvevents import DiscoveryError, EventPool, SubscriptionError
from kvevents.discovery import FileDiscovery, PodEntry, found_in
from kvevents.discovery.entry import RankEntry
from kvevents.discovery.identity import Aliases, normalise
from kvevents.endpoints import check_endpoint, endpoint_of_rank
from kvindex.config import load
from kvindex.errors import ConfigError

from .discovering import MODEL, pod


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


def test_ports_that_there_are_not_are_refused():
    check_endpoint("tcp://*:0", bind=True)
    with contextlib.closing(open_index()) as index, EventPool(index) as pool:
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
