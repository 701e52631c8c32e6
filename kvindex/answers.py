"""What is counted of questions and their answers, whoever carries them."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, ParamSpec, TypeAlias, TypeVar

from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from indexer import IndexUnavailable
from scorer import PodMatch, ScorerError, Timings, Unavailable

Carrier: TypeAlias = Literal["http", "grpc"]
P = ParamSpec("P")
T = TypeVar("T")

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)
_TEXT_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)


class AnswerMetrics(Collector):
    """Counters and times of all questions. Names are llm-d's where they mean the same."""

    def __init__(self) -> None:
        self._lookups = Counter("kvcache_index_lookup_requests_total", "Questions answered", registry=None)
        self._latency = Histogram(
            "kvcache_index_lookup_latency_seconds", "Time to answer one", buckets=_BUCKETS, registry=None
        )
        # llm-d adds the same number to both
        self._hits = [
            Counter(name, "Blocks found, each question's on the pod that holds the most", registry=None)
            for name in ("kvcache_index_lookup_hits_total", "kvcache_index_max_pod_hit_count_total")
        ]
        self._blocks = Counter("kvindex_lookup_blocks_total", "Whole blocks of prompts asked for", registry=None)
        self._tokens = Counter("kvindex_lookup_tokens_total", "Tokens of prompts asked for", registry=None)
        outcomes = Counter("kvindex_questions_total", "Questions by outcome", ["by", "outcome"], registry=None)
        self._outcomes = {
            (by, outcome): outcomes.labels(by, outcome)
            for by in ("http", "grpc")
            for outcome in ("answered", "refused", "unavailable", "failed")
        }
        stages = Histogram(
            "kvindex_answer_stage_seconds", "Parts of an answer's time", ["stage"], buckets=_BUCKETS, registry=None
        )
        self._render, self._tokenize = (
            Histogram(f"kvcache_tokenization_{name}_latency_seconds", what, buckets=_TEXT_BUCKETS, registry=None)
            for name, what in (
                ("render_chat_template", "Time to render the messages of one question"),
                ("tokenization", "Time to tokenize the text of one question"),
            )
        )
        self._wait, self._match = stages.labels("wait"), stages.labels("match")
        answered = (self._lookups, self._latency, *self._hits, self._blocks, self._tokens, outcomes, stages)
        self._all = (*answered, self._render, self._tokenize)

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        for one in self._all:
            yield from one.collect()

    @contextmanager
    def failures(self, by: Carrier) -> Iterator[None]:
        """Count an exception inside as a question without an answer."""
        try:
            yield
        except (IndexUnavailable, Unavailable):
            self._outcomes[by, "unavailable"].inc()
            raise
        except ScorerError:
            self._outcomes[by, "refused"].inc()
            raise
        except Exception:
            self._outcomes[by, "failed"].inc()
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
        self._outcomes[by, "answered"].inc()
        self._lookups.inc()
        self._latency.observe(seconds)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the matching in a thread, so that the event loop goes on; the wait for one is a stage too."""
        came = time.perf_counter()

        def timed() -> T:
            self._wait.observe(time.perf_counter() - came)
            return self.run_at_once(work, *args, **kwargs)

        return await asyncio.to_thread(timed)

    def run_at_once(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the matching here and now."""
        begun = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self._match.observe(time.perf_counter() - begun)

    def tokenized(self, timings: Timings) -> None:
        """Count the stages of a question that was text, as far as it went through them."""
        for histogram, seconds in ((self._render, timings.render), (self._tokenize, timings.tokenize)):
            if seconds:
                histogram.observe(seconds)

    def found(self, matches: Sequence[PodMatch], *, tokens: int, block_size: int) -> None:
        """Count what was asked for and what was found of it."""
        self._tokens.inc(tokens)
        self._blocks.inc(tokens // block_size)
        most = max((match.blocks for match in matches), default=0)
        for counter in self._hits:
            counter.inc(most)
