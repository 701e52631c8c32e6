"""What is counted of questions and their answers, whoever carries them."""

import asyncio
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Literal, ParamSpec, TypeAlias, TypeVar, get_args

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from indexer import IndexUnavailable
from kvindex.tracing import note_found
from scorer import PodMatch, ScorerError, Timings, Unavailable

Carrier: TypeAlias = Literal["http", "grpc"]
Outcome: TypeAlias = Literal["answered", "refused", "unavailable", "failed"]
P = ParamSpec("P")
T = TypeVar("T")

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)
_TEXT_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)


def stages_of(begun: float, made: float, matched: float, timings: Timings) -> dict[str, float]:
    """Give the seconds of each stage of an answer that is ready now: its prompts were `made` and `matched` by then."""
    return {
        "read": made - begun - timings.render - timings.tokenize,
        "render": timings.render,
        "tokenize": timings.tokenize,
        "match": matched - made,
        "encode": time.perf_counter() - matched,
    }


class _Times:
    """A histogram of seconds. The caller has a lock: one for all that an answer counts is several times cheaper than
    the package's own, which has one for each bucket.
    """

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS) + 1)
        self._sum = 0.0

    def note(self, seconds: float) -> None:
        self._counts[bisect_left(_BUCKETS, seconds)] += 1
        self._sum += seconds

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str] = ()) -> None:
        bounds = [*map(str, _BUCKETS), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)


class AnswerMetrics(Collector):
    """Counters and times of all questions. Names are llm-d's where they mean the same."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered = self._hits = self._blocks = self._tokens = 0
        self._latency, self._wait, self._match = _Times(), _Times(), _Times()
        self._outcomes: dict[tuple[Carrier, Outcome], int] = {
            (by, outcome): 0 for by in get_args(Carrier) for outcome in get_args(Outcome)
        }
        self._render, self._tokenize = (
            Histogram(f"kvcache_tokenization_{name}_latency_seconds", what, buckets=_TEXT_BUCKETS, registry=None)
            for name, what in (
                ("render_chat_template", "Time to render the messages of one question"),
                ("tokenization", "Time to tokenize the text of one question"),
            )
        )

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        latency = HistogramMetricFamily("kvcache_index_lookup_latency_seconds", "Time to answer one")
        stages = HistogramMetricFamily("kvindex_answer_stage_seconds", "Parts of an answer's time", labels=["stage"])
        outcomes = CounterMetricFamily("kvindex_questions", "Questions by outcome", labels=["by", "outcome"])
        found = "Blocks found, each question's on the pod that holds the most"
        with self._lock:
            counts = (
                ("kvcache_index_lookup_requests", "Questions answered", self._answered),
                # llm-d adds the same number to both
                ("kvcache_index_lookup_hits", found, self._hits),
                ("kvcache_index_max_pod_hit_count", found, self._hits),
                ("kvindex_lookup_blocks", "Whole blocks of prompts asked for", self._blocks),
                ("kvindex_lookup_tokens", "Tokens of prompts asked for", self._tokens),
            )
            self._latency.add_to(latency)
            self._wait.add_to(stages, ["wait"])
            self._match.add_to(stages, ["match"])
            for labels, count in self._outcomes.items():
                outcomes.add_metric(labels, count)
        yield from (CounterMetricFamily(name, what, value=count) for name, what, count in counts)
        yield from (latency, stages, outcomes)
        yield from self._render.collect()
        yield from self._tokenize.collect()

    @contextmanager
    def failures(self, by: Carrier) -> Iterator[None]:
        """Count an exception inside as a question without an answer."""
        try:
            yield
        except Exception as error:
            with self._lock:
                self._outcomes[by, _outcome_of(error)] += 1
            raise

    @contextmanager
    def question(self, by: Carrier) -> Iterator["AnswerMetrics"]:
        """Count and time what is done inside as one question; an exception says that there is no answer."""
        begun = time.perf_counter()
        with self.failures(by):
            yield self
        self.answered(by, time.perf_counter() - begun)

    def answered(self, by: Carrier, seconds: float) -> None:
        """Count one question that was answered in so many seconds."""
        with self._lock:
            self._outcomes[by, "answered"] += 1
            self._answered += 1
            self._latency.note(seconds)

    async def to_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do some work in a thread, so that the event loop goes on; the wait for one is a stage."""
        came = time.perf_counter()

        def timed() -> T:
            with self._lock:
                self._wait.note(time.perf_counter() - came)
            return work(*args, **kwargs)

        return await asyncio.to_thread(timed)

    def timed(self, match: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the matching, and note how long it takes."""
        begun = time.perf_counter()
        try:
            return match(*args, **kwargs)
        finally:
            with self._lock:
                self._match.note(time.perf_counter() - begun)

    def tokenized(self, timings: Timings) -> None:
        """Count the stages of a question that was text, as far as it went through them."""
        for histogram, seconds in ((self._render, timings.render), (self._tokenize, timings.tokenize)):
            if seconds:
                histogram.observe(seconds)

    def found(self, matches: Sequence[PodMatch], *, tokens: int, block_size: int) -> None:
        """Count what was asked for and what was found of it."""
        most = max((match.blocks for match in matches), default=0)
        with self._lock:
            self._tokens += tokens
            self._blocks += tokens // block_size
            self._hits += most
        note_found(matches, tokens=tokens, block_size=block_size, most=most)


def _outcome_of(error: Exception) -> Outcome:
    if isinstance(error, IndexUnavailable | Unavailable):
        return "unavailable"
    return "refused" if isinstance(error, ScorerError) else "failed"
