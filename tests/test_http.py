"""The HTTP service, with a real index behind it."""

import asyncio
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from litestar.testing import TestClient

from indexer import open_index
from kvevents import EventPool, Message
from kvindex.http import create_app
from kvindex.questions import MOST_VALUES
from scorer import PrefixScorer

from .conftest import payload
from .serving import service, serving

MODEL = "m"
QUESTION = {"model": MODEL, "token_ids": list(range(40))}


@pytest.fixture
def client():
    index = open_index()
    with EventPool(index) as pool:
        for pod, tokens in (("pod-a", range(32)), ("pod-b", range(16))):
            names = list(range(1, len(tokens) // 16 + 1))
            event = ["BlockStored", names, None, list(tokens), 16, None]
            pool.submit(Message(f"kv@{pod}@{MODEL}".encode(), 0, payload(event)))
        pool.drain()
        app = create_app(PrefixScorer(index), index, pool, max_tokens=100, max_body_bytes=20_000)
        with TestClient(app) as opened:
            yield opened


def ask(client, **body):
    return client.post("/v1/score", json=QUESTION | body)


def test_a_score_is_what_the_pods_hold(client):
    answer = ask(client).json()
    assert answer["scores"] == {"pod-a": 2.0, "pod-b": 1.0}
    assert (answer["best"], answer["block_size"], answer["prompt_tokens"]) == ("pod-a", 16, 40)
    assert [(m["pod"], m["blocks"], m["trust"]) for m in answer["matches"]] == [
        ("pod-a", 2, "exact"),
        ("pod-b", 1, "exact"),
    ]
    assert ask(client, pods=["pod-b"]).json()["scores"] == {"pod-b": 1.0}


def test_pods_that_hold_nothing_are_left_out_where_that_is_asked(client):
    client.put("/v1/pods/pod-c", json={"endpoint": "tcp://127.0.0.1:1", "model": MODEL})
    try:
        everyone = ask(client).json()
        assert [match["pod"] for match in everyone["matches"]] == ["pod-a", "pod-b", "pod-c"]
        assert ask(client, holders_only=True).json() == everyone | {"matches": everyone["matches"][:2]}
        batch = client.post("/v1/score_batch", json={"questions": [QUESTION | {"holders_only": True}]}).json()
        assert batch["answers"] == [everyone | {"matches": everyone["matches"][:2]}]
        assert ask(client, holders_only=1).json()["field"] == "holders_only"
    finally:
        client.delete("/v1/pods/pod-c")


@pytest.mark.parametrize("body", [{"model": "never"}, {"pods": ["never"]}, {"token_ids": []}, {"cache_salt": "x"}])
def test_what_nobody_holds_is_an_empty_score(client, body):
    response = ask(client, **body)
    assert response.status_code == 200
    assert response.json()["scores"] == {}
    assert response.json()["best"] is None


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": ["a"]}, "token_ids"),
        ({"token_ids": None}, "token_ids"),
        ({"token_ids": [1] * 101}, "token_ids"),
        ({"model": 5}, "model"),
        ({"pods": "pod-a"}, "pods"),
        ({"unknown": 1}, "unknown"),
        ({"mm_items": [["a", -1, 2]]}, "mm_items"),
    ],
)
def test_a_bad_question_is_refused_by_the_fields_name(client, body, names):
    response = ask(client, **body)
    assert response.status_code == 400
    assert names in response.json()["detail"]
    assert "Traceback" not in response.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 3000])
@pytest.mark.parametrize("route", ["score", "score_batch", "routed", "observe"])
def test_what_is_no_question_is_refused(client, content, route):
    response = client.post(f"/v1/{route}", content=content)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["title"]) == (400, "Bad Request")
    assert problem["detail"]


