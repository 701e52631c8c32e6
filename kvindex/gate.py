"""What each HTTP request passes before the application: who may ask, how many at a time, and whether we are leaving."""

import asyncio
from collections.abc import Iterator

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, ReceiveMessage, Scope, Send
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvindex.access import REFUSED, Access
from scorer import Unavailable

_READY = "/readyz"
_PROBES = frozenset({"/healthz", _READY})
"""Free for all, and answered however many others are: who asks them restarts what does not answer."""
_CLOSE = (b"connection", b"close")


class Gate(Collector):
    """Stands before an application, and counts what it refuses. For one event loop."""

    def __init__(self, access: Access, *, max_under_way: int, max_bytes_under_way: int) -> None:
        self._access = access
        self._max_under_way = max_under_way
        self._max_bytes = max_bytes_under_way
        self._bytes = 0
        """Of the bodies of requests under way."""
        self.under_way = 0
        """Requests that the application has not ended yet, without those of probes."""
        self.late = 0
        """Connections that were closed because a request, or a handshake, did not come in its time."""
        self._turned_away = 0
        self._overloaded = 0
        self._is_leaving = False
        self._unauthorized = _problem(401, "Unauthorized", REFUSED, (b"www-authenticate", b"Bearer"))
        self._too_many = _problem(
            503, "Service Unavailable", f"{max_under_way} requests are under way already", (b"retry-after", b"1")
        )

    def leave(self) -> None:
        """Be not ready from now on, and let each connection end with its next answer, so that clients open others.

        A signal handler may call it.
        """
        self._is_leaving = True

    def turn_away(self) -> None:
        """Count a connection that was closed because there were too many."""
        self._turned_away += 1

    def before(self, app: ASGIApp) -> ASGIApp:
        """Give an application that answers itself, or lets `app` answer."""

        async def gated(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != ScopeType.HTTP:  # that the process starts and ends; there are no WebSockets
                await app(scope, receive, send)
                return
            if self._is_leaving:
                send = _closing(send)
            path = scope["path"]
            if path in _PROBES:
                if self._is_leaving and path == _READY:
                    await _LEAVING.send(send)
                else:
                    await app(scope, receive, send)
                return
            authorization = b""
            for name, value in scope["headers"]:
                if name == b"authorization":
                    authorization = value
                    break
            if not self._access.allows(authorization, "http"):
                await self._unauthorized.send(send)
            elif self.under_way >= self._max_under_way:
                self._overloaded += 1
                await self._too_many.send(send)
            else:
                self.under_way += 1
                taken = 0

                async def counted() -> ReceiveMessage:
                    nonlocal taken
                    message = await receive()
                    size = len(message["body"]) if message["type"] == "http.request" else 0
                    taken += size
                    self._bytes += size
                    if self._bytes > self._max_bytes:
                        self._overloaded += 1
                        raise Unavailable(f"body: {self._max_bytes} bytes are under way already; ask again later")
                    return message

                try:
                    await app(scope, counted, send)
                except asyncio.CancelledError:
                    # its time is over and its connection was cut off: that is said once for all of them
                    if not self._is_leaving:
                        raise
                finally:
                    self.under_way -= 1
                    self._bytes -= taken

        return gated

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        yield GaugeMetricFamily("kvindex_http_under_way", "HTTP requests under way", value=self.under_way)
        yield GaugeMetricFamily("kvindex_http_bytes_under_way", "Bytes of their bodies", value=self._bytes)
        yield CounterMetricFamily(
            "kvindex_http_overloaded", "HTTP requests refused because too many were under way", value=self._overloaded
        )
        yield CounterMetricFamily(
            "kvindex_http_turned_away",
            "HTTP connections closed because there were too many",
            value=self._turned_away,
        )
        yield CounterMetricFamily(
            "kvindex_http_late",
            "HTTP connections closed because a request, or a handshake, did not come in its time",
            value=self.late,
        )


class _Answer:
    """An answer of our own, made once."""

    def __init__(self, status: int, body: object, kind: bytes, *headers: tuple[bytes, bytes]) -> None:
        self._status = status
        self._body = msgspec.json.encode(body)
        self._headers = [(b"content-type", kind), (b"content-length", b"%d" % len(self._body)), *headers]

    async def send(self, send: Send) -> None:
        """Give it to who asked."""
        await send({"type": "http.response.start", "status": self._status, "headers": self._headers})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


_LEAVING = _Answer(503, {"status": "leaving"}, b"application/json")


def _problem(status: int, title: str, detail: str, *headers: tuple[bytes, bytes]) -> _Answer:
    """Make a refusal (RFC 9457)."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return _Answer(status, body, b"application/problem+json", *headers)


def _closing(send: Send) -> Send:
    """Give a `send` that lets the connection end with the answer."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), _CLOSE]
        await send(message)

    return closing
