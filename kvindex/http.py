"""The HTTP service."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, delete, get, put
from litestar.exceptions import HTTPException
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, JSONBody
from litestar.response import Stream
from litestar.status_codes import (
    HTTP_201_CREATED,
    HTTP_204_NO_CONTENT,
    HTTP_400_BAD_REQUEST,
    HTTP_404_NOT_FOUND,
    HTTP_409_CONFLICT,
    HTTP_500_INTERNAL_SERVER_ERROR,
    HTTP_503_SERVICE_UNAVAILABLE,
)
from prometheus_client.registry import Collector

from indexer import Index, IndexUnavailable, InvalidQuestion
from kvevents import EventPool, PodTaken, SubscriptionError, discovery
from kvindex.answers import AnswerMetrics
from kvindex.checks import Checks
from kvindex.feedback import FeedbackMetrics, feedback_routes
from kvindex.metrics import Metrics
from kvindex.pods import forget_pod
from kvindex.readiness import Readiness
from kvindex.scoring import score_route
from kvindex.snapshots import Busy, Snapshots
from kvindex.stats import Stats
from kvindex.tokenizing import PromptMetrics
from scorer import PrefixScorer

_SOON = {"Retry-After": "1"}


class PodStatus(msgspec.Struct):
    """What is known of one rank of a pod."""

    pod: str
    rank: int
    model: str
    blocks: int
    tiers: dict[str, int]
    block_sizes: list[int]
    incarnation: int
    trust: str
    reason: str
    since: float
    last_seq: int | None
    connected: bool | None


class Pods(msgspec.Struct):
    """All pods that are followed."""

    pods: list[PodStatus]


class Problem(msgspec.Struct):
    """What was wrong with a request (RFC 9457)."""

    title: str
    status: int
    detail: str


def create_app(
    scorer: PrefixScorer,
    index: Index,
    pool: EventPool,
    follower: discovery.Follower | None = None,
    *,
    max_tokens: int,
    max_body_bytes: int,
    checks: Checks | None = None,
    snapshots: Snapshots | None = None,
    answers: AnswerMetrics | None = None,
    collectors: Sequence[Collector] = (),
) -> Litestar:
    """Make the application: `/v1/score`, `/v1/routed`, `/v1/observe`, `/v1/pods`, `/v1/stats`, `/v1/snapshot`,
    `/healthz`, `/readyz`, `/metrics`, and OpenAPI at `/schema`.

    Without a `follower` all pods are those of requests and of endpoints that the pool has bound.
    """
    followed = follower or discovery.Follower(discovery.Subscriptions(pool))
    checks = checks or Checks(index, pool, followed)
    answers = answers or AnswerMetrics()
    snapshots = snapshots or Snapshots(pool)
    readiness = Readiness(index, pool, followed)
    collectors = (checks, FeedbackMetrics(scorer), snapshots, PromptMetrics(scorer.prompts), answers, *collectors)
    metrics = Metrics(index, pool, followed, *collectors)
    feedback = feedback_routes(scorer, followed, max_tokens=max_tokens, max_body_bytes=max_body_bytes)

    score = score_route(scorer, followed, checks, answers, max_tokens=max_tokens, max_body_bytes=max_body_bytes)

    @get("/v1/pods")
    async def pods() -> Pods:
        """Describe all pods that are followed."""
        sequences, connected = pool.sequences(), pool.connected()
        statuses = await asyncio.to_thread(index.sources)
        return Pods(
            [
                PodStatus(
                    pod=status.source.pod,
                    rank=status.source.rank,
                    model=status.model,
                    blocks=status.blocks,
                    tiers=status.tiers,
                    block_sizes=status.block_sizes,
                    incarnation=status.incarnation,
                    trust="degraded" if status.degraded else "exact",
                    reason=status.degraded,
                    since=status.degraded_since,
                    last_seq=sequences.get(status.source, status.last_seq),
                    connected=connected.get(status.source.pod),
                )
                for status in statuses
            ]
        )

    @get("/v1/stats")
    async def stats() -> Stats:
        """Give all that the service knows of itself: index, pool, pods, what is asked for."""
        return await asyncio.to_thread(checks.stats)

    @delete("/v1/pods/{pod:str}")
    async def forget(pod: FromPath[str]) -> None:
        """Stop following a pod and forget its blocks."""
        if not await asyncio.to_thread(forget_pod, pod, followed, index, pool):
            raise HTTPException(status_code=HTTP_404_NOT_FOUND, detail=f"pod {pod!r}: nobody follows it")

    @put(
        "/v1/pods/{pod:str}",
        status_code=HTTP_204_NO_CONTENT,
        responses={HTTP_201_CREATED: ResponseSpec(None, description="It was not known before")},
    )
    async def register(pod: FromPath[str], data: JSONBody[discovery.PodBody]) -> Response[None]:
        """Follow a pod, or follow it otherwise than before."""
        try:
            found = discovery.found_of(pod, [data], shared=False)
            is_new = await asyncio.to_thread(followed.put, pod, found)
        except PodTaken as error:
            raise HTTPException(status_code=HTTP_409_CONFLICT, detail=str(error)) from error
        except SubscriptionError as error:
            raise HTTPException(status_code=HTTP_400_BAD_REQUEST, detail=str(error)) from error
        return Response(None, status_code=HTTP_201_CREATED if is_new else HTTP_204_NO_CONTENT)

    @get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process is up."""
        return {"status": "up"}

    @get("/readyz")
    async def readyz() -> Response[dict[str, Any]]:
        """Say whether the index answers, and all that was to be waited for at the start has come."""
        missing = await asyncio.to_thread(readiness.missing)
        if missing:
            return Response({"status": "not ready", **missing}, status_code=HTTP_503_SERVICE_UNAVAILABLE)
        return Response({"status": "ready"})

    @get("/v1/snapshot", media_type="application/octet-stream")
    async def snapshot() -> Response[Any]:
        """Give all that the index knows, for another one that follows the same pods."""
        if missing := await asyncio.to_thread(readiness.missing):
            raise HTTPException(
                status_code=HTTP_503_SERVICE_UNAVAILABLE, detail=f"the index waits itself: {missing}", headers=_SOON
            )
        try:
            return Stream(snapshots.stream(), media_type="application/octet-stream")
        except Busy as busy:
            raise HTTPException(status_code=HTTP_503_SERVICE_UNAVAILABLE, detail=str(busy), headers=_SOON) from busy
        except InvalidQuestion as error:
            raise HTTPException(status_code=HTTP_409_CONFLICT, detail=str(error)) from error

    @get("/metrics", media_type="text/plain; version=0.0.4; charset=utf-8")
    async def metrics_text() -> bytes:
        """Give all metrics for Prometheus."""
        return await asyncio.to_thread(metrics.text)

    return Litestar(
        [score, *feedback, pods, stats, register, forget, snapshot, healthz, readyz, metrics_text],
        openapi_config=OpenAPIConfig(title="kvindex", version="1"),
        exception_handlers={
            HTTPException: _problem,
            IndexUnavailable: _unavailable,
            RecursionError: _too_deep,
            UnicodeDecodeError: _no_text,
            HTTP_500_INTERNAL_SERVER_ERROR: _failure,
        },
    )