def test_a_body_that_is_too_large_is_refused(client):
    response = ask(client, model="x" * 25_000)
    assert response.status_code == 413
    assert "20000 bytes" in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"token_ids": [1, 2, "a"]}, "token_ids[2]"),
        ({"token_ids": [1, 2.5]}, "token_ids[1]"),
        ({"token_ids": [2**32]}, "token_ids[0]"),
        ({"token_ids": [1, True]}, "token_ids[1]"),
        ({"token_ids": None, "prompt": [True]}, "prompt[0]"),
        ({"token_ids": None, "prompt": [1.0, False, "a"]}, "prompt[1]"),
        ({"token_ids": None, "prompt": [[1], [2, False]]}, "prompt[1][1]"),
        ({"token_ids": [1] * 101}, "token_ids"),
        ({"model": ""}, "model"),
        ({"model": "x" * 513}, "model"),
        ({"lora_name": -1}, "lora_name"),
        ({"lora_name": 2**63}, "lora_name"),
        ({"pods": [""]}, "pods[0]"),
        ({"mm_items": [["a", 0, -1]]}, "mm_items[0][2]"),
        ({"mm_items": [["a", 0, 30], ["b", 5, 30]]}, "mm_items"),
        ({"tokenids": [1]}, "tokenids"),
    ],
)
def test_a_problem_names_the_field(client, body, field):
    assert ask(client, **body).json()["field"] == field
    answer = client.post("/v1/score_batch", json={"questions": [QUESTION, QUESTION | body]})
    assert answer.status_code == 400
    assert answer.json()["field"] == f"questions[1].{field}"


def test_whole_numbers_are_whole_however_they_are_written(client):
    text = b'{"model": "m", "token_ids": [%s], "mm_items": [["a", 33.0, 2]]}'
    ids = b",".join(b"%d.0" % token for token in range(40))
    answer = client.post("/v1/score", content=text % ids)
    assert answer.json()["scores"] == {"pod-a": 2.0, "pod-b": 1.0}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("token_ids", b"1.0", "token_ids: Expected `array`"),
        ("token_ids", b"[1.0," + b"9" * 900 + b"]", "token_ids[1]: "),
        ("token_ids", b"[1.0,true]", "token_ids[1]: Expected `int`, got `bool`"),
        ("token_ids", b'[1.0,"1"]', "token_ids"),
        ("token_ids", b"[1.0,1e300]", "token_ids"),
        ("prompt", b"[1e400]", "prompt[0]: Number out of range"),
        ("rank", b"1.5", "rank"),
    ],
)
def test_odd_numbers_are_refused_by_the_fields_name(client, field, value, says):
    for route, start in (
        ("score", b""),
        ("routed", b'"pod":"pod-a",'),
        ("observe", b'"pod":"pod-a","cached_tokens":0,'),
    ):
        rest = b',"token_ids":[1]' if field == "rank" else b""
        body = b'{%s"model":"m","%s":%s%s}' % (start, field.encode(), value, rest)
        answer = client.post(f"/v1/{route}", content=body)
        assert answer.status_code == 400, route
        assert says in answer.json()["detail"]


def test_what_nobody_reads_may_hold_any_json(client):
    for junk in (b"9" * 5000, b"1e400", b"[" * 900 + b"]" * 900):
        answer = client.post("/v1/score", content=b'{"model":"m","prompt":[1,2],"max_tokens":%s}' % junk)
        assert answer.status_code == 200


LARGE = 1_200_000
MANY = MOST_VALUES + 10


@pytest.fixture
def roomy():
    index = open_index()
    with EventPool(index) as pool:
        app = create_app(PrefixScorer(index), index, pool, max_tokens=LARGE, max_body_bytes=1 << 24)
        with TestClient(app) as opened:
            yield opened


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","prompt":[' + b"[]," * MANY + b"[]]}",
        b'{"model":"m","prompt":[1],"j":[' + b"1," * MANY + b"1]}",
        b'{"model":"m","messages":[{"role":"user","content":"a","j":[' + b"{}," * MANY + b'"\\""]}]}',
        b'{"model":"m","mm_items":[' + b'["",0,0],' * MANY + b'["",0,0]],"token_ids":[1]}',
        b'{"model":"m","pods":[' + b'"a",' * MANY + b'"a"],"token_ids":[1]}',
        b'{"model":"m","truncate_prompt_tokens":1.0,"prompt":[' + b"[]," * MANY + b"[]]}",
    ],
)
def test_a_body_of_very_many_values_is_refused_before_it_is_read(roomy, body):
    answer = roomy.post("/v1/score", content=body).json()
    assert f"at most {MOST_VALUES} are read" in answer["detail"]
    assert answer["field"] == "body"


@pytest.mark.parametrize("start", [b"[", b"{"])
def test_a_batch_of_very_many_values_is_refused_before_it_is_read(roomy, start):
    junk = start + bytes([start[0] + 2])
    body = b'{"questions":[' + (junk + b",") * MANY + junk + b"]}"
    assert "values" in roomy.post("/v1/score_batch", content=body).json()["detail"]
    numbers = b'{"questions":[' + b"0," * 2 * MANY + b"0]}"
    assert "questions[0]: Expected `object`" in roomy.post("/v1/score_batch", content=numbers).json()["detail"]


