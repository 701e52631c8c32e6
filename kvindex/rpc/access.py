"""Who may call: the same tokens as over HTTP, in the metadata `authorization`."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from kvindex.access import REFUSED, Access

_FREE = "/grpc.health.v1.Health/"


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # the package says no types of it
    """Refuses calls without a token that holds, all but those for health."""

    def __init__(self, access: Access) -> None:
        self._access = access
        # as a stream, so that it is refused before its message is read, whatever kind of call it is
        self._refusal = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:  # noqa: ANN401
        """Give who answers a call."""
        if not details.method.startswith(_FREE):
            metadata = dict(details.invocation_metadata)
            if not self._access.allows(metadata.get("authorization", "").encode(), "grpc"):
                return self._refusal
        return await continuation(details)


async def _refuse(_: Any, context: Any) -> None:  # noqa: ANN401
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSED)
