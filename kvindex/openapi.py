"""The description of the HTTP service at `/schema` (OpenAPI 3.1), made from the types that bodies are read with."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import msgspec
from litestar import Response, route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler

from kvevents import discovery
from kvindex.feedback import RoutedAnswer
from kvindex.problems import MEDIA_TYPE, Problem
from kvindex.questions import (
    ObserveText,
    ObserveTokens,
    RoutedText,
    RoutedTokens,
    ScoreBatch,
    ScoreText,
    ScoreTokens,
)
from kvindex.scoring import BatchAnswer, ScoreAnswer
from kvindex.stats import Pods, Stats
from scorer import Observation

GET = (HttpMethod.GET, HttpMethod.HEAD)
"""Whatever can be had has a head (RFC 9110); the server leaves out the body."""
_JSON = "application/json"
_TOKENS = {"model": "Qwen/Qwen3-8B", "token_ids": list(range(1000, 1032))}
_CHAT = {"model": "Qwen/Qwen3-8B", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
_TEXT = {"model": "Qwen/Qwen3-8B", "prompt": "Why is the sky blue?", "pods": ["10.0.0.7:8000"]}
_MATCH = {
    "pod": "10.0.0.7:8000",
    "rank": 0,
    "blocks": 2,
    "tokens": 32,
    "reusable_tokens": 31,
    "score": 2.0,
    "tiers": {"gpu": 2},
    "trust": "exact",
    "reason": "",
    "speculative_blocks": 0,
    "speculative_tokens": 0,
}
_ANSWER = {
    "scores": {"10.0.0.7:8000": 2.0},
    "matches": [_MATCH],
    "block_size": 16,
    "prompt_tokens": 32,
    "best": "10.0.0.7:8000",
}
_POD = {"pod": "10.0.0.7:8000"}
_SEEN = {
    "pod": "10.0.0.7:8000",
    "rank": 0,
    "predicted_tokens": 31,
    "cached_tokens": 16,
    "error_blocks": 1,
    "outcome": "computed",
    "drifting": False,
}
_FOLLOW = {"endpoint": "tcp://10.0.0.7:5557", "replay": "tcp://10.0.0.7:5558", "model": "Qwen/Qwen3-8B"}

_PROBLEMS: Mapping[int, str] = {
    400: "The body is not what is asked for: `field` says which field, `detail` what is expected",
    401: "The token is missing, or not the one of the service",
    404: "There is no such pod",
    409: "It cannot be done with this service or pod",
    413: "The body is longer than `http.max_body_bytes`",
    422: "There is no tokenizer or chat template for the model: `detail` says where one was looked for",
    503: "The index, or a remote tokenizer, does not answer, or too much is under way: ask again after `Retry-After` s",
}


class _Operation(NamedTuple):
    """A route, what it takes and what it gives."""

    method: str
    path: str
    summary: str
    bodies: tuple[type, ...] = ()
    examples: Mapping[str, Any] = {}
    answers: Mapping[int, tuple[str, Any]] = {}
    """By status: what it means, and its body: a type, a JSON schema, a media type or None."""
    example: Any = None
    """Of the usual answer."""
    problems: tuple[int, ...] = ()
    open: bool = False
    """Whether it is answered without a token."""


_STATUS = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
_QUESTION = (400, 401, 413, 422, 503)

_OPERATIONS = (
    _Operation(
        "post",
        "/v1/score",
        "Which pods hold how much of a prompt",
        (ScoreTokens, ScoreText),
        {"tokens": _TOKENS, "chat": _CHAT, "text": _TEXT},
        {200: ("The scores; empty where nobody holds anything", ScoreAnswer)},
        _ANSWER,
        _QUESTION,
    ),
    _Operation(
        "post",
        "/v1/score_batch",
        "The same for many prompts: all are answered, or none",
        (ScoreBatch,),
        {"two": {"questions": [_TOKENS, _CHAT]}},
        {200: ("The answers in order", BatchAnswer)},
        {"answers": [_ANSWER, {**_ANSWER, "scores": {}, "matches": [], "best": None}]},
        _QUESTION,
    ),
    _Operation(
        "post",
        "/v1/routed",
        "Say that a prompt is sent to a pod now",
        (RoutedTokens, RoutedText),
        {"tokens": _TOKENS | _POD, "chat": _CHAT | _POD},
        {200: ("It was noted", RoutedAnswer)},
        _POD,
        (400, 401, 404, 413, 422, 503),
    ),
    _Operation(
        "post",
        "/v1/observe",
        "Say what the engine reused of a prompt",
        (ObserveTokens, ObserveText),
        {"tokens": _TOKENS | _POD | {"cached_tokens": 16}, "chat": _CHAT | _POD | {"cached_tokens": 0}},
        {200: ("How far the prediction was off", Observation)},
        _SEEN,
        (400, 401, 404, 413, 422, 503),
    ),
    _Operation("get", "/v1/pods", "All pods", answers={200: ("Every rank of every pod", Pods)}, problems=(401, 503)),
    _Operation(
        "put",
        "/v1/pods/{pod}",
        "Follow a pod, or follow it otherwise than before",
        (discovery.PodBody,),
        {"pod": _FOLLOW},
        {201: ("It was not known before", None), 204: ("It is followed so from now on", None)},
        problems=(400, 401, 409, 413),
    ),
    _Operation(
        "delete",
        "/v1/pods/{pod}",
        "Stop following a pod, and forget its blocks",
        answers={204: ("It is forgotten", None)},
        problems=(401, 404, 503),
    ),
    _Operation(
        "get",
        "/v1/stats",
        "All that the service knows of itself",
        answers={200: ("At this moment", Stats)},
        problems=(401, 503),
    ),
    _Operation(
        "get",
        "/v1/snapshot",
        "All that the index knows, for another service that follows the same pods",
        answers={200: ("docs/snapshots.md", "application/octet-stream")},
        problems=(401, 409, 503),
    ),
    _Operation("get", "/healthz", "Whether the process is up", answers={200: ("It is", _STATUS)}, open=True),
    _Operation(
        "get",
        "/readyz",
        "Whether it knows enough of its pods to be asked",
        answers={200: ("It does", _STATUS), 503: ("Not yet, or not any more", _STATUS)},
        open=True,
    ),
    _Operation("get", "/metrics", "Metrics for Prometheus", answers={200: ("Text", "text/plain")}, problems=(401,)),
    _Operation("get", "/schema", "This description", answers={200: ("OpenAPI", {"type": "object"})}, problems=(401,)),
)


def document() -> dict[str, Any]:
    """Give the description."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in _OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvindex",
            "version": version("kv-cache-indexer"),
            "description": "Knows, for every block, where the KV cache of a fleet of LLM servers lies.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "Where `access` asks for one"}
            },
        },
        "security": [{}, {"token": []}],
    }