def test_rows_of_ids_and_signs_in_text_are_no_values(roomy):
    ids = b"[" + b"1," * (LARGE - 1) + b"1]"
    for field in (b"token_ids", b"prompt"):
        answer = roomy.post("/v1/score", content=b'{"model":"m","%s":%s}' % (field, ids))
        assert answer.json()["prompt_tokens"] == LARGE
        answer = roomy.post("/v1/score", content=b'{"model":"m","%s":[-1,%s}' % (field, ids[1:]))
        assert f"{LARGE + 1} tokens, at most {LARGE}" in answer.json()["detail"]
        assert answer.json()["field"] == field.decode()
    text = rb",[{\\\"" * MANY
    assert roomy.post("/v1/score", content=b'{"model":"m","prompt":"%s"}' % text).status_code == 422


def test_prompts_of_a_request_are_bounded(client):
    items = {"model": MODEL, "prompt": [[1], [2]], "mm_items": [["a", 0, 1]]}
    assert "mm_items: given for 2 prompts" in ask_whole(client, items)["detail"]
    many = [{"model": MODEL, "prompt": [[]] * 600}] * 7
    answer = client.post("/v1/score_batch", content=json.dumps({"questions": many}, separators=(",", ":"))).json()
    assert (answer["field"], "at most 4096" in answer["detail"]) == ("questions[6].prompt", True)


def ask_whole(client, body):
    return client.post("/v1/score", json=body).json()


def test_a_batch_is_many_questions(client):
    questions = [QUESTION, QUESTION | {"pods": ["pod-b"]}, QUESTION | {"model": "never"}, QUESTION | {"timings": True}]
    response = client.post("/v1/score_batch", json={"questions": questions})
    answers = response.json()["answers"]
    for question, answer in zip(questions, answers, strict=True):
        alone = client.post("/v1/score", json=question).json()
        assert (answer.pop("timings", None) is None) == (alone.pop("timings", None) is None)
        assert answer == alone
    assert client.post("/v1/score_batch", json={"questions": []}).json() == {"answers": []}
    assert "kvcache_index_lookup_requests_total 8.0" in client.get("/metrics").text


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (
            {"questions": [QUESTION, QUESTION | {"prompt": [1] * 101, "token_ids": None}]},
            "questions[1].prompt: 101 tokens, at most 100",
        ),
        ({"questions": [0] * 1025}, "questions: Expected `array` of length <= 1024"),
        ({"questions": [QUESTION, {"model": "m", "prompt": "a"}]}, "questions[1]: model 'm'"),
        ({"questions": [{"model": "m"}]}, "questions[0].token_ids, prompt or messages"),
        ({"questions": 5}, "questions: "),
        ({"questions": [5]}, "questions[0]"),
        ({}, "questions"),
        ({"questions": [], "x": 1}, "x"),
    ],
)
def test_a_batch_is_answered_whole_or_not_at_all(client, batch, says):
    response = client.post("/v1/score_batch", content=json.dumps(batch, separators=(",", ":")))
    assert response.status_code == (422 if "model 'm'" in says else 400)
    assert says in response.json()["detail"]
    text = client.get("/metrics").text
    assert 'kvindex_questions_total{by="http",outcome="refused"} 1.0' in text
    assert "kvcache_index_lookup_requests_total 0.0" in text


def test_an_answer_says_what_took_how_long(client):
    said = ask(client).headers["server-timing"]
    stages = dict(re.fullmatch(r"(\w+);dur=([0-9.]+)", part).groups() for part in said.split(", "))
    assert stages.keys() == {"read", "match", "encode"}
    assert all(float(milliseconds) >= 0 for milliseconds in stages.values())
    answer = client.post("/v1/score_batch", json={"questions": [QUESTION]})
    assert {"read", "match"} <= {part.partition(";")[0] for part in answer.headers["server-timing"].split(", ")}


