"""Spans of questions, as a collector gets them."""

import json
import re

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from indexer import IndexUnavailable
from kvindex.config import TracingConfig
from kvindex.fleet import Fleet
from kvindex.spans import Spans
from kvindex.tracing import UNDER_WAY, note_error, note_stages
from scorer import InvalidRequest

from .collecting import MODEL, TOKENS, Collector, traced
from .conftest import until
from .grpc_service import HEALTH, LLMD, OURS, field, llmd_request, make_tokenizers
from .grpc_service import MODEL as TEXT_MODEL
from .serving import refusing_port

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"


class Asked:
    """A service with a collector and some pods that hold the whole of `TOKENS`."""

    def __init__(self, served, collector):
        self.served, self.collector = served, collector

    def post(self, route, *, trace=SAMPLED, model=MODEL, **body):
        """Ask; give the answer and its span."""
        before = len(self.collector.roots())
        headers = {"traceparent": trace} if trace else {}
        if "prompt" not in body and "messages" not in body and "questions" not in body:
            body = {"token_ids": TOKENS} | body
        body = body if "questions" in body else {"model": model} | body
        answer = httpx.post(f"{self.served.url}/v1/{route}", json=body, headers=headers)
        return answer, self.collector.root(before)

    def call(self, method, payload, metadata=(("traceparent", SAMPLED),)):
        """Call; give the status and its span."""
        before = len(self.collector.roots())
        return call(self.served, method, payload, metadata), self.collector.root(before)


def call(served, method, payload, metadata=()):
    with grpc.insecure_channel(served.grpc) as channel:
        try:
            channel.unary_unary(method)(payload, metadata=metadata, timeout=20)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced")
    make_tokenizers(folder / "models")
    with Fleet(2, model=MODEL, block_size=16) as fleet, Collector() as collector:
        for pod in range(2):
            fleet.step(pod, TOKENS)
        pods, folders = json.dumps(fleet.endpoints()), json.dumps([str(folder / "models")])
        with traced(folder, collector.url, grpc=True, pods=pods, tokenizers_folders=folders) as served:
            question = {"model": MODEL, "token_ids": TOKENS}
            url = f"{served.url}/v1/score"
            until(lambda: len(httpx.post(url, json=question, headers={"traceparent": UNSAMPLED}).json()["scores"]) == 2)
            yield Asked(served, collector)


# ---- what a span says


def test_a_question_over_http_is_a_child_of_its_caller_and_says_what_was_found(asked):
    answer, span = asked.post("score")
    assert span.span.trace_id.hex() == TRACE
    assert (span.parent, span.name, span.error) == (SPAN, "POST /v1/score", None)
    found = answer.json()
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/score",
        "url.path": "/v1/score",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "client.address": "127.0.0.1",
        "http.response.status_code": 200,
        "kvindex.model": MODEL,
        "kvindex.prompt_tokens": 40,
        "kvindex.block_size": 16,
        "kvindex.pods": 2,
        "kvindex.best_blocks": 2,
    }
    assert (found["prompt_tokens"], found["block_size"], len(found["scores"])) == (40, 16, 2)
    assert max(match["blocks"] for match in found["matches"]) == 2
    assert span.resource["service.name"] == "kvindex"
    assert {"service.version", "host.name"} <= span.resource.keys()


def test_its_stages_are_those_of_the_answer_one_after_the_other(asked):
    answer, span = asked.post("score")
    said = re.findall(r"(\w+);dur=([0-9.]+)", answer.headers["server-timing"])
    assert span.stages == [name for name, _ in said] == ["read", "match", "encode"]
    for child, (_, milliseconds) in zip(span.children, said, strict=True):
        took = child.span.end_time_unix_nano - child.span.start_time_unix_nano
        assert took / 1e6 == pytest.approx(float(milliseconds), abs=0.002)
        assert child.span.trace_id.hex() == TRACE
        # it lies in its question, but for what is between two looks at two clocks
        assert span.span.start_time_unix_nano - 1_000_000 < child.span.start_time_unix_nano
        assert child.span.end_time_unix_nano < span.span.end_time_unix_nano + 1_000_000
    for one, after in zip(span.children, span.children[1:], strict=False):
        assert abs(after.span.start_time_unix_nano - one.span.end_time_unix_nano) < 1_000


def test_text_has_the_stages_that_tokens_have_not(asked):
    _, span = asked.post("score", model=TEXT_MODEL, prompt="1 2 3")
    assert span.stages == ["read", "tokenize", "match", "encode"]
    assert span.attributes["kvindex.prompt_tokens"] == 3
    _, span = asked.post("score", model=TEXT_MODEL, messages=[{"role": "user", "content": "1 2 3"}])
    assert span.stages == ["read", "render", "tokenize", "match", "encode"]


