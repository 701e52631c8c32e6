"""A capture played to a running service, its speed, and a service watched."""

import gzip
import json
import math
import os
import subprocess
import sys
import threading

import msgspec
import pytest

from indexer import open_index
from kvevents import EventPool, Message
from kvindex import playing
from kvindex.captures import Capture
from kvindex.errors import UserError
from kvindex.playing import paced, run_play, speed_of
from kvindex.replay import run_replay
from kvindex.stats import Asked, PodStatus, collect
from kvindex.watching import cells
from scorer import PrefixScorer

from .conftest import GOLDEN, read_capture


class Clock(threading.Event):
    """Waits without waiting, and remembers how long."""

    def __init__(self):
        super().__init__()
        self.now = 100.0
        self.waits = []

    def monotonic(self):
        return self.now

    def wait(self, timeout=None):
        self.waits.append(round(timeout, 6))
        self.now += timeout
        return self.is_set()


def batch(ts):
    return Message(b"t", 0, msgspec.msgpack.encode([ts, [], 0]))


@pytest.mark.parametrize(
    ("text", "speed", "waits"),
    [("original", 1.0, [0.0, 2.0, 0.0, 1.0]), ("2", 2.0, [0.0, 1.0, 0.0, 0.5]), ("full", math.inf, [])],
)
def test_messages_come_at_their_time(monkeypatch, text, speed, waits):
    clock = Clock()
    monkeypatch.setattr(playing.time, "monotonic", clock.monotonic)
    assert speed_of(text) == speed
    # by arrival; without one by the engine's time; one without any time at once
    lines = [({"arrival": 10.0}, batch(0.0)), ({}, batch(12.0)), ({}, Message(b"t", 0, b"")), ({}, batch(11.0))]
    lines.append(({"arrival": 13}, batch(0.0)))
    assert list(paced(lines, speed, clock)) == [message for _, message in lines]
    assert clock.waits == waits


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "fast"])
def test_a_speed_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--speed"):
        speed_of(text)


@pytest.mark.parametrize("name", ["evict", "restart"])
def test_a_capture_played_over_sockets_ends_as_it_does_without(tmp_path, name):
    path = next(path for path in GOLDEN if path.stem == name)
    meta, *lines = read_capture(path)
    queries = [line for line in lines if line["kind"] == "query"]
    zipped = tmp_path / "capture.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    with subprocess.Popen(
        [
            *[sys.executable, "-m", "kvindex", "replay", str(zipped), "--publish"],
            *["--base-port", "0", "--hold", "60", "--json"],
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        (pod,) = json.loads(process.stdout.readline())
        assert (pod["pod"], pod["model"]) == (meta["pod"], meta["model"])
        index = open_index()
        with EventPool(index) as pool:
            pool.subscribe(pod["pod"], pod["endpoint"], replay=pod["replay"], model=pod["model"])
            said = iter(process.stderr.readline, "")
            played = next(line for line in said if "played" in line)
            assert played.split()[1:3] == ["of", str(sum(line["kind"] == "message" for line in lines))]
            wait_for(pool, lines)
            scorer = PrefixScorer(index, meta["block_size"])
            for query in queries:
                (match,) = scorer.match(query["tokens"], model=meta["model"])
                assert (match.blocks, match.trust) == (query["hit_blocks"], "exact")
        process.terminate()
        process.communicate(timeout=30)


def wait_for(pool, lines):
    last = [line["seq"] for line in lines if line["kind"] == "message"][-1]
    pause = threading.Event()
    for _ in range(2000):
        pool.drain()
        if last in pool.sequences().values():
            return
        pause.wait(0.01)
    raise AssertionError(f"message {last} never came: {pool.stats()}")


def play(file, **options):
    default = {"speed": math.inf, "host": "127.0.0.1", "base_port": 0, "wait_subscribers": 0, "hold": 0.0}
    return run_play(Capture([file]), **default | {"model": "", "as_json": False} | options)


def test_ports_that_cannot_be_had_are_said():
    with pytest.raises(UserError, match="cannot bind"):
        play(GOLDEN[0], host="203.0.113.1", base_port=5557)
    with pytest.raises(UserError, match="65535; take a lower"):
        play(GOLDEN[0], base_port=65_535)


def test_what_has_no_messages_or_too_many_pods_is_not_played(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text("")
    with pytest.raises(UserError, match="no messages"):
        play(file)
    file.write_text("".join(json.dumps({"topic": f"kv@{n}@m", "seq": 0, "payload": ""}) + "\n" for n in range(1025)))
    with pytest.raises(UserError, match="line 1025: more than 1024 pods"):
        play(file)


def test_times_that_nobody_can_wait_for_end_nothing():
    stop = threading.Event()
    stop.set()
    lines = [({"arrival": at}, batch(0.0)) for at in (0.0, 1e300, math.inf)]
    assert list(paced(lines, 1.0, stop)) == []
    assert len(list(paced([*lines[:1], *lines[2:]], 1.0))) == 2


def test_publishing_goes_where_it_is_told():
    got = []
    assert run_replay([GOLDEN[0]], publish=lambda capture: got.append(len(list(capture.messages()))) or 3) == 3
    assert got == [sum(line["kind"] == "message" for line in read_capture(GOLDEN[0]))]


def test_what_is_shown_of_a_pod():
    status = PodStatus("a", 1, "m", 5, {"gpu": 3, "cpu": 2}, [16], "exact", "", True, 9, 30, 2, 0.0123, 75.0)
    now = collect(open_index(), Idle(), Asked(), {})
    now = msgspec.structs.replace(now, at=20.0, pods=[status])
    before = msgspec.structs.replace(now, at=10.0, pods=[msgspec.structs.replace(status, messages=5)])
    assert cells(status, now, before) == ["a", "1", "m", "exact", "cpu 2 gpu 3", "9", "2.5", "12 ms", "75.0 s", "2"]
    lost = msgspec.structs.replace(status, connected=False, lag_s=None, last_seq=None)
    assert cells(lost, now, None)[3:8] == ["not connected", "cpu 2 gpu 3", "-", "-", "-"]


class Idle:
    """A pool that follows nobody."""

    def connected(self):
        return {}

    heard = sequences = stats = unheard = connected


def test_a_running_service_is_watched():
    pods = json.dumps([{"pod": "gone", "endpoint": "tcp://127.0.0.1:1", "model": "m"}])
    command = [sys.executable, "-m", "kvindex", "serve", "--port", "0"]
    environ = os.environ | {"KVINDEX_PODS": pods}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        url = next(json.loads(line)["url"] for line in process.stderr if '"serving"' in line)
        watch = [sys.executable, "-m", "kvindex", "watch", "--url", url, "--seconds", "0.3", "--every", "0.1"]
        answer = subprocess.run(watch, capture_output=True, text=True, timeout=30, check=False)
        process.terminate()
        process.stderr.read()
    assert answer.returncode == 0
    assert "gone rank 0: model m, trust not connected" in answer.stdout
    assert len(answer.stdout.splitlines()) > 1
    assert subprocess.run(watch[:4], capture_output=True, timeout=30, check=False).returncode == 2
    assert subprocess.run(watch, capture_output=True, timeout=30, check=False).returncode == 2  # it is gone