def test_the_other_routes(client):
    pods = client.get("/v1/pods").json()["pods"]
    assert [(p["pod"], p["blocks"], p["last_seq"], p["trust"]) for p in pods] == [
        ("pod-a", 2, 0, "exact"),
        ("pod-b", 1, 0, "exact"),
    ]
    assert client.get("/healthz").json() == {"status": "up"}
    assert client.get("/readyz").status_code == 200
    ask(client)
    metrics = client.get("/metrics").text
    assert "kvcache_index_lookup_requests_total 1.0" in metrics
    assert 'kvindex_pod_blocks{pod="pod-a",rank="0",tier="gpu"} 2.0' in metrics
    assert 'kvindex_pod_degraded{pod="pod-a",rank="0",reason=""} 0.0' in metrics
    assert "/v1/score" in client.get("/schema/openapi.json").json()["paths"]
    assert client.delete("/v1/pods/pod-a").status_code == 204
    assert ask(client).json()["best"] == "pod-b"


def tell(client, route, **body):
    told = {"model": MODEL, "pod": "pod-b", "token_ids": list(range(40))} | body
    return client.post(f"/v1/{route}", json={name: value for name, value in told.items() if value is not None})


def test_what_routers_tell_back(client):
    assert tell(client, "routed").json() == {"pod": "pod-b"}
    matches = {match["pod"]: match for match in ask(client).json()["matches"]}
    assert (matches["pod-b"]["blocks"], matches["pod-b"]["speculative_blocks"]) == (1, 1)
    assert (matches["pod-a"]["speculative_tokens"], matches["pod-b"]["speculative_tokens"]) == (0, 16)
    seen = tell(client, "observe", cached_tokens=16).json()
    assert (seen["outcome"], seen["predicted_tokens"], seen["error_blocks"]) == ("routed_elsewhere", 16, 0)
    assert tell(client, "observe", pod="pod-a", cached_tokens=32, rank=0).json()["outcome"] == "reused"
    metrics = client.get("/metrics").text
    assert 'kvindex_observations_total{outcome="routed_elsewhere",pod="pod-b",rank="0"} 1.0' in metrics
    assert 'kvindex_prediction_error_blocks_bucket{le="0.0",pod="pod-a",rank="0"} 1.0' in metrics
    assert 'kvindex_prediction_error_blocks_count{pod="pod-b",rank="0"} 1.0' in metrics


