"""Spans of questions, sent to an OpenTelemetry collector. It needs the packages of the extra ``otel``."""

import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from importlib import metadata
from urllib.parse import urlsplit

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvindex.config import TracingConfig
from kvindex.tracing import UNDER_WAY, Trace

_ROUTES = frozenset({"/v1/score", "/v1/score_batch", "/v1/routed", "/v1/observe"})
_CONTEXT = {b"traceparent": "traceparent", b"tracestate": "tracestate"}
_MOST_WAITING = 8_192
"""Spans that wait to be sent, about 2 KB each: those of a collector that is slow or away must not fill the memory."""
_TEXT = 512
"""Characters of what is said; names of models may be as long."""
_FLUSH_S = 2.0
"""For how long the end waits for the collector: an orchestrator waits for us."""
_QUIET_S = 60.0
"""Between two log lines about a collector that takes no spans."""


class Spans(Collector):
    """Makes spans of questions and sends them, in a thread of its own; what cannot be sent is counted and forgotten.

    It never holds up a question: spans that are too many are dropped. May be used from several event loops.
    """

    def __init__(self, config: TracingConfig) -> None:
        url = config.endpoint.rstrip("/")
        url = url if url.endswith("/v1/traces") else f"{url}/v1/traces"
        self._exporter = _Exporter(OTLPSpanExporter(url, headers=config.headers or None), url)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            resource=Resource.create(
                {
                    "service.name": config.service_name,
                    "service.version": metadata.version("kv-cache-indexer"),
                    "host.name": socket.gethostname(),
                }
            ),
            span_limits=SpanLimits(max_attribute_length=_TEXT),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter, max_queue_size=_MOST_WAITING))
        self._tracer = self._provider.get_tracer("kvindex")
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Send what waits, for two seconds at most."""
        # the package's own end waits for a collector that does not answer as long as that takes
        ending = threading.Thread(target=self._provider.shutdown, name="kvindex-spans-end", daemon=True)
        ending.start()
        ending.join(_FLUSH_S)
        if ending.is_alive():
            self._exporter.give_up()

    def before(self, app: ASGIApp) -> ASGIApp:
        """Give an application that makes spans of the questions that `app` answers."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != ScopeType.HTTP or scope["path"] not in _ROUTES or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            path = scope["path"]
            attributes: dict[str, str | int] = {
                "http.request.method": "POST",
                "http.route": path,
                "url.path": path,
                "url.scheme": scope["scheme"],
                "network.protocol.version": scope["http_version"],
            }
            if scope["client"]:
                attributes["client.address"] = scope["client"][0]
            carrier: dict[str, list[str]] = {}
            for name, value in scope["headers"]:
                if name in _CONTEXT:
                    carrier.setdefault(_CONTEXT[name], []).append(value.decode("latin-1"))
            with self.question(f"POST {path}", carrier, attributes) as trace:
                await app(scope, receive, send if trace is None else _noting(trace, send))

        return traced

    @contextmanager
    def question(
        self, name: str, carrier: Mapping[str, list[str]], attributes: Mapping[str, str | int]
    ) -> Iterator[Trace | None]:
        """Make spans of what is done inside, as `carrier` (W3C trace context) and the sampler want it; None: none."""
        parent = self._propagator.extract(carrier, Context())
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        if not span.is_recording():
            yield None
            return
        # stages are timed by another clock than spans
        clock_ns = time.time_ns() - time.perf_counter_ns()
        trace = Trace()
        token = UNDER_WAY.set(trace)
        try:
            yield trace
        except BaseException as error:
            trace.error = trace.error or error
            raise
        finally:
            UNDER_WAY.reset(token)
            self._end(span, trace, clock_ns)

    def _end(self, span: Span, trace: Trace, clock_ns: int) -> None:
        # all spans of a question or none: a part of them says something else
        if not self._exporter.make_room(1 + len(trace.stages)):
            return
        context = set_span_in_context(span, Context())
        for stage in trace.stages:
            begun = clock_ns + int(stage.begun * 1e9)
            part = self._tracer.start_span(stage.name, context, start_time=begun)
            part.end(begun + int(stage.seconds * 1e9))
        span.set_attributes(trace.attributes)
        if trace.error is not None or trace.status:
            kind = type(trace.error).__name__ if trace.error is not None else trace.status
            said = ": ".join(filter(None, (trace.status, trace.wrong)))
            span.set_attribute("error.type", kind)
            span.set_status(StatusCode.ERROR, said[:_TEXT] or kind)
        span.end()

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        spans = CounterMetricFamily("kvindex_spans", "Spans by what became of them", labels=["outcome"])
        for outcome, count in self._exporter.outcomes().items():
            spans.add_metric([outcome], count)
        yield spans
        yield GaugeMetricFamily("kvindex_spans_waiting", "Spans to be sent", value=self._exporter.waiting)


def _noting(trace: Trace, send: Send) -> Send:
    """Give a `send` that notes the status."""

    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            status = trace.attributes["http.response.status_code"] = message["status"]
            if status >= HTTPStatus.BAD_REQUEST:
                trace.status = HTTPStatus(status).phrase
        await send(message)

    return noting


class _Said(logging.Handler):
    """Remembers the last complaint of the packages, which would else write lines of their own."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()[:_TEXT]


_SAID = _Said()


class _Exporter(SpanExporter):
    """Sends spans by another one, counts them, bounds those that wait, and says at times that they are not taken."""

    def __init__(self, exporter: SpanExporter, url: str) -> None:
        self._exporter = exporter
        # a password may stand before the host
        self._address = urlsplit(url)._replace(netloc=urlsplit(url).netloc.rpartition("@")[2]).geturl()
        self._lock = threading.Lock()
        self._sent = self._failed = self._dropped = 0
        self._said_at = -_QUIET_S
        self._said_lost = 0
        self.waiting = 0
        packages = logging.getLogger("opentelemetry")
        packages.addHandler(_SAID)
        packages.propagate = False

    def make_room(self, count: int) -> bool:
        """Say whether so many spans may wait; count them as dropped where they may not."""
        with self._lock:
            if self.waiting + count > _MOST_WAITING:
                self._dropped += count
                return False
            self.waiting += count
            return True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send some. Only the thread that sends calls it."""
        result = self._exporter.export(spans)
        with self._lock:
            self.waiting -= len(spans)
            if result is SpanExportResult.SUCCESS:
                self._sent += len(spans)
            else:
                self._failed += len(spans)
            lost = self._failed + self._dropped
        if result is not SpanExportResult.SUCCESS and time.monotonic() - self._said_at >= _QUIET_S:
            self._said_at = time.monotonic()
            structlog.get_logger("kvindex").warning(
                "spans_not_taken", collector=self._address, spans=lost - self._said_lost, error=_SAID.last
            )
            self._said_lost = lost
        return result

    def shutdown(self) -> None:
        """Send no more."""
        self._exporter.shutdown()

    def give_up(self) -> None:
        """Wait no more for a collector that does not answer."""
        self._exporter.shutdown()
        with self._lock:
            lost = self.waiting
        structlog.get_logger("kvindex").warning("spans_lost", collector=self._address, spans=lost)

    def outcomes(self) -> dict[str, int]:
        """Give how many were sent, not taken by the collector, and dropped because too many waited."""
        with self._lock:
            return {"sent": self._sent, "failed": self._failed, "dropped": self._dropped}
