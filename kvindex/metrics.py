"""Prometheus metrics, read from the counters that index and pool keep anyway.

Names are llm-d's where they mean the same, ours begin with ``kvindex_``. Labels name pods, never prompts.
"""

from collections.abc import Iterator
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from indexer import Index, IndexUnavailable, SourceStatus
from kvevents import EventPool

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)


class Metrics:
    """All metrics of one service."""

    def __init__(self, index: Index, pool: EventPool) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Stats(index, pool))
        self._lookups = Counter("kvcache_index_lookup_requests_total", "Questions answered", registry=self._registry)
        self._latency = Histogram(
            "kvcache_index_lookup_latency_seconds", "Time to answer one", buckets=_BUCKETS, registry=self._registry
        )

    def answered(self, seconds: float) -> None:
        """Count one answered question."""
        self._lookups.inc()
        self._latency.observe(seconds)

    def text(self) -> bytes:
        """Give all metrics in the text format."""
        return generate_latest(self._registry)


class _Stats(Collector):
    def __init__(self, index: Index, pool: EventPool) -> None:
        self._index = index
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        dropped = CounterMetricFamily("kvindex_dropped", "Messages and events dropped", labels=["reason"])
        for part, stats in (("index", self._index.stats()), ("pool", self._pool.stats())):
            for name, value in sorted(stats.items()):
                plain = name.removesuffix("_total")
                if name.startswith("dropped_"):
                    dropped.add_metric([plain.removeprefix("dropped_")], value)
                elif name.endswith("_total"):
                    yield CounterMetricFamily(f"kvindex_{part}_{plain}", f"{plain} of the {part}", value=value)
                else:
                    yield GaugeMetricFamily(f"kvindex_{part}_{plain}", f"{plain} of the {part}", value=value)
        yield dropped
        blocks = GaugeMetricFamily("kvindex_pod_blocks", "Blocks held", labels=["pod", "rank", "tier"])
        degraded = GaugeMetricFamily(
            "kvindex_pod_degraded", "1 where answers may be wrong", labels=["pod", "rank", "reason"]
        )
        sources: list[SourceStatus] | None = None
        with suppress(IndexUnavailable):
            sources = self._index.sources()
        yield GaugeMetricFamily("kvindex_index_up", "1 where the index answers", value=sources is not None)
        for status in sources or ():
            labels = [status.source.pod, str(status.source.rank)]
            for tier, count in status.tiers.items():
                blocks.add_metric([*labels, tier], count)
            degraded.add_metric([*labels, status.degraded.partition(":")[0]], bool(status.degraded))
        yield blocks
        yield degraded
