"""Spans of questions, as a collector gets them: a real one's half that takes OTLP over HTTP and reads the protobuf."""

import contextlib
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Proto
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from indexer import IndexUnavailable
from kvindex.config import TracingConfig
from kvindex.errors import UserError
from kvindex.fleet import Fleet
from kvindex.spans import _MOST_WAITING, Spans
from kvindex.tracing import UNDER_WAY, note_error, note_stages, open_tracing
from scorer import InvalidRequest

from .conftest import until
from .grpc_service import HEALTH, LLMD, OURS, field, llmd_request, make_tokenizers
from .grpc_service import MODEL as TEXT_MODEL
from .serving import refusing_port, service

MODEL = "test/model"
TOKENS = [90_000_001 + number for number in range(40)]
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"


class Seen:
    """A span that came, with what belongs to it."""

    def __init__(self, span, resource):
        self.span, self.resource = span, resource
        self.name, self.parent, self.id = span.name, span.parent_span_id.hex(), span.span_id.hex()
        self.attributes = attributes_of(span)
        self.error = span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None
        self.children = []

    @property
    def stages(self):
        return [child.name for child in self.children]


def attributes_of(thing):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in thing.attributes}


class Collector:
    """Takes spans. With `holds` it reads a request and answers when that is set."""

    def __init__(self, holds=None, status=200):
        self.requests, self.headers, self.paths = [], [], []
        self.reached = threading.Event()
        mine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                mine.reached.set()
                if holds is not None:
                    holds.wait(60)
                mine.headers.append(dict(self.headers))
                mine.paths.append(self.path)
                mine.requests.append(body)
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def roots(self):
        """The spans of questions in the order in which they ended, with those of their stages."""
        spans = [
            Seen(span, attributes_of(resource.resource))
            for body in list(self.requests)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        roots = [span for span in spans if span.span.kind == Proto.SPAN_KIND_SERVER]
        for root in roots:
            root.children = [span for span in spans if span.parent == root.id]
        assert sum(1 + len(root.children) for root in roots) == len(spans)
        return roots

    def root(self, before):
        """The one span of a question that comes after so many."""
        until(lambda: len(self.roots()) > before)
        (root,) = self.roots()[before:]
        return root


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


@contextlib.contextmanager
def traced(folder, collector_url, **environ):
    """A service that sends its spans soon."""
    soon = {"OTEL_BSP_SCHEDULE_DELAY": 20}
    with service(folder, tracing_endpoint=collector_url, **soon, **environ) as running:
        yield running


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


# ---- collectors that are not as they should be


def samples_of(served):
    text = httpx.get(f"{served.url}/metrics").text
    return {key: float(value) for key, value in re.findall(r"^(kvindex_spans\S*) (\S+)$", text, re.MULTILINE)}


def ends_well(served):
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(30) == 0
    assert served.events("stopped")


@pytest.mark.parametrize("kind", ["away", "refuses"])
def test_a_collector_that_takes_nothing_costs_no_answer_and_one_line(tmp_path, kind):
    with Collector(status=401) as collector:
        url = collector.url if kind == "refuses" else f"http://127.0.0.1:{refusing_port()}"
        with traced(tmp_path, url, OTEL_EXPORTER_OTLP_TIMEOUT="0.1") as served:
            for _ in range(3):
                lost = samples_of(served)['kvindex_spans_total{outcome="failed"}']
                answer = httpx.post(f"{served.url}/v1/score", json={"model": MODEL, "token_ids": TOKENS})
                assert answer.status_code == 200
                until(lambda lost=lost: samples_of(served)['kvindex_spans_total{outcome="failed"}'] > lost)
            ends_well(served)
            (line,) = served.events("spans_not_taken")
            assert (line["collector"], line["spans"] > 0) == (f"{url}/v1/traces", True)
            assert "401" in line["error"] if kind == "refuses" else line["error"]
            everything = served.log.read_text().splitlines()
            assert all(line.startswith("{") for line in everything), everything


def test_a_collector_that_never_answers_holds_up_nothing(tmp_path):
    with ExitStack() as closing:
        go_on = threading.Event()
        collector = closing.enter_context(Collector(go_on))
        closing.callback(go_on.set)
        served = closing.enter_context(traced(tmp_path, collector.url))
        for _ in range(10):
            answer = httpx.post(f"{served.url}/v1/score", json={"model": MODEL, "token_ids": TOKENS})
            assert answer.status_code == 200
        assert collector.reached.wait(30)
        ends_well(served)
        (line,) = served.events("spans_lost")
        assert line["spans"] > 0


def test_spans_that_are_too_many_are_dropped_and_counted():
    with ExitStack() as closing:
        go_on = threading.Event()
        collector = closing.enter_context(Collector(go_on))
        closing.callback(go_on.set)
        spans = Spans(TracingConfig(endpoint=collector.url))
        for _ in range(_MOST_WAITING // 4 + 10):
            with spans.question("q", {}, {}):
                note_stages(1.0, {"read": 1.0, "match": 1.0, "encode": 1.0})
        outcomes = spans._exporter.outcomes()
        assert outcomes == {"sent": 0, "failed": 0, "dropped": 40}
        assert spans._exporter.waiting == _MOST_WAITING
        go_on.set()
        until(lambda: spans._exporter.waiting == 0)
        assert spans._exporter.outcomes()["sent"] == _MOST_WAITING
        assert all(root.stages == ["read", "match", "encode"] for root in collector.roots())
        with spans.question("after", {}, {}):
            pass
        spans.close()
        assert collector.roots()[-1].name == "after"


def test_what_waits_is_sent_at_the_end(tmp_path):
    with Collector() as collector:
        with service(tmp_path, tracing_endpoint=collector.url, OTEL_BSP_SCHEDULE_DELAY=600_000) as served:
            httpx.post(f"{served.url}/v1/score", json={"model": MODEL, "token_ids": TOKENS})
            assert collector.requests == []
            ends_well(served)
        assert [root.name for root in collector.roots()] == ["POST /v1/score"]


# ---- how it is opened


def test_without_an_endpoint_nothing_is_imported():
    program = """if True:
        import sys
        from contextlib import ExitStack
        import kvindex.serve, kvindex.rpc.server
        from kvindex.config import TracingConfig
        from kvindex.tracing import open_tracing
        assert open_tracing(TracingConfig(), ExitStack()) is None
        # redis takes what it finds of metrics
        ours = ("kvindex.spans", "opentelemetry.exporter", "opentelemetry.sdk.trace")
        print([name for name in sys.modules if name.startswith(ours)])
    """
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=True)
    assert said.stdout == "[]\n"


def test_without_the_packages_the_remedy_is_said():
    program = """if True:
        import os, sys
        sys.modules["opentelemetry"] = None
        os.environ["KVINDEX_TRACING_ENDPOINT"] = "http://otel-collector:4318"
        from kvindex.cli import main
        main()
    """
    command = [sys.executable, "-c", program, "serve", "--port", "0"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1), answer.stderr
    assert "tracing.endpoint http://otel-collector:4318" in answer.stderr
    assert "kv-cache-indexer[otel]" in answer.stderr


@pytest.mark.parametrize("endpoint", ["otel:4318", "grpc://otel:4317", "http://", "http://h:99999", "http://h/?a=b"])
def test_an_endpoint_that_cannot_be_one_is_refused(endpoint):
    with ExitStack() as running, pytest.raises(UserError, match=r"^tracing\.endpoint .*expected http://HOST:PORT"):
        open_tracing(TracingConfig(endpoint=endpoint), running)


@pytest.mark.parametrize("headers", [{"a b": "secret"}, {"": "secret"}, {"a": "secret\n"}, {"a": "secretä"}])
def test_a_header_that_cannot_be_one_is_refused_and_not_shown(headers):
    config = TracingConfig(endpoint="http://otel:4318", headers=headers)
    with ExitStack() as running, pytest.raises(UserError, match=r"^tracing\.headers ") as caught:
        open_tracing(config, running)
    assert "secret" not in str(caught.value)


def test_a_variable_of_the_sdk_that_cannot_be_used_is_said(monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "0")
    with ExitStack() as running, pytest.raises(UserError, match=r"^tracing\.endpoint .*must be positive"):
        open_tracing(TracingConfig(endpoint="http://otel:4318"), running)


@pytest.mark.parametrize("path", ["", "/", "/v1/traces"])
def test_the_path_may_be_left_out(path):
    with Collector() as collector, ExitStack() as running:
        spans = open_tracing(TracingConfig(endpoint=collector.url + path), running)
        with spans.question("q", {}, {}):
            pass
        running.close()
        assert collector.paths == ["/v1/traces"]