def test_a_batch_says_what_its_questions_have_together(asked):
    questions = [{"model": MODEL, "token_ids": TOKENS}, {"model": MODEL, "token_ids": TOKENS[:20]}]
    _, span = asked.post("score_batch", questions=questions)
    assert (span.name, span.stages) == ("POST /v1/score_batch", ["read", "match", "encode"])
    numbers = {name: value for name, value in span.attributes.items() if name.startswith("kvindex.")}
    assert numbers == {
        "kvindex.model": MODEL,
        "kvindex.prompt_tokens": 60,
        "kvindex.block_size": 16,
        "kvindex.pods": 2,
        "kvindex.best_blocks": 3,
    }


@pytest.mark.parametrize("route", ["routed", "observe"])
def test_what_routers_tell_is_traced_too(asked, route):
    pod = next(iter(asked.post("score")[0].json()["scores"]))
    answer, span = asked.post(route, pod=pod, **({"cached_tokens": 32} if route == "observe" else {}))
    assert answer.status_code == 200
    assert (span.name, span.parent, span.error) == (f"POST /v1/{route}", SPAN, None)
    assert (span.attributes["kvindex.model"], span.attributes["kvindex.prompt_tokens"]) == (MODEL, 40)


def test_what_is_no_question_is_not_traced(asked):
    before = len(asked.collector.roots())
    headers = {"traceparent": SAMPLED}
    for path in ("/healthz", "/v1/pods", "/metrics", "/v1/score"):
        httpx.get(asked.served.url + path, headers=headers)
    assert call(asked.served, f"{HEALTH}Check", b"", (("traceparent", SAMPLED),)) == grpc.StatusCode.OK
    _, span = asked.post("score")  # it waited behind them
    assert span.name == "POST /v1/score"
    assert len(asked.collector.roots()) == before + 1


@pytest.mark.parametrize(
    ("method", "payload", "says"),
    [
        (
            OURS,
            field(1, MODEL) + field(2, TOKENS),
            {"kvindex.model": MODEL, "kvindex.prompt_tokens": 40, "kvindex.block_size": 16, "kvindex.pods": 2}
            | {"kvindex.best_blocks": 2},
        ),
        (LLMD, llmd_request("1 2 3", TEXT_MODEL), {"kvindex.model": TEXT_MODEL, "kvindex.prompt_tokens": 3}),
    ],
)
def test_a_call_over_grpc_is_a_child_of_its_caller(asked, method, payload, says):
    code, span = asked.call(method, payload)
    assert (code, span.error) == (grpc.StatusCode.OK, None)
    assert (span.name, span.parent, span.span.trace_id.hex()) == (method[1:], SPAN, TRACE)
    assert span.attributes.items() >= says.items()
    rpc = {name: value for name, value in span.attributes.items() if name.startswith("rpc.")}
    assert rpc == {"rpc.system.name": "grpc", "rpc.method": method[1:], "rpc.response.status_code": "OK"}
    assert span.stages == (["read", "tokenize", "match", "encode"] if method == LLMD else ["read", "match", "encode"])


# ---- errors


@pytest.mark.parametrize(
    ("body", "status", "kind", "says"),
    [
        ({"token_ids": [1, "two"]}, 400, "InvalidRequest", "Bad Request: token_ids[1]"),
        ({"messages": [{"role": 7}]}, 400, "InvalidRequest", "Bad Request: messages[0].role"),
        ({"prompt": "1", "model": "a/stranger"}, 422, "NoTokenizer", "Unprocessable Entity"),
        ({"token_ids": TOKENS, "pod": "stranger"}, 404, "Not Found", "Not Found"),
    ],
)
def test_a_refusal_sets_the_status_and_names_the_field(asked, body, status, kind, says):
    answer, span = asked.post("routed" if "pod" in body else "score", **({"model": TEXT_MODEL} | body))
    assert answer.status_code == span.attributes["http.response.status_code"] == status
    assert (span.attributes["error.type"], span.error) == (kind, says)


def test_a_refusal_over_grpc_does_too(asked):
    code, span = asked.call(OURS, field(1, MODEL))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert span.error == "INVALID_ARGUMENT: token_ids"
    assert span.attributes["error.type"] == "InvalidRequest"
    assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    code, span = asked.call(LLMD, llmd_request("1", "a/stranger"))
    assert (code, span.error) == (grpc.StatusCode.FAILED_PRECONDITION, "FAILED_PRECONDITION")


def test_of_an_index_that_is_away_all_is_said(tmp_path):
    with Collector() as collector:
        index = f"redis://user:hidden@127.0.0.1:{refusing_port()}/0"
        with traced(tmp_path, collector.url, index_url=index, index_role="scorer") as served:
            answer = httpx.post(f"{served.url}/v1/score", json={"model": MODEL, "token_ids": TOKENS})
            assert answer.status_code == 503
            span = collector.root(0)
    assert span.attributes["error.type"] == "IndexUnavailable"
    assert span.error == f"Service Unavailable: {answer.json()['detail']}"
    assert b"hidden" not in b"".join(collector.requests)


