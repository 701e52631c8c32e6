"""The HTTP service."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from litestar import Litestar, Request, Response, delete, put, route
from litestar.enums import HttpMethod
from litestar.exceptions import HTTPException
from litestar.params import FromPath, JSONBody
from litestar.response import Stream
from litestar.status_codes import (
    HTTP_201_CREATED,
    HTTP_204_NO_CONTENT,
    HTTP_400_BAD_REQUEST,
    HTTP_404_NOT_FOUND,
    HTTP_409_CONFLICT,
    HTTP_503_SERVICE_UNAVAILABLE,
)
from prometheus_client.registry import Collector

from indexer import Index, InvalidQuestion
from kvevents import EventPool, PodTaken, SubscriptionError, discovery
from kvindex import problems
from kvindex.answers import AnswerMetrics
from kvindex.checks import Checks
from kvindex.feedback import FeedbackMetrics, feedback_routes
from kvindex.metrics import Metrics
from kvindex.openapi import GET, openapi_routes
from kvindex.pods import forget_pod
from kvindex.readiness import Readiness
from kvindex.scoring import Scoring, score_routes
from kvindex.snapshots import Busy, Snapshots
from kvindex.stats import Pods, Stats, statuses_of
from kvindex.tokenizing import PromptMetrics
from scorer import PrefixScorer

_POD = "/v1/pods/{pod:str}"
_POD_BODY_BYTES = 262_144
_NAME_CHARS = 512

_T = TypeVar("_T")


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
    """Make the application: `/v1/score`, `/v1/score_batch`, `/v1/routed`, `/v1/observe`, `/v1/pods`, `/v1/stats`,
    `/v1/snapshot`, `/healthz`, `/readyz`, `/metrics`, and OpenAPI at `/schema`.

    Without a `follower` all pods are those of requests and of endpoints that the pool has bound.
    """
    followed = follower or discovery.Follower(discovery.Subscriptions(pool))
    checks = checks or Checks(index, pool, followed)
    answers = answers or AnswerMetrics()
    snapshots = snapshots or Snapshots(pool)
    readiness = Readiness(index, pool, followed)
    ours = (checks, FeedbackMetrics(scorer), snapshots, PromptMetrics(scorer.prompts), answers)
    metrics = Metrics(index, pool, followed, *ours, *collectors)
    feedback = feedback_routes(scorer, followed, max_tokens=max_tokens, max_body_bytes=max_body_bytes)

    # of their own: long questions may hold all others, and who asks these restarts what does not answer
    probing = ThreadPoolExecutor(2, thread_name_prefix="kvindex-probes")

    async def probed(look: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(probing, look)

    scoring = Scoring(scorer, followed, checks, answers, max_tokens=max_tokens)

    @route("/v1/pods", http_method=GET)
    async def pods() -> Pods:
        """Describe all pods that are followed."""
        return Pods(await asyncio.to_thread(statuses_of, index, pool))

    @route("/v1/stats", http_method=GET)
    async def stats() -> Stats:
        """Give all that the service knows of itself: index, pool, pods, what is asked for."""
        return await asyncio.to_thread(checks.stats)

    @delete(_POD)
    async def forget(pod: FromPath[str]) -> None:
        """Stop following a pod and forget its blocks."""
        if not await asyncio.to_thread(forget_pod, pod, followed, index, pool):
            raise HTTPException(status_code=HTTP_404_NOT_FOUND, detail=f"pod {pod!r}: nobody follows it")

    @put(_POD, status_code=HTTP_204_NO_CONTENT, request_max_body_size=_POD_BODY_BYTES)
    async def register(pod: FromPath[str], data: JSONBody[discovery.PodBody]) -> Response[None]:
        """Follow a pod, or follow it otherwise than before."""
        if len(pod) > _NAME_CHARS:
            detail = f"pod: a name of {len(pod)} characters, expected at most {_NAME_CHARS}"
            raise HTTPException(status_code=HTTP_400_BAD_REQUEST, detail=detail)
        try:
            found = discovery.found_of(pod, [data], shared=False)
            _refuse_local(found)
            is_new = await asyncio.to_thread(followed.put, pod, found)
        except PodTaken as error:
            raise HTTPException(status_code=HTTP_409_CONFLICT, detail=str(error)) from error
        except SubscriptionError as error:
            raise HTTPException(status_code=HTTP_400_BAD_REQUEST, detail=str(error)) from error
        return Response(None, status_code=HTTP_201_CREATED if is_new else HTTP_204_NO_CONTENT)

    @route(_POD, http_method=HttpMethod.OPTIONS, status_code=HTTP_204_NO_CONTENT)
    async def allowed() -> Response[None]:
        """Name the methods: Litestar's own answer has one of them."""
        return Response(None, headers={"Allow": "DELETE, OPTIONS, PUT"})

    @route("/healthz", http_method=GET)
    async def healthz() -> dict[str, str]:
        """Say that the process is up."""
        return {"status": "up"}

    @route("/readyz", http_method=GET)
    async def readyz() -> Response[dict[str, Any]]:
        """Say whether the index answers, and all that was to be waited for at the start has come."""
        missing = await probed(readiness.missing)
        if missing:
            return Response({"status": "not ready", **missing}, status_code=HTTP_503_SERVICE_UNAVAILABLE)
        return Response({"status": "ready"})

    @route("/v1/snapshot", http_method=GET, media_type="application/octet-stream")
    async def snapshot(request: Request[Any, Any, Any]) -> Response[Any]:
        """Give all that the index knows, for another one that follows the same pods."""
        if missing := await asyncio.to_thread(readiness.missing):
            raise HTTPException(
                status_code=HTTP_503_SERVICE_UNAVAILABLE,
                detail=f"the index waits itself: {missing}",
                headers=dict(problems.SOON),
            )
        try:
            parts = iter(()) if request.method == HttpMethod.HEAD else snapshots.stream()  # nobody would read them
            return Stream(parts, media_type="application/octet-stream")
        except Busy as busy:
            raise HTTPException(
                status_code=HTTP_503_SERVICE_UNAVAILABLE, detail=str(busy), headers=dict(problems.SOON)
            ) from busy
        except InvalidQuestion as error:
            raise HTTPException(status_code=HTTP_409_CONFLICT, detail=str(error)) from error

    @route("/metrics", http_method=GET, media_type="text/plain; version=0.0.4; charset=utf-8")
    async def metrics_text() -> bytes:
        """Give all metrics for Prometheus."""
        return await probed(metrics.text)

    return Litestar(
        [
            *score_routes(scoring, max_body_bytes=max_body_bytes),
            *feedback,
            *(pods, stats, allowed, register, forget, snapshot, healthz, readyz, metrics_text),
            *openapi_routes(),
        ],
        openapi_config=None,
        exception_handlers=problems.HANDLERS,
        on_shutdown=[lambda: probing.shutdown(wait=False)],
    )


def _refuse_local(found: discovery.Found) -> None:
    """Raise `SubscriptionError` for places in this machine: who may ask may not reach into it."""
    for one in found.endpoints:
        for place in (one.endpoint, one.replay or "tcp://"):
            if not place.startswith("tcp://"):
                raise SubscriptionError(
                    f"endpoint {place!r}: a request may name tcp://host:port alone; others are for the configuration"
                )
