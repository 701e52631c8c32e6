"""The examples of the library, and the demo, run as a person runs them."""

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from fastapi.testclient import TestClient

from examples import load
from examples.custom_index import JournalIndex, LookUp, open_journal
from examples.plot import Panel, draw
from examples.simulated_servers import Engine, Speed, Words, create_app, save_tokenizer
from indexer import Limits, Prompt, open_index
from kvevents import EventPool
from kvindex.fleet import Fleet
from scorer import PrefixScorer

from . import test_index
from .conftest import MODEL, until
from .serving import serving

ROOT = Path(__file__).parents[1]
PROMPT = list(range(100, 180))

# What every index must do, done by the one of the examples: the same tests with another `open_new`.
test_random_streams_leave_what_the_model_holds = test_index.test_random_streams_leave_what_the_model_holds
test_events_in_any_order_of_parents_end_the_same = test_index.test_events_in_any_order_of_parents_end_the_same
test_removals = test_index.test_a_removal_of_one_source_or_tier_leaves_the_others
test_shared_storage = test_index.test_shared_storage_counts_for_every_pod_of_the_model
test_not_followed = test_index.test_a_source_that_is_not_followed_is_refused_and_nothing_counts_it
test_sources_are_bounded = test_index.test_sources_are_bounded
test_threads_hammer_one_index = test_index.test_threads_hammer_one_index


@pytest.fixture(scope="session")
def open_new():
    def opened(limits: Limits | None = None):
        return JournalIndex(open_index("memory://", limits=limits))

    return opened


def test_a_journal_has_what_was_asked_and_held(tmp_path):
    index = open_journal("memory://", size=2)
    with Fleet(2, model=MODEL) as fleet, EventPool(index) as pool:
        for pod in fleet.pods:
            pool.subscribe(pod.name, pod.publisher.endpoint, model=MODEL)
            pod.publisher.wait_for_subscribers(1)
        fleet.step(1, PROMPT)
        scorer = PrefixScorer(index)
        until(lambda: scorer.score(PROMPT, model=MODEL) == {"pod-01": 5.0})
    scorer.score([1] * 20, model=MODEL)
    assert list(index.journal) == [LookUp(MODEL, 80, 80), LookUp(MODEL, 20, 0)]
    assert index.held_share(MODEL) == 0.8
    index.match(Prompt(PROMPT, "another"))
    assert (len(index.journal), index.held_share("another"), index.held_share("none")) == (2, 0.0, 0.0)


@pytest.mark.parametrize("past", [True, False])
def test_a_script_scores_once(past):
    with Fleet(1, model=MODEL) as fleet:
        publisher = fleet.pods[0].publisher
        if past:
            fleet.step(0, PROMPT)
        command = ["examples.score_once", publisher.endpoint, "--replay", publisher.replay, "--model", MODEL]
        asked = [str(token) for token in PROMPT[:70]]
        done = subprocess.run(
            [sys.executable, "-m", *command, *asked], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{64 if past else 0} of 70 tokens, {64 if past else 0} can be reused; exact\n"


def test_the_fastapi_router_sends_prompts_where_they_are_cached(tmp_path, monkeypatch):
    save_tokenizer(tmp_path)
    with Fleet(3, model=MODEL) as fleet:
        apps = [create_app(Engine(pod, Speed(decode_s=0)), Words(tmp_path), MODEL) for pod in fleet.pods]
        with serving(*apps) as urls:
            pods = {pod.name: [url, pod.publisher.endpoint] for pod, url in zip(fleet.pods, urls, strict=True)}
            monkeypatch.setenv("PODS", json.dumps(pods))
            module = importlib.import_module("examples.fastapi_router")
            body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3, "stream": True}
            with TestClient(module.app) as client:
                for pod in fleet.pods:
                    pod.publisher.wait_for_subscribers(1)
                fleet.step(2, PROMPT)
                until(lambda: module.scorer.score(PROMPT, model=MODEL))
                answers = [client.post("/v1/completions", json=body) for _ in range(3)]
                assert {answer.headers["x-routed-to"] for answer in answers} == {"pod-02"}
                assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
                assert not +module.in_flight
                module.in_flight["pod-02"] = 9
                assert client.post("/v1/completions", json=body).headers["x-routed-to"] != "pod-02"
                assert client.post("/v1/completions", json={"prompt": "text"}).status_code == 422
                assert client.post("/v1/completions", json={**body, "model": "none"}).status_code == 404
            assert [pod.engine.hit_blocks(PROMPT) for pod in fleet.pods].count(5) == 2


def test_an_example_is_as_short_as_it_is_said_to_be():
    assert len((ROOT / "examples" / "fastapi_router.py").read_text().splitlines()) <= 60


def test_the_demo_compares_the_policies_over_http(tmp_path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVINDEX_")}
    command = [sys.executable, "-m", "examples.demo", "--rate", "60", "--requests", "28", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    results = json.loads((tmp_path / "router.json").read_text())
    assert [result["policy"] for result in results] == list(load.POLICIES)
    assert {(result["rate"], result["requests"], result["failed"]) for result in results} == {(60, 28, 0)}
    shares = {result["policy"]: result["hit_share"] for result in results}
    assert shares["kv"] > max(shares["round-robin"], shares["random"])
    table = (tmp_path / "router.md").read_text()
    assert table.splitlines()[2:] == re.findall(r"^\| 60 .*$", done.stdout, re.MULTILINE)
    ET.fromstring((tmp_path / "router.svg").read_text())


def test_a_plot_puts_points_where_they_belong():
    lines = {"one": [(0.0, 0.0), (10.0, 100.0)], "two & three": [(5.0, 50.0)]}
    picture = ET.fromstring(draw([Panel("a", lines), Panel("b", {"one": [(10.0, 37.0)]})], below="x"))
    circles = [
        (float(one.get("cx")), float(one.get("cy"))) for one in picture.iter("{http://www.w3.org/2000/svg}circle")
    ]
    (left, bottom), (right, top), middle, (_, other) = circles
    assert middle == ((left + right) / 2, (top + bottom) / 2)
    # 37 on an axis up to 40
    assert other == pytest.approx(bottom - (bottom - top) * 37 / 40, abs=0.1)
    texts = [one.text for one in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"one", "two & three", "a", "b", "x", "100", "40"} <= set(texts)
    assert all(a < b for a, b in itertools.pairwise([0.0, top, bottom, float(picture.get("viewBox").split()[3])]))
