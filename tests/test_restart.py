"""A service that is killed under load and started again: from a file, from a peer, from nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import msgspec
import pytest

from indexer import snapshots
from kvevents.testing import Publisher
from kvindex.comparing import Checker
from kvindex.fleet import Fleet
from kvindex.workload import Workload

from .conftest import MODEL
from .test_cli import _free_port
from .test_replay import until

RING = 100
"""Batches that each engine can say again: far fewer than it takes to know its cache."""


class Load(threading.Thread):
    """Requests on the pods of a fleet, one after the other, until it is stopped."""

    def __init__(self, fleet, workload):
        super().__init__(daemon=True)
        self.fleet, self.workload = fleet, workload
        self.stopped, self.turns = threading.Event(), 0

    def step(self):
        turn = next(self.workload)
        self.fleet.step(turn.conversation % len(self.fleet.pods), turn.prompt, turn.output)
        self.turns += 1

    def run(self):
        while not self.stopped.wait(0.04):
            self.step()

    def stop(self):
        self.stopped.set()
        self.join()


@contextlib.contextmanager
def serving(fleet, port, log, **environ):
    plain = {key: value for key, value in os.environ.items() if not key.startswith("KVINDEX_")}
    names = {f"KVINDEX_{key.upper()}": value for key, value in environ.items()}
    names |= {"KVINDEX_PODS": msgspec.json.encode(fleet.endpoints()).decode(), "KVINDEX_LOG_FORMAT": "json"}
    command = [sys.executable, "-m", "kvindex", "serve", "--port", str(port)]
    with log.open("ab") as stderr, subprocess.Popen(command, env=plain | names, stderr=stderr) as process:
        try:
            yield process
        finally:
            process.kill()


def ready(port):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
    return False


def counter(port, name):
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(name + " ")), None)


@pytest.fixture
def fleet():
    with Fleet(3, num_blocks=800) as fleet:
        yield fleet


def check(fleet, workload, port, *, degraded):
    checker = Checker(fleet, f"http://127.0.0.1:{port}")
    seen = checker.check(workload.sample(30), threading.Event())
    checker.close()
    assert seen.degraded == degraded
    return seen.differences


@pytest.mark.parametrize("way", ["file", "peer", "cold"])
def test_a_service_that_is_killed_under_load_goes_on_where_there_is_a_snapshot(fleet, tmp_path, way):
    workload = Workload(1, conversations=12, max_tokens=1024)
    load = Load(fleet, workload)
    log, port, peer = tmp_path / "log", _free_port(), _free_port()
    file = tmp_path / "snapshot"
    settings = {
        "file": {"snapshot_path": str(file), "snapshot_interval_s": "1"},
        "peer": {"snapshot_peers": f'["http://127.0.0.1:{peer}"]'},
        "cold": {},
    }[way]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serving(fleet, port, log, **settings))
        if way == "peer":
            stack.enter_context(serving(fleet, peer, log))
            until(lambda: ready(peer))
        until(lambda: ready(port))
        for _ in range(4 * RING):
            load.step()
        assert check(fleet, workload, port, degraded=0) == []
        for pod in fleet.pods:
            pod.publisher.buffer_steps = RING
        load.start()
        if way == "file":
            written = counter(port, "kvindex_snapshots_written_total")
            until(lambda: counter(port, "kvindex_snapshots_written_total") > written)
        first.send_signal(signal.SIGKILL)
        first.wait()
        turns = load.turns
        until(lambda: load.turns > turns + 10)
        stack.enter_context(serving(fleet, port, log, **settings))
        until(lambda: ready(port))
        turns = load.turns
        until(lambda: load.turns > turns + 10)
        load.stop()
        differences = check(fleet, workload, port, degraded=3 if way == "cold" else 0)
        assert bool(differences) == (way == "cold")
        assert counter(port, "kvindex_snapshot_loaded_sources") == (0 if way == "cold" else 3)
        assert ('"event": "snapshot_loaded"' in log.read_text()) == (way != "cold")


def test_a_damaged_file_is_refused_and_the_service_starts_without_it(fleet, tmp_path):
    log, port, file = tmp_path / "log", _free_port(), tmp_path / "snapshot"
    file.write_bytes(b"KVINDEX-SNAPSHOT\x01\x00\x00\x00 and then something else")
    dead = f"http://127.0.0.1:{_free_port()}"
    settings = {"snapshot_path": str(file), "snapshot_peers": f'["{dead}", "http://127.0.0.1:x"]'}
    with serving(fleet, port, log, **settings) as process:
        until(lambda: ready(port))
        lines = [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]
        events = {line["event"]: line for line in lines}
        assert "cut short" in events["snapshot_not_used"]["error"]
        assert events["cold_start"]["reason"]
        assert [line["peer"] for line in lines if line["event"] == "peer_not_used"] == [dead, "http://127.0.0.1:x"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert len(list(snapshots.read_snapshot(file))) == 3  # written at the end


def test_a_peer_that_waits_itself_gives_nothing(tmp_path, fleet):
    log, port = tmp_path / "log", _free_port()
    fleet.pods[0].publisher.close()
    with serving(fleet, port, log):

        def answer():
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"http://127.0.0.1:{port}/v1/snapshot", trust_env=False)

        until(answer)
        refused = answer()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "not_connected" in refused.json()["detail"]


def test_more_streams_than_are_given_at_a_time_are_refused(impl):
    from indexer import open_index
    from kvevents import EventPool
    from kvindex.snapshots import Busy, Snapshots

    index = open_index(f"memory://?impl={impl}")
    with EventPool(index) as pool, Publisher("tcp://127.0.0.1:0") as publisher:
        pool.subscribe("a", publisher.endpoint, model=MODEL)
        given = Snapshots(pool)
        streams = [given.stream(), given.stream()]
        with pytest.raises(Busy):
            given.stream()
        assert b"".join(streams.pop()).startswith(b"KVINDEX-SNAPSHOT")
        del streams  # one that nobody reads to its end is over too
        for _ in range(4):
            assert list(given.stream())


def test_a_file_that_cannot_be_written_is_counted_and_told(tmp_path):
    from indexer import open_index
    from kvevents import EventPool
    from kvindex.config import SnapshotConfig
    from kvindex.snapshots import Snapshots

    with EventPool(open_index()) as pool:
        kept = Snapshots(pool, SnapshotConfig(path=str(tmp_path / "missing" / "snapshot"), interval_s=1))
        kept.start()
        until(lambda: kept._counts["failed"])
        before = time.monotonic()
        kept.close()
        kept.close()
        assert time.monotonic() - before < 30
        assert {m.name: m.samples[0].value for m in kept.collect()}["kvindex_snapshots_failed"] >= 2
