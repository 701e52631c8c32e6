"""The doctor's look at a service, and the checks that a service makes of itself."""

import json
import subprocess
import sys

import httpx
import msgspec
import pytest
import structlog
from litestar.testing import TestClient

from indexer import open_index
from kvevents import EventPool, Message
from kvindex.checks import Checks
from kvindex.doctor.findings import is_trouble
from kvindex.doctor.fleet import CHECKS, judge_service
from kvindex.http import create_app
from kvindex.stats import PodStatus, Stats
from scorer import PrefixScorer

from .conftest import payload
from .doctoring import TOPIC, only, run


def pod_stats(**more):
    default = {
        "pod": "10.0.0.7:8000",
        "rank": 0,
        "model": "org/model",
        "blocks": 3,
        "tiers": {"gpu": 3},
        "block_sizes": [16],
        "trust": "exact",
        "reason": "",
        "connected": True,
        "last_seq": 2,
        "messages": 3,
        "gaps": 0,
        "lag_s": 0.0,
        "silent_s": 0.0,
        "live_s": 0.0,
    }
    return PodStatus(**default | more)


def service_troubles(*, before=None, pods=None, models=(), asked=(), block_size=None, configured=None, **more):
    more["block_size"] = configured
    now = Stats(1.0, more.pop("index", {}), more.pop("pool", {}), [pod_stats()] if pods is None else pods, **more)
    found = judge_service(now, before, models=models, pods=asked, block_size=block_size)
    assert {finding.check for finding in found} <= set(CHECKS)
    return {finding.check: finding for finding in found if is_trouble(finding)}


def test_troubles_of_a_service():
    assert service_troubles(models=["org/model"], asked=["10.0.0.7:8000"], block_size=16) == {}
    assert "model alias" in only(service_troubles(asked_models=["model"]), "model").cause
    assert "another port or none" in only(service_troubles(asked_pods=["10.0.0.7"]), "pod").cause
    assert "mismatch" in only(service_troubles(block_size=64), "block_size").cause
    assert "b" in only(service_troubles(not_connected=["b"]), "connected").what
    assert service_troubles(without_replay=["b"]) == {}
    assert only(service_troubles(pods=[]), "pods").level == "warn"
    assert "gap" in only(service_troubles(pods=[pod_stats(trust="degraded", reason="gap: lost")]), "trust").what
    assert only(service_troubles(pods=[pod_stats(lag_s=-4.0)]), "lag").level == "warn"
    for reason, level, cause in (
        ("bad_msgpack", "bad", "cannot be read"),
        ("queue_full", "warn", "kept up with"),
        ("event_unknown_event", "warn", "left out"),
    ):
        found = only(service_troubles(pool={f"dropped_{reason}_total": 2}), "decoding")
        assert (found.level, cause in found.cause) == (level, True)
    assert only(service_troubles(index={"parked_total": 20, "stored_total": 100}), "orphans").level == "warn"
    assert (
        only(service_troubles(pods=[pod_stats(model="")]), "model").remedy == "set `model` of the pods, or pool.model"
    )
    assert "mismatch" in only(service_troubles(configured=64), "block_size").cause
    assert "'kv@x'" in only(service_troubles(unheard={"10.0.0.7:8000": "kv@x"}), "topic").what


def test_a_replay_that_is_not_answered_is_told_from_a_pod_that_is_gone():
    unsure = [pod_stats(pod="a", trust="degraded", reason="unsure: messages may be missing")]
    assert service_troubles(pods=unsure, followed=["a"])["replay"].level == "bad"
    assert "replay" not in service_troubles(pods=unsure, followed=["a"], not_connected=["a"])
    assert "replay" not in service_troubles(pods=unsure, followed=["a"], without_replay=["a"])
    assert "replay" not in service_troubles(pods=unsure)  # somebody else follows it
    # it is asked again now and then, and is not well for that
    asked = [msgspec.structs.replace(unsure[0], reason="behind: messages were asked for again")]
    assert service_troubles(pods=asked, before=Stats(0.0, {}, {}, unsure), followed=["a"]).keys() == {"replay", "trust"}


