"""What the HTTP service says when it does not answer: problem details (RFC 9457) that name the field."""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, InternalServerException

from indexer import IndexUnavailable
from kvindex.tracing import note_error
from scorer import InvalidRequest, NoTokenizer, ScorerError, Unavailable

MEDIA_TYPE = "application/problem+json"
SOON: Mapping[str, str] = {"Retry-After": "1"}

_FIELD = re.compile(r"([a-z_]\w*(?:\[\d+\])*(?:\.\w+(?:\[\d+\])*)*): ")


class Problem(msgspec.Struct, omit_defaults=True):
    """What was wrong with a request, or with the service."""

    title: str
    """The status in words."""
    status: int
    detail: str
    """What was wrong, of what value, and what is expected."""
    field: str | None = None
    """The field of the body that it is about."""


_ENCODER = msgspec.json.Encoder()


def answer(
    status: int, detail: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
) -> Response[bytes]:
    """Make the answer that says so."""
    problem = Problem(HTTPStatus(status).phrase, status, detail, field)
    return Response(_ENCODER.encode(problem), status_code=status, headers=headers, media_type=MEDIA_TYPE)


def _http(_: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    parts = [part for part in error.extra or [] if isinstance(part, dict)]
    # "data" is what Litestar calls the parameter that takes the body
    keys = [key if (key := part.get("key") or "data") != "data" else "body" for part in parts]
    details = [f"{key}: {part.get('message', '')}" for key, part in zip(keys, parts, strict=True)]
    field = keys[0] if len(parts) == 1 else None
    return answer(error.status_code, "; ".join(details) or error.detail, field=field, headers=error.headers)


def _too_long(request: Request[Any, Any, Any], _: Exception) -> Response[bytes]:
    most = request.route_handler.resolve_request_max_body_size()
    return answer(413, f"body: longer than {most} bytes, the most that is read here", field="body")


def _refused(_: Request[Any, Any, Any], error: ScorerError) -> Response[bytes]:
    note_error(error)
    if isinstance(error, Unavailable):
        return answer(503, str(error), headers=SOON)
    if isinstance(error, NoTokenizer):
        return answer(422, str(error), field="model")
    named = _FIELD.match(str(error)) if isinstance(error, InvalidRequest) else None
    return answer(400, str(error), field=named[1] if named else None)


def _unavailable(_: Request[Any, Any, Any], error: IndexUnavailable) -> Response[bytes]:
    note_error(error)
    return answer(503, str(error), headers=SOON)


def _no_json(_: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    return answer(400, f"body: {'nested too deeply' if isinstance(error, RecursionError) else 'not UTF-8'}")


def _failed(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    if isinstance(error, InternalServerException):  # Litestar's own word for a client that went before all had come
        return answer(400, "body: it did not come to its end")
    note_error(error)
    structlog.get_logger("kvindex").error(
        "request_failed", path=request.url.path[:200], error=repr(error), exc_info=error
    )
    return answer(500, "the service failed; its log says why")


HANDLERS: dict[int | type[Exception], Any] = {
    HTTPException: _http,
    413: _too_long,
    ScorerError: _refused,
    IndexUnavailable: _unavailable,
    RecursionError: _no_json,
    UnicodeDecodeError: _no_json,
    500: _failed,
}
"""What Litestar is to do with exceptions."""