@pytest.mark.parametrize(
    ("route", "body", "status", "names"),
    [
        ("routed", {"pod": "nobody"}, 404, "nobody"),
        ("routed", {"rank": 7}, 404, "rank 7"),
        ("observe", {"pod": "nobody", "cached_tokens": 1}, 404, "nobody"),
        ("observe", {}, 400, "cached_tokens"),
        ("observe", {"cached_tokens": 41}, 400, "cached_tokens"),
        ("observe", {"cached_tokens": -1}, 400, "cached_tokens"),
        ("observe", {"cached_tokens": 1, "token_ids": [1] * 101}, 400, "token_ids"),
        ("routed", {"token_ids": [-1]}, 400, "token_ids"),
        ("routed", {"pod": None}, 400, "pod"),
        ("routed", {"cached_tokens": 1}, 400, "cached_tokens"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(client, route, body, status, names):
    response = tell(client, route, **body)
    assert response.status_code == status
    assert names in response.json()["detail"]
    assert 'pod="nobody"' not in client.get("/metrics").text


def test_questions_in_parallel(client):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(client).json()["best"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["pod-a"] * 8


class WaitingIndex:
    """An index that must not be asked on an event loop, as one that asks Redis."""

    def __init__(self, index):
        self._index = index

    def __getattr__(self, name):
        if name == "never_waits":
            raise AttributeError
        if name in ("match", "block_size", "sources", "stats"):
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
        return getattr(self._index, name)


@pytest.mark.parametrize("route", ["score", "score_batch", "routed", "observe", "pods", "stats"])
def test_the_event_loop_waits_for_no_index(route):
    index = WaitingIndex(open_index())
    with EventPool(index) as pool:
        app = create_app(PrefixScorer(index), index, pool, max_tokens=100, max_body_bytes=4096)
        with TestClient(app) as client:
            bodies = {
                "score": QUESTION,
                "score_batch": {"questions": [QUESTION]},
                "routed": QUESTION | {"pod": "a"},
                "observe": QUESTION | {"pod": "a", "cached_tokens": 1},
            }
            body = bodies.get(route)
            answer = client.get(f"/v1/{route}") if body is None else client.post(f"/v1/{route}", json=body)
            assert answer.status_code == (404 if route in ("routed", "observe") else 200), answer.text


def test_what_is_said_of_a_pod_is_short(client):
    follow = {"endpoint": "tcp://127.0.0.1:1"}
    answer = client.put(f"/v1/pods/{'a' * 513}", json=follow)
    assert (answer.status_code, "513 characters" in answer.json()["detail"]) == (400, True)
    answer = client.put("/v1/pods/a", json=follow | {"topic": "t" * 300_000})
    assert (answer.status_code, "262144 bytes" in answer.json()["detail"]) == (413, True)
    answer = client.put("/v1/pods/a", json={"endpoint": "x"})
    assert (answer.status_code, answer.json()["field"]) == (400, "body")


@pytest.mark.parametrize("field", ["endpoint", "replay", "model", "topic", "uid", "address"])
def test_each_text_about_a_pod_is_bounded(client, field):
    body = {"endpoint": "tcp://127.0.0.1:1"}
    answer = client.put("/v1/pods/a", json=body | {field: "tcp://" + "x" * 1_019})
    assert (answer.status_code, answer.json()["field"]) == (400, field)
    assert "1024" in answer.json()["detail"]


@pytest.mark.parametrize("endpoint", ["ipc:///run/engine", "inproc://engine"])
def test_a_request_names_no_place_in_this_machine(client, endpoint):
    for body in ({"endpoint": endpoint}, {"endpoint": "tcp://127.0.0.1:1", "replay": endpoint}):
        answer = client.put("/v1/pods/a", json=body)
        assert (answer.status_code, endpoint in answer.json()["detail"]) == (400, True)
    assert "a" not in {pod["pod"] for pod in client.get("/v1/pods").json()["pods"]}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/score", {"OPTIONS", "POST"}),
        ("HEAD", "/v1/score", {"OPTIONS", "POST"}),
        ("POST", "/healthz", {"GET", "HEAD", "OPTIONS"}),
        ("DELETE", "/v1/pods", {"GET", "HEAD", "OPTIONS"}),
        ("TRACE", "/v1/snapshot", {"GET", "HEAD", "OPTIONS"}),
        ("POST", "/v1/pods/a", {"DELETE", "OPTIONS", "PUT"}),
    ],
)
def test_who_uses_another_method_is_told_which_there_are(client, method, path, allowed):
    answer = client.request(method, path)
    assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, allowed)
    assert method == "HEAD" or answer.json()["status"] == 405


def test_whatever_can_be_had_has_a_head(tmp_path):
    with service(tmp_path) as served, httpx.Client(base_url=served.url) as client:
        for path in ("/healthz", "/readyz", "/metrics", "/v1/pods", "/schema"):
            head, whole = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (whole.status_code, b"")
            assert head.headers["content-type"] == whole.headers["content-type"]
            assert int(head.headers["content-length"]) > 0
            assert set(client.options(path).headers["allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
        assert (client.head("/v1/score").status_code, client.head("/v1/none").status_code) == (405, 404)


def test_the_head_of_a_snapshot_makes_none(tmp_path):
    with service(tmp_path) as served, httpx.Client(base_url=served.url) as client:
        head, whole = client.head("/v1/snapshot"), client.get("/v1/snapshot")
        assert head.headers["content-type"] == whole.headers["content-type"]
        assert (head.content, "kvindex_snapshots_given_total 1.0" in client.get("/metrics").text) == (b"", True)


class HeldIndex(WaitingIndex):
    """An index whose answers wait until they may go on."""

    def __init__(self, index):
        super().__init__(index)
        self.asked, self.go_on = threading.Semaphore(0), threading.Event()

    def match(self, *args, **kwargs):
        self.asked.release()
        assert self.go_on.wait(30)
        return self._index.match(*args, **kwargs)


def test_probes_are_answered_while_questions_hold_all_threads():
    index = HeldIndex(open_index())
    with EventPool(index) as pool:
        app = create_app(PrefixScorer(index), index, pool, max_tokens=100, max_body_bytes=4096)
        with serving(app) as (url,), ThreadPoolExecutor(64) as clients:
            threads = min(32, (os.cpu_count() or 1) + 4)  # what asyncio has for all
            asked = [
                clients.submit(httpx.post, f"{url}/v1/score", json=QUESTION, timeout=30) for _ in range(threads + 1)
            ]
            try:
                assert all(index.asked.acquire(timeout=30) for _ in range(threads))
                for path in ("/healthz", "/readyz", "/metrics"):
                    assert httpx.get(f"{url}{path}", timeout=30).status_code == 200
                assert not any(answer.done() for answer in asked)
            finally:
                index.go_on.set()
            assert {answer.result().status_code for answer in asked} == {200}