def test_what_a_healthy_fleet_does_is_no_trouble():
    # an idle pod whose last message was asked for again, or is long ago
    assert service_troubles(pods=[pod_stats(lag_s=3600.0, live_s=None)]) == {}
    assert service_troubles(pods=[pod_stats(lag_s=3600.0, live_s=60.0)]) == {}
    # one that said nothing yet, and is asked for
    assert service_troubles(followed=["new"], asked_pods=["new"]) == {}
    quiet = pod_stats(pod="quiet", trust="degraded", reason="no events yet: nothing was received from this source")
    assert service_troubles(pods=[quiet], without_replay=["quiet"]) == {}
    # a loss that is being repaired, unless it stays so
    behind = [pod_stats(trust="degraded", reason="behind: messages were asked for again")]
    assert service_troubles(pods=behind) == {}
    assert "again and again" in only(service_troubles(pods=behind, before=Stats(0.0, {}, {}, behind)), "trust").cause
    # a few blocks without a parent
    assert service_troubles(index={"parked_total": 10, "stored_total": 20}) == {}


def test_a_service_is_looked_at_with_the_names_its_pods_really_have(service):
    checks, client = service
    client.put("/v1/pods/known", json={"endpoint": "tcp://127.0.0.1:1", "address": "10.9.9.9:8000"})
    client.post("/v1/score", json={"model": "org/model", "token_ids": [1], "pods": ["10.9.9.9:8000", "known"]})
    assert checks.asked.names()[1] == ["known"]
    assert "pod" not in {finding.check for finding in checks.look()}


def test_a_look_that_fails_is_not_the_last(service, monkeypatch):
    checks, _ = service
    looks = []

    def fail():
        looks.append(1)
        if len(looks) == 3:
            checks._stop.set()
        raise RuntimeError("a defect")

    monkeypatch.setattr(checks, "look", fail)
    monkeypatch.setattr("kvindex.checks.EVERY_S", 0.01)
    checks.start()
    checks._thread.join(20.0)
    assert len(looks) == 3


def test_only_what_is_new_counts():
    before = Stats(0.0, {"parked_total": 10, "stored_total": 50}, {"dropped_bad_msgpack_total": 2}, [])
    now = {"parked_total": 10, "stored_total": 100}
    assert service_troubles(before=before, index=now, pool={"dropped_bad_msgpack_total": 2}) == {}


@pytest.fixture
def service():
    index = open_index()
    with EventPool(index) as pool:
        pool.submit(Message(TOPIC, 0, payload(["BlockStored", [1], None, list(range(16)), 16, None], ["Strange"])))
        pool.drain()
        checks = Checks(index, pool)
        app = create_app(PrefixScorer(index), index, pool, max_tokens=100, max_body_bytes=4096, checks=checks)
        with TestClient(app) as client:
            yield checks, client


def test_a_service_says_all_it_knows(service):
    _, client = service
    client.post("/v1/score", json={"model": "alias", "token_ids": [1], "pods": ["x"]})
    stats = msgspec.json.decode(client.get("/v1/stats").content, type=Stats)
    (pod,) = stats.pods
    assert (pod.pod, pod.model, pod.blocks, pod.last_seq, pod.messages) == ("10.0.0.7:8000", "org/model", 1, 0, 1)
    assert pod.silent_s >= 0.0
    assert pod.lag_s > 1e9  # the payload says it was made at 1.0
    assert 0.0 <= pod.live_s < 60.0
    assert (stats.asked_models, stats.asked_pods) == (["alias"], ["x"])
    assert stats.pool["applied_total"] == 1


def test_a_change_is_logged_once_and_is_a_metric(service):
    checks, client = service
    metric = 'kvindex_check{check="model"} '

    def value():
        text = client.get("/metrics").text
        return float(text.partition(metric)[2].partition("\n")[0])

    with structlog.testing.capture_logs() as logs:
        checks._log = structlog.get_logger("kvindex")
        checks.look()
        assert value() == 0.0
        client.post("/v1/score", json={"model": "alias", "token_ids": [1]})
        checks.look()
        checks.look()
        assert value() == 1.0
        checks.asked.forget()
        checks.look()
        assert value() == 0.0
    said = [(line["event"], line["check"]) for line in logs if line.get("check") == "model"]
    assert said == [("check", "model"), ("check_ok", "model")]
    decoding = [line["event"] for line in logs if line.get("check") == "decoding"]
    assert decoding == ["check", "check_ok"]  # it was dropped once, and no more since


def test_the_command_looks_at_a_service(tmp_path):
    command = [sys.executable, "-m", "kvindex", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        url = next(json.loads(line)["url"] for line in process.stderr if '"serving"' in line)
        answer = run("--url", url)
        httpx.post(f"{url}/v1/score", json={"model": "m", "token_ids": [1]})
        process.terminate()
        process.stderr.read()
    assert answer.returncode == 1
    assert "no pod has said anything" in answer.stdout
    assert run("--url", url).returncode == 2
