"""What routers tell the service back: where they sent a prompt, and what the engine reused of it."""

from collections.abc import Iterator
from typing import Any

import msgspec
from litestar import Request, post
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.status_codes import HTTP_200_OK, HTTP_404_NOT_FOUND
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from indexer import Prompt
from kvevents import discovery
from kvindex.meanings import meaning_of
from kvindex.pods import name_of
from kvindex.questions import OBSERVE, ROUTED, Question, RoutedText, RoutedTokens, prompts_of
from kvindex.tracing import note
from scorer import ERROR_BOUNDS, InvalidRequest, Observation, PrefixScorer


class RoutedAnswer(msgspec.Struct):
    """What was noted."""

    pod: str


def feedback_routes(
    scorer: PrefixScorer, followed: discovery.Follower, *, max_tokens: int, max_body_bytes: int
) -> list[HTTPRouteHandler]:
    """Make `/v1/routed` and `/v1/observe`. A pod that the index does not know is answered with 404."""

    async def prompt_of(told: Question) -> Prompt:
        prompts = await prompts_of(told, scorer, max_tokens=max_tokens)
        if len(prompts) > 1:
            raise InvalidRequest(f"prompt: {len(prompts)} prompts; say each by itself")
        (prompt,) = prompts
        note("kvindex.model", prompt.model)
        note("kvindex.prompt_tokens", prompt.length)
        return prompt

    @post("/v1/routed", status_code=HTTP_200_OK, request_max_body_size=max_body_bytes)
    async def routed(request: Request[Any, Any, Any]) -> RoutedAnswer:
        """Say that a prompt is sent to a pod now: its blocks count as speculative for a while."""
        told = await ROUTED.aread(await request.body(), max_tokens=max_tokens)
        known = await scorer.arouted(name_of(told.pod, followed), await prompt_of(told), rank=told.rank)
        if not known:
            raise _unknown(told)
        return RoutedAnswer(told.pod)

    @post("/v1/observe", status_code=HTTP_200_OK, request_max_body_size=max_body_bytes)
    async def observe(request: Request[Any, Any, Any]) -> Observation:
        """Say what the engine reused of a prompt: the error of the prediction is measured."""
        told = await OBSERVE.aread(await request.body(), max_tokens=max_tokens)
        name = name_of(told.pod, followed)
        seen = await scorer.aobserve(name, await prompt_of(told), cached_tokens=told.cached_tokens, rank=told.rank)
        if seen.outcome == "unknown_pod":
            raise _unknown(told)
        return seen

    return [routed, observe]


def _unknown(told: RoutedTokens | RoutedText) -> HTTPException:
    rank = "" if told.rank is None else f", rank {told.rank}"
    return HTTPException(
        status_code=HTTP_404_NOT_FOUND,
        detail=f"pod {told.pod[:200]!r}{rank}: no such pod of model {told.model[:200]!r}; GET /v1/pods lists them",
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
