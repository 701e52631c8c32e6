"""The HTTP service, with a real index behind it."""

import threading

import pytest
from litestar.testing import TestClient

from indexer import open_index
from kvevents import EventPool, Message
from kvindex.http import create_app
from scorer import PrefixScorer

from .conftest import payload

MODEL = "m"


@pytest.fixture
def client():
    index = open_index()
    with EventPool(index) as pool:
        for pod, tokens in (("pod-a", range(32)), ("pod-b", range(16))):
            names = list(range(1, len(tokens) // 16 + 1))
            event = ["BlockStored", names, None, list(tokens), 16, None]
            pool.submit(Message(f"kv@{pod}@{MODEL}".encode(), 0, payload(event)))
        pool.drain()
        app = create_app(PrefixScorer(index), index, pool, max_tokens=100, max_body_bytes=4096)
        with TestClient(app) as opened:
            yield opened


def ask(client, **body):
    return client.post("/v1/score", json={"model": MODEL, "token_ids": list(range(40))} | body)


def test_a_score_is_what_the_pods_hold(client):
    answer = ask(client).json()
    assert answer["scores"] == {"pod-a": 2.0, "pod-b": 1.0}
    assert (answer["best"], answer["block_size"], answer["prompt_tokens"]) == ("pod-a", 16, 40)
    assert [(m["pod"], m["blocks"], m["trust"]) for m in answer["matches"]] == [
        ("pod-a", 2, "exact"),
        ("pod-b", 1, "exact"),
    ]
    assert ask(client, pods=["pod-b"]).json()["scores"] == {"pod-b": 1.0}


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
def test_what_is_no_question_is_refused(client, content):
    response = client.post("/v1/score", content=content)
    assert response.status_code == 400
    assert response.json()["status"] == 400


def test_a_body_that_is_too_large_is_refused(client):
    assert ask(client, model="x" * 5000).status_code == 413


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
