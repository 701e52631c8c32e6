"""Collectors that are not as they should be, and how tracing is opened."""

import re
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack

import httpx
import pytest

from kvindex.config import TracingConfig
from kvindex.errors import UserError
from kvindex.spans import _MOST_WAITING, Spans
from kvindex.tracing import note_stages, open_tracing

from .collecting import MODEL, TOKENS, Collector, traced
from .conftest import until
from .serving import refusing_port, service


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
