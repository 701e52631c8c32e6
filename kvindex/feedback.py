"""What routers tell the service back: where they sent a prompt, and what the engine reused of it."""

from collections.abc import Iterator
from typing import Any

import msgspec
from litestar import Request, post
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from litestar.status_codes import HTTP_200_OK, HTTP_404_NOT_FOUND
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from indexer import Prompt
from kvevents import discovery
from kvindex.meanings import meaning_of
from kvindex.pods import name_of
from kvindex.scoring import read_prompts, refusal, refuse_unknown
from scorer import ERROR_BOUNDS, InvalidRequest, Observation, PrefixScorer, ScorerError


class RoutedRequest(msgspec.Struct):
    """A prompt is sent to this pod now. The prompt is as in `/v1/score`, also the body of an OpenAI request."""

    pod: str
    model: str
    token_ids: list[int] | None = None
    prompt: str | list[Any] | None = None
    messages: list[dict[str, Any]] | None = None
    rank: int | None = None
    lora_name: str | None = None
    cache_salt: str | None = None
    mm_items: list[tuple[str, int, int]] = []


class ObserveRequest(RoutedRequest, kw_only=True):
    """The pod reused so many tokens of it."""

    cached_tokens: int


class RoutedAnswer(msgspec.Struct):
    """What was noted."""

    pod: str


def feedback_routes(
    scorer: PrefixScorer, followed: discovery.Follower, *, max_tokens: int, max_body_bytes: int
) -> list[HTTPRouteHandler]:
    """Make `/v1/routed` and `/v1/observe`. A pod that the index does not know is answered with 404."""

    async def read(data: RoutedRequest, body: bytes) -> Prompt:
        if data.token_ids is not None:
            refuse_unknown(type(data), body)
        prompts = await read_prompts(scorer, body, max_tokens=max_tokens)
        if len(prompts) > 1:
            raise InvalidRequest(f"prompt: {len(prompts)} prompts; say each by itself")
        return prompts[0]

    @post("/v1/routed", status_code=HTTP_200_OK, request_max_body_size=max_body_bytes)
    async def routed(request: Request[Any, Any, Any], data: JSONBody[RoutedRequest]) -> RoutedAnswer:
        """Say that a prompt is sent to a pod now: its blocks count as speculative for a while."""
        try:
            prompt = await read(data, await request.body())
            known = await scorer.arouted(name_of(data.pod, followed), prompt, rank=data.rank)
        except ScorerError as error:
            raise refusal(error) from error
        if not known:
            raise _unknown(data)
        return RoutedAnswer(data.pod)

    @post("/v1/observe", status_code=HTTP_200_OK, request_max_body_size=max_body_bytes)
    async def observe(request: Request[Any, Any, Any], data: JSONBody[ObserveRequest]) -> Observation:
        """Say what the engine reused of a prompt: the error of the prediction is measured."""
        try:
            prompt = await read(data, await request.body())
            name = name_of(data.pod, followed)
            seen = await scorer.aobserve(name, prompt, cached_tokens=data.cached_tokens, rank=data.rank)
        except ScorerError as error:
            raise refusal(error) from error
        if seen.outcome == "unknown_pod":
            raise _unknown(data)
        return seen

    return [routed, observe]


def _unknown(data: RoutedRequest) -> HTTPException:
    rank = "" if data.rank is None else f", rank {data.rank}"
    return HTTPException(
        status_code=HTTP_404_NOT_FOUND,
        detail=f"pod {data.pod[:200]!r}{rank}: no such pod of model {data.model[:200]!r}; GET /v1/pods lists them",
    )


class FeedbackMetrics(Collector):
    """What was observed, as metrics. Only pods that the index knows have a label."""

    def __init__(self, scorer: PrefixScorer) -> None:
        self._scorer = scorer

    def collect(self) -> Iterator[Metric]:
        """Read all metrics."""
        labels = ["pod", "rank"]
        errors = HistogramMetricFamily(
            "kvindex_prediction_error_blocks", "Blocks predicted less blocks reused, without sign", labels=labels
        )
        outcomes = CounterMetricFamily("kvindex_observations", "Observed requests", labels=[*labels, "outcome"])
        drifting = GaugeMetricFamily("kvindex_pod_drifting", "1 where predictions keep missing", labels=labels)
        for tally in self._scorer.observations():
            names = [tally.source.pod, str(tally.source.rank)]
            buckets, total = [], 0
            for bound, count in zip([*ERROR_BOUNDS, None], tally.errors, strict=True):
                total += count
                buckets.append(("+Inf" if bound is None else str(float(bound)), total))
            errors.add_metric(names, buckets, tally.error_sum)
            for outcome, count in sorted(tally.outcomes.items()):
                outcomes.add_metric([*names, outcome], count)
            drifting.add_metric(names, tally.drifting)
        stats = self._scorer.stats()
        outcomes.add_metric(["", "", "unknown_pod"], stats.pop("unknown_pods_total"))
        yield errors
        yield outcomes
        yield drifting
        for name, value in stats.items():
            plain = name.removesuffix("_total")
            family = CounterMetricFamily if plain != name else GaugeMetricFamily
            yield family(f"kvindex_scorer_{plain}", meaning_of("scorer", plain), value=value)