def _schemas() -> dict[str, Any]:
    """The schemas of all bodies, with what their types cannot say."""
    kinds = {kind for operation in _OPERATIONS for kind in _types_of(operation)} | {Problem}
    _, schemas = msgspec.json.schema_components(sorted(kinds, key=str), ref_template="#/components/schemas/{name}")
    for kind in (ScoreText, RoutedText, ObserveText):
        schema = schemas[kind.__name__]
        schema["oneOf"] = [
            {"required": [name], "properties": {name: {"not": {"type": "null"}}, other: {"type": "null"}}}
            for name, other in (("prompt", "messages"), ("messages", "prompt"))
        ]
        fields = schema["properties"]
        fields["token_ids"] = {"type": "null"}  # else it is the other form
        said = "Refused, unless the service is told to trust requests (tokenizers.trust_templates)"
        fields["chat_template"] = {"type": "null", "description": said}
        if kind is not ScoreText:
            forms = fields["prompt"]["anyOf"]
            fields["prompt"]["anyOf"] = [form | {"maxItems": 1} if "maxItems" in form else form for form in forms]
    schemas["PodBody"]["oneOf"] = [  # see `PodBody.ends`
        {"required": ["endpoint"], "properties": {"endpoint": {"type": "string"}, "endpoints": {"maxItems": 0}}},
        {
            "required": ["endpoints"],
            "properties": {
                "endpoint": {"type": "null"},
                "endpoints": {"minItems": 1},
                "replay": {"type": "null"},
                "ranks": {"const": 1},
            },
        },
    ]
    schemas["ScoreBatch"]["properties"]["questions"]["items"] = _any_of((ScoreTokens, ScoreText))
    return schemas


def _described(operation: _Operation) -> dict[str, Any]:
    said: dict[str, Any] = {"summary": operation.summary, "operationId": f"{operation.method}_{operation.path[1:]}"}
    if "{pod}" in operation.path:
        name = {"type": "string", "minLength": 1}
        said["parameters"] = [
            {"name": "pod", "in": "path", "required": True, "schema": name, "example": "10.0.0.7:8000"}
        ]
    if operation.bodies:
        examples = {name: {"value": value} for name, value in operation.examples.items()}
        said["requestBody"] = {
            "required": True,
            "content": {_JSON: {"schema": _any_of(operation.bodies), "examples": examples}},
        }
    said["responses"] = {
        str(status): _answer(meaning, body, operation.example if status == 200 else None)
        for status, (meaning, body) in operation.answers.items()
    }
    for status in operation.problems:
        problem = {"description": _PROBLEMS[status], "content": {MEDIA_TYPE: {"schema": _reference(Problem)}}}
        said["responses"][str(status)] = problem
    if operation.open:
        said["security"] = []
    return said


def _answer(meaning: str, body: Any, example: Any) -> dict[str, Any]:  # noqa: ANN401
    if body is None:
        return {"description": meaning}
    if isinstance(body, str):
        return {"description": meaning, "content": {body: {}}}
    content: dict[str, Any] = {"schema": body if isinstance(body, dict) else _reference(body)}
    if example is not None:
        content["example"] = example
    return {"description": meaning, "content": {_JSON: content}}


def _types_of(operation: _Operation) -> list[type]:
    return [*operation.bodies, *(body for _, body in operation.answers.values() if isinstance(body, type))]


def _any_of(kinds: tuple[type, ...]) -> dict[str, Any]:
    references = [_reference(kind) for kind in kinds]
    return references[0] if len(references) == 1 else {"anyOf": references}


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def openapi_routes() -> list[HTTPRouteHandler]:
    """Make the routes."""
    text = msgspec.json.encode(document())

    @route(["/schema", "/schema/openapi.json"], http_method=GET)
    async def schema() -> Response[bytes]:
        """Describe the service."""
        return Response(text, media_type=_JSON)

    return [schema]