def test_what_is_cut_off_is_an_error(tmp_path):
    """And a stage or an error noted where nothing is traced is noted nowhere."""
    with Collector() as collector:
        spans = Spans(TracingConfig(endpoint=collector.url))
        with pytest.raises(KeyboardInterrupt), spans.question("cut off", {}, {}):
            raise KeyboardInterrupt
        assert UNDER_WAY.get() is None
        note_stages(0.0, {"read": 1.0})
        note_error(IndexUnavailable("away"))
        spans.close()
        (span,) = collector.roots()
    assert (span.error, span.attributes, span.children) == (
        "KeyboardInterrupt",
        {"error.type": "KeyboardInterrupt"},
        [],
    )


def test_nothing_of_a_prompt_and_no_token_of_access_gets_out(tmp_path):
    access, salt, text = "open-sesame", "pinch-of-salt", "once upon a midnight dreary"
    make_tokenizers(tmp_path / "models")
    folders = json.dumps([str(tmp_path / "models")])
    with (
        Collector() as collector,
        traced(tmp_path, collector.url, grpc=True, access_token=access, tokenizers_folders=folders) as served,
    ):
        bearer = {"Authorization": f"Bearer {access}"}
        bodies = [
            {"model": MODEL, "token_ids": TOKENS, "cache_salt": salt},
            {"model": MODEL, "token_ids": [-1, *TOKENS], "cache_salt": salt},
            {"model": TEXT_MODEL, "prompt": text, "cache_salt": salt},
            {"model": TEXT_MODEL, "messages": [{"role": "user", "content": text}]},
            {"model": TEXT_MODEL, "messages": [{"role": [text], "content": text}]},
            {"model": TEXT_MODEL, "messages": [{"role": "user", "content": [{"type": text}]}]},
            {"model": TEXT_MODEL, "messages": "x", "prompt": text},
        ]
        stranger = httpx.post(f"{served.url}/v1/score", json=bodies[0], headers={"Authorization": f"Bearer x{access}"})
        assert stranger.status_code == 401
        assert call(served, OURS, field(1, MODEL)) == grpc.StatusCode.UNAUTHENTICATED
        statuses = [httpx.post(f"{served.url}/v1/score", json=body, headers=bearer).status_code for body in bodies]
        assert statuses == [200, 400, 200, 200, 400, 400, 400]
        metadata = (("authorization", bearer["Authorization"]),)
        payloads = [(OURS, field(1, MODEL) + field(2, TOKENS) + field(6, salt)), (LLMD, llmd_request(text, TEXT_MODEL))]
        for method, payload in payloads:
            call(served, method, payload, metadata)
        count = len(bodies) + len(payloads)
        until(lambda: len(collector.roots()) >= count)
        assert len(collector.roots()) == count  # a stranger's are none
        shown = "".join(str(ExportTraceServiceRequest.FromString(body)) for body in collector.requests)
    for secret in (access, salt, text, "midnight", str(TOKENS[0]), str(TOKENS[-1])):
        assert secret not in shown


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (InvalidRequest("messages[0].role: expected text, got 'secret'"), "messages[0].role"),
        (InvalidRequest("http://vllm/tokenize refuses it: secret"), ""),
        (InvalidRequest("a: " * 99), "a"),
        (InvalidRequest(f"{'a' * 99}: x"), "a" * 80),
        (ValueError("secret: secret"), ""),
        (IndexUnavailable("redis:6379: away"), "redis:6379: away"),
    ],
)
def test_of_an_error_only_the_field_is_told_on(error, says):
    spans = Spans(TracingConfig(endpoint="http://127.0.0.1:1", sample_ratio=1))
    with spans.question("q", {}, {}) as trace:
        note_error(error)
        assert (trace.error, trace.wrong) == (error, says)
    spans._exporter.shutdown()
    spans.close()


# ---- sampling


def test_the_caller_decides_where_it_says_so(asked):
    before = len(asked.collector.roots())
    for _ in range(3):
        httpx.post(
            f"{asked.served.url}/v1/score",
            json={"model": MODEL, "token_ids": TOKENS},
            headers={"traceparent": UNSAMPLED},
        )
    _, span = asked.post("score", trace=None)
    assert span.parent == ""
    assert span.span.trace_id.hex() != TRACE
    assert len(asked.collector.roots()) == before + 1
    _, span = asked.post("score", trace="00-no-such-thing")
    assert span.parent == ""


def test_of_the_others_a_share_is_traced(tmp_path):
    environ = {"tracing_sample_ratio": 0, "tracing_service_name": "index-1", "tracing_headers": '{"X-Scope": "me"}'}
    with (
        Collector() as collector,
        traced(tmp_path, collector.url, grpc=True, OTEL_EXPORTER_OTLP_COMPRESSION="none", **environ) as served,
    ):
        asked = Asked(served, collector)
        for _ in range(5):
            httpx.post(f"{served.url}/v1/score", json={"model": MODEL, "token_ids": TOKENS})
            call(served, OURS, field(1, MODEL) + field(2, TOKENS))
        _, span = asked.post("score")
        assert (span.parent, len(collector.roots())) == (SPAN, 1)
        assert span.resource["service.name"] == "index-1"
        assert collector.headers[0]["x-scope"] == "me"
        assert collector.paths[0] == "/v1/traces"
