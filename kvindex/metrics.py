"""Prometheus metrics, read from the counters that index and pool keep anyway.

Names are llm-d's where they mean the same, ours begin with ``kvindex_``. Labels name pods, never prompts. What each one
means, and what to do about it, is in `docs/operations.md`.
"""

from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Info, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from indexer import Index, IndexUnavailable, SourceStatus, implementation
from kvevents import EventPool, discovery
from kvindex.meanings import meaning_of

_OURS_AS_LLMD = {
    "stored_total": ("kvcache_index_admissions", "Blocks that engines announced as stored"),
    "removed_total": ("kvcache_index_evictions", "Blocks that engines announced as removed"),
}


class Metrics:
    """All metrics of one service."""

    def __init__(self, index: Index, pool: EventPool, followed: discovery.Follower, *more: Collector) -> None:
        # for the whole process: else each counter has one more series, which nobody asks for
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the package says no types of it
        self._registry = CollectorRegistry()
        for collector in (_Stats(index, pool, followed), _Pods(index, pool), *more):
            self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        build = Info("kvindex_build", "What runs here", registry=self._registry)
        build.info({"version": version("kv-cache-indexer"), "implementation": implementation})

    def text(self) -> bytes:
        """Give all metrics in the text format."""
        return generate_latest(self._registry)


class _Stats(Collector):
    """What each part counts of itself."""

    def __init__(self, index: Index, pool: EventPool, followed: discovery.Follower) -> None:
        self._index = index
        self._pool = pool
        self._followed = followed

    def collect(self) -> Iterator[Metric]:
        dropped = CounterMetricFamily("kvindex_dropped", "Messages and events dropped", labels=["reason"])
        for part, stats in self._parts():
            for name, value in sorted(stats.items()):
                plain = name.removesuffix("_total")
                if name.startswith("dropped_"):
                    dropped.add_metric([plain.removeprefix("dropped_")], value)
                else:
                    family = GaugeMetricFamily if plain == name else CounterMetricFamily
                    yield family(f"kvindex_{part}_{plain}", meaning_of(part, plain), value=value)
                if part == "index" and name in _OURS_AS_LLMD:
                    theirs, meaning = _OURS_AS_LLMD[name]
                    yield CounterMetricFamily(theirs, meaning, value=value)
        yield dropped

    def _parts(self) -> list[tuple[str, dict[str, int]]]:
        return [
            ("index", self._index.stats()),
            ("pool", self._pool.stats()),
            ("discovery", self._followed.stats()),
        ]


class _Pods(Collector):
    """What is known of each rank of each pod."""

    def __init__(self, index: Index, pool: EventPool) -> None:
        self._index = index
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        yield from self._held()
        yield from self._heard()

    def _held(self) -> Iterator[Metric]:
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

    def _heard(self) -> Iterator[Metric]:
        labels = ["pod", "rank"]
        messages = CounterMetricFamily("kvindex_pod_messages", "Messages applied", labels=labels)
        gaps = CounterMetricFamily("kvindex_pod_gaps", "How often messages were missing for good", labels=labels)
        at = GaugeMetricFamily(
            "kvindex_pod_last_message_timestamp_seconds", "When the last message was applied", labels=labels
        )
        lag = GaugeMetricFamily(
            "kvindex_pod_lag_seconds",
            "From the engine's time of the last live message until it was applied",
            labels=labels,
        )
        for source, last in sorted(self._pool.heard().items()):
            names = [source.pod, str(source.rank)]
            messages.add_metric(names, last.messages)
            gaps.add_metric(names, last.gaps)
            if last.at:
                at.add_metric(names, last.at)
            if last.lag_s is not None:
                lag.add_metric(names, last.lag_s)
        yield from (messages, gaps, at, lag)
        connected = GaugeMetricFamily("kvindex_pod_connected", "1 where its publishers are connected", labels=["pod"])
        for pod, is_connected in sorted(self._pool.connected().items()):
            connected.add_metric([pod], is_connected)
        yield connected
