"""`kvindex bench`, run as a person runs it: what it measures and says, not how fast this machine is."""

import json
import os
import subprocess
import sys

import pytest

from indexer import open_index
from kvevents import Message
from kvevents.testing import FullWorker
from kvevents.testing import stored as wire_stored
from kvindex.bench import goals, report, run
from kvindex.bench.goals import Row
from kvindex.bench.report import cells, make_report
from kvindex.bench.scale import QUICK
from kvindex.bench.shared import PREFIX

from .conftest import MODEL, NEEDS_REDIS, POD, payload


def bench(*arguments, impl="", **more):
    environ = os.environ | ({"KVINDEX_IMPL": impl} if impl else {}) | {"COLUMNS": "80"}
    command = [sys.executable, "-m", "kvindex", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environ, **more)


def rows_of(answer):
    assert answer.returncode == 0, answer.stderr
    return {row["name"]: row for row in json.loads(answer.stdout)["rows"]}


def test_a_quick_run_measures_every_row(impl):
    answer = bench("--quick", "--json", impl=impl)
    rows = rows_of(answer)
    expected = [name for measurement, some in goals.ROWS.items() if measurement != goals.REDIS for name in some]
    alone = {"apply_two", "apply_scaling", "cores_scaling"} if os.cpu_count() == 1 else set()
    assert list(rows) == [name for name in expected if name not in alone]
    for row in rows.values():
        assert 0 < row["lowest"] <= row["median"] <= row["highest"], row
        assert (row["goal_holds"] is None) <= (row["goal"] is None or impl == "python"), row
    said = json.loads(answer.stdout)
    assert (said["implementation"], said["quick"], list(said["left_out"])) == (impl, True, ["redis"])
    assert said["versions"].keys() >= {"python", "kv-cache-indexer", "pyzmq"}
    assert said["usable_cpus"] <= said["cpus"]
    assert answer.stderr.split("\n")[0] == "measuring hash"


def test_the_table_says_what_holds():
    answer = bench("--quick", "--only", "apply", "--only", "hash")
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("apply payload bytes, one worker")]
    assert "M blocks/s" in line
    assert "≥ 0.3" in line
    assert not [line for line in lines if line.startswith(("match", "left out"))]
    assert answer.stderr.split() == ["measuring", "hash", "measuring", "apply"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "speed"], "--only speed: expected one of hash, apply, match, score, memory, socket, redis"),
        (["--only", "redis"], "--redis redis://"),
        (["--redis", "memory://"], "--redis memory://: expected one server"),
        (["--redis", "redis://127.0.0.1:9/0"], "127.0.0.1:9"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, says):
    answer = bench("--quick", *arguments)
    assert (answer.returncode, answer.stdout) == (2, ""), answer
    assert says in answer.stderr
    assert answer.stderr.count("\n") == 1


@NEEDS_REDIS
def test_redis_is_left_as_it_was(redis_server):
    client = redis_server.client
    foreign = {b"somebody's": b"1", PREFIX.encode(): b"2", b"kvindex:models": b"3", PREFIX.encode() + b"0:b": b"4"}
    client.mset(foreign)
    before = set(client.keys())
    try:
        rows = rows_of(bench("--quick", "--json", "--only", "redis", "--redis", f"{redis_server.url}?prefix=kvindex:"))
        assert set(client.keys()) == before
        assert dict(zip(foreign, client.mget(*foreign), strict=True)) == foreign
    finally:
        client.delete(*foreign)
    assert list(rows) == list(goals.ROWS[goals.REDIS])
    assert 0 < rows["redis_memory"]["median"] < rows["redis_memory_all"]["median"]


@NEEDS_REDIS
def test_redis_is_left_as_it_was_when_a_measurement_fails(redis_server, monkeypatch):
    before = set(redis_server.client.keys())
    written = []

    def fail(*_):
        written.extend(redis_server.client.keys(f"{PREFIX}*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("kvindex.bench.shared.each", fail)
    with pytest.raises(KeyboardInterrupt):
        run.run_bench(quick=True, only=["redis"], redis_url=redis_server.url, as_json=False)
    assert len(written) > 2_000
    assert set(redis_server.client.keys()) == before


def test_a_machine_without_proc_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(run, "tells_memory", lambda: False)
    assert run.run_bench(quick=True, only=["memory"], redis_url="", as_json=False) == 0
    assert "left out: memory, this system has no /proc/self/statm" in capsys.readouterr().out


def test_a_full_worker_applies_what_is_in_its_queue_until_it_is_enough():
    index = open_index()
    index.register(POD, model=MODEL)
    sent = [
        Message(b"", n, payload(wire_stored("vllm-map", [n + 1], n or None, range(4), 4)), POD.pod) for n in range(3)
    ]
    worker = FullWorker(index, sent[:2], model=MODEL)
    worker.work(lambda: True)
    assert index.stats()["held"] == 0
    worker = FullWorker(index, sent[:2], model=MODEL)
    worker.work()
    assert index.stats()["held"] == 2
    worker.fill(sent[2:])
    worker.work()
    assert index.stats()["held"] == 3
    (status,) = index.sources()
    assert (status.blocks, status.degraded) == (3, "")


def test_figures_are_whole_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setattr(report, "_WIDTH", 80)
    figures = [{"match_pouring_p99": value} for value in (5_941.0, 12_750.0, 44_444.0)]
    report.print_report(make_report({goals.MATCH: figures}, QUICK, quick=True, seconds=1, left_out={}))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "12,750  5,941 to 44,444" in said
    assert "≤ 250" in said


MORE, LESS = Row("rate", "1/s", more=True, goal=10, floor=2), Row("time", "us", goal=10)


@pytest.mark.parametrize(
    ("row", "median", "implementation", "says"),
    [
        (MORE, 10, "native", "yes"),
        (MORE, 9, "native", "no"),
        (MORE, 1, "native", "nor the floor"),
        (MORE, 9, "python", "core only"),
        (MORE, 1, "python", "nor the floor"),
        (MORE._replace(core_only=False), 10, "python", "yes"),
        (LESS, 10, "native", "yes"),
        (LESS, 11, "native", "no"),
        (LESS._replace(goal=None), 11, "native", ""),
    ],
)
def test_figures_are_held_against_goals(row, median, implementation, says, monkeypatch):
    monkeypatch.setattr("kvindex.bench.report.implementation", implementation)
    monkeypatch.setitem(goals.ROWS, "test", {"row": row})
    figures = [{"row": median}, {"row": median - 0.5}, {"row": median + 5}]
    (line,) = make_report({"test": figures}, QUICK, quick=True, seconds=1, left_out={}).rows
    assert (line.median, line.lowest, line.highest, line.rounds) == (median, median - 0.5, median + 5, 3)
    assert cells(line)[-1] == says
