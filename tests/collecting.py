"""A collector of spans: a real one's half that takes OTLP over HTTP and reads the protobuf."""

import contextlib
import http.server
import threading

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Proto
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from .conftest import until
from .serving import service

MODEL = "test/model"
TOKENS = [90_000_001 + number for number in range(40)]


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


@contextlib.contextmanager
def traced(folder, collector_url, **environ):
    """A service that sends its spans soon."""
    soon = {"OTEL_BSP_SCHEDULE_DELAY": 20}
    with service(folder, tracing_endpoint=collector_url, **soon, **environ) as running:
        yield running
