"""The gRPC server: a thread with an event loop of its own beside the HTTP service."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from indexer import IndexUnavailable
from kvindex.access import Access
from kvindex.errors import UserError
from kvindex.rpc.access import Guard
from kvindex.rpc.calls import Call, Calls
from kvindex.rpc.schema import SCHEMA, Schema
from kvindex.rpc.spans import Traced
from kvindex.tls import Tls
from kvindex.tracing import note_error
from scorer import NoTokenizer, ScorerError, Unavailable

if TYPE_CHECKING:
    from kvindex.spans import Spans

_MOST_CALLS = 1_024
"""Calls under way at once; one more is RESOURCE_EXHAUSTED."""
_WATCHERS_S = 1.0
_MESSAGE_BYTES = 2_000
"""What is said of an error travels in a header, bytes that are no ASCII as three; clients refuse more than 8 KiB."""

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not shared
    ("grpc.server_handshake_timeout_ms", 20_000),  # TLS, and the first frame that each client sends
    # clients may ask whether we are there, at most each 10 s; those that are gone are seen within two minutes
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_time_ms", 90_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


def open_schema() -> Schema:
    """Give the messages of all services that `RpcServer` has."""
    return Schema(SCHEMA, health_pb2.DESCRIPTOR.serialized_pb, reflection_pb2.DESCRIPTOR.serialized_pb)


class RpcServer:
    """Serves questions from `start` to `close`. The services are SERVING from the first moment on.

    An event loop and not a pool of threads, so that a client that begins a call and never ends it holds nothing.
    """

    def __init__(
        self,
        calls: Calls,
        schema: Schema,
        *,
        host: str,
        port: int,
        max_message_bytes: int,
        max_connections: int,
        access: Access | None = None,
        tls: Tls | None = None,
        spans: "Spans | None" = None,
        grace_s: float = 5.0,
    ) -> None:
        self._access = access
        self._spans = spans
        self._tls = tls
        self._grace_s = grace_s
        self._calls = calls
        self._schema = schema
        self._host = host
        self._port = port
        self._max_message_bytes = max_message_bytes
        self._max_connections = max_connections
        self._started: Future[int] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: Any = None
        self._healthy: Any = None
        self._ending: set[asyncio.Task[None]] = set()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="kvindex-grpc", daemon=True)

    def start(self) -> int:
        """Begin to listen; give the port. Raises `UserError` when it cannot be had."""
        self._thread.start()
        return self._started.result()

    @property
    def address(self) -> str:
        """Where it listens."""
        return _joined(self._host, self._started.result())

    def leave(self) -> None:
        """Be NOT_SERVING from now on, and answer on. It does not wait, so that a signal handler may call it."""
        self._begin(self._say_leaving)

    def stop(self, grace_s: float | None) -> None:
        """Take no more calls; end those under way after so many seconds, or now. The shortest time said holds.

        It does not wait, so that a signal handler may call it.
        """
        self._begin(lambda: self._stop(grace_s))

    def close(self) -> None:
        """Take no more calls, and end when those under way are answered or `grace_s` is over. May be called twice."""
        if self._loop is not None and self._thread.is_alive():
            self.stop(self._grace_s)
            self._thread.join()

    def _begin(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        def begin() -> None:
            if self._is_over:  # nobody would wait for the task
                return
            task = asyncio.ensure_future(work())
            self._ending.add(task)  # the loop itself keeps no task alive
            task.add_done_callback(self._ending.discard)

        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(begin)

    async def _say_leaving(self) -> None:
        # a watcher who does not read holds up what is said of its service, and of no other
        said = [self._healthy.set(name, health_pb2.HealthCheckResponse.NOT_SERVING) for name in self._names()]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*said), _WATCHERS_S)

    async def _stop(self, grace_s: float | None) -> None:
        if grace_s is not None:
            await self._say_leaving()
        await self._server.stop(grace_s)

    def _names(self) -> list[str]:
        """Give the names that are asked for health: "" for the server, and those of the services."""
        return ["", *sorted({method.service for method in self._schema.methods.values()})]

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  (whoever waits for the start hears of it)
            if not self._started.done():
                self._started.set_exception(error)
            else:
                structlog.get_logger("kvindex").error("grpc_error", error=repr(error))

    async def _serve(self) -> None:
        limits = [
            ("grpc.max_allowed_incoming_connections", self._max_connections),
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.max_send_message_length", -1),
        ]
        interceptors: list[Any] = [] if self._access is None else [Guard(self._access)]
        if self._spans is not None:
            interceptors.append(Traced(self._spans, self._schema))
        server = grpc.aio.server(
            options=[*_OPTIONS, *limits], maximum_concurrent_rpcs=_MOST_CALLS, interceptors=interceptors
        )
        everything, *names = self._names()
        for name in names:
            handlers = {
                method.name: grpc.unary_unary_rpc_method_handler(_handler(self._calls.by_name[method.name]))
                for method in self._schema.methods.values()
                if method.service == name
            }
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        healthy = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        shown = [*names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(shown, server, pool=self._schema.pool)
        for name in (everything, *names):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        port = self._bind(server)
        await server.start()
        self._server, self._healthy, self._loop = server, healthy, asyncio.get_running_loop()
        self._started.set_result(port)
        await server.wait_for_termination()
        while self._ending:
            await asyncio.wait(self._ending)
        self._is_over = True

    def _bind(self, server: Any) -> int:  # noqa: ANN401
        address = _joined(self._host, self._port)
        try:
            if self._tls is None:
                return int(server.add_insecure_port(address))
            return int(server.add_secure_port(address, _credentials(self._tls)))
        except RuntimeError as error:
            raise UserError(f"grpc.port {self._port} on {self._host}: {error}; choose another") from error


def _credentials(tls: Tls) -> Any:  # noqa: ANN401
    """Give credentials that follow the certificate: each new connection asks for the one that holds."""
    shown = tls.certificate

    def said() -> Any:  # noqa: ANN401
        return grpc.ssl_server_certificate_configuration([(shown.key, shown.cert)], root_certificates=shown.client_ca)

    def renewed() -> Any:  # noqa: ANN401
        nonlocal shown
        if tls.certificate is shown:
            return None
        shown = tls.certificate
        return said()

    return grpc.dynamic_ssl_server_credentials(
        said(), renewed, require_client_authentication=shown.client_ca is not None
    )


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _handler(call: Call) -> Any:  # noqa: ANN401
    async def handle(payload: bytes, context: Any) -> Any:  # noqa: ANN401
        try:
            return await call(payload)
        except Exception as error:  # noqa: BLE001  (whatever goes wrong with one call, the others are answered)
            note_error(error)
            code, said = _refusal_of(error)
        return await context.abort(code, said.encode()[:_MESSAGE_BYTES].decode(errors="ignore"))

    return handle


def _refusal_of(error: Exception) -> tuple[Any, str]:
    """Give the status, and what is said."""
    if isinstance(error, NoTokenizer):
        return grpc.StatusCode.FAILED_PRECONDITION, str(error)
    if isinstance(error, IndexUnavailable | Unavailable):
        return grpc.StatusCode.UNAVAILABLE, str(error)
    if isinstance(error, ScorerError):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    structlog.get_logger("kvindex").error("grpc_call_failed", error=repr(error))
    return grpc.StatusCode.INTERNAL, "the service failed; its log says why"