def _problem(_: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
    details = [_readable(part) for part in error.extra or [] if isinstance(part, dict)]
    problem = Problem(type(error).__name__, error.status_code, "; ".join(details) or error.detail)
    return Response(
        problem, status_code=error.status_code, headers=error.headers, media_type="application/problem+json"
    )


def _too_deep(_: Request[Any, Any, Any], __: RecursionError) -> Response[Problem]:
    problem = Problem("Bad request", HTTP_400_BAD_REQUEST, "body: nested too deeply")
    return Response(problem, status_code=problem.status, media_type="application/problem+json")


def _no_text(_: Request[Any, Any, Any], __: UnicodeDecodeError) -> Response[Problem]:
    problem = Problem("Bad request", HTTP_400_BAD_REQUEST, "body: not UTF-8")
    return Response(problem, status_code=problem.status, media_type="application/problem+json")


def _unavailable(_: Request[Any, Any, Any], error: IndexUnavailable) -> Response[Problem]:
    problem = Problem("Index unavailable", 503, str(error))
    return Response(problem, status_code=problem.status, headers=_SOON, media_type="application/problem+json")


def _failure(_: Request[Any, Any, Any], __: Exception) -> Response[Problem]:
    problem = Problem("Internal error", HTTP_500_INTERNAL_SERVER_ERROR, "the service failed; its log says why")
    return Response(problem, status_code=problem.status, media_type="application/problem+json")


def _readable(part: dict[str, Any]) -> str:
    return f"{part.get('key') or 'body'}: {part.get('message', '')}"
