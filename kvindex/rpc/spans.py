"""Spans of questions over gRPC, with the trace context of the caller's metadata."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from kvindex.rpc.schema import Schema

if TYPE_CHECKING:
    from kvindex.spans import Spans

_CONTEXT = ("traceparent", "tracestate")


class Traced(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # the package says no types of it
    """Makes spans of the methods of a schema, and of no others: health and reflection are no questions."""

    def __init__(self, spans: "Spans", schema: Schema) -> None:
        self._spans = spans
        self._names = {f"/{method.service}/{method.name}" for method in schema.methods.values()}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:  # noqa: ANN401
        """Give who answers a call."""
        answers = await continuation(details)
        if details.method not in self._names or answers is None or answers.unary_unary is None:
            return answers
        name = details.method.removeprefix("/")
        carrier: dict[str, list[str]] = {}
        for key, value in details.invocation_metadata:
            if key in _CONTEXT:
                carrier.setdefault(key, []).append(value)

        async def traced(payload: Any, context: Any) -> Any:  # noqa: ANN401
            with self._spans.question(name, carrier, {"rpc.system.name": "grpc", "rpc.method": name}) as trace:
                if trace is None:
                    return await answers.unary_unary(payload, context)
                try:
                    return await answers.unary_unary(payload, context)
                except BaseException:
                    code = context.code()  # no status at all where the caller went away
                    trace.status = code.name if isinstance(code, grpc.StatusCode) else "CANCELLED"
                    raise
                finally:
                    trace.attributes["rpc.response.status_code"] = trace.status or "OK"

        return grpc.unary_unary_rpc_method_handler(traced, answers.request_deserializer, answers.response_serializer)
