"""All that a service knows of itself at one moment: what `GET /v1/stats` gives, and what its own checks judge."""

import threading
import time
from collections.abc import Iterable, Mapping

import msgspec

from indexer import Index
from kvevents import EventPool, discovery
from kvindex.tracing import note

_MOST_NAMES = 256


class PodStatus(msgspec.Struct, frozen=True):
    """What is known of one rank of a pod."""

    pod: str
    rank: int
    model: str
    blocks: int
    tiers: dict[str, int]
    block_sizes: list[int]
    trust: str
    """``exact``, or ``degraded``: then `reason` says why."""
    reason: str
    connected: bool | None
    """Whether its publisher is; None for those that connect to us."""
    last_seq: int | None
    """The number of the last message that was applied."""
    messages: int
    """Applied since the service started."""
    gaps: int
    """How often messages were missing for good."""
    lag_s: float | None
    """From the engine's time of a message to ours when it was applied; clocks that differ are in it. Of the last one
    that came by itself, not of what was asked for again."""
    silent_s: float | None
    """Seconds since the last message was applied; None where none was."""
    live_s: float | None = None
    """Seconds since the last one that came by itself."""
    incarnation: int = 0
    """Which life of the rank it is."""
    since: float = 0.0
    """When its answers began to be degraded, in seconds since the epoch; 0.0 where they are exact."""


class Pods(msgspec.Struct, frozen=True):
    """Every rank of every pod that is known."""

    pods: list[PodStatus]


class Stats(msgspec.Struct, frozen=True):
    """A service at one moment."""

    at: float
    """When, in seconds since the epoch."""
    index: dict[str, int]
    pool: dict[str, int]
    pods: list[PodStatus]
    not_connected: list[str] = []
    """Subscribed pods whose publisher cannot be reached."""
    followed: list[str] = []
    """Pods that this process follows, whether they said anything or not."""
    without_replay: list[str] = []
    """Those that have no replay endpoint."""
    unheard: dict[str, str] = {}
    """Those whose topic filter does not let through what they publish, and the topic of that."""
    block_size: int | None = None
    """What the configuration says of block sizes, if it does."""
    asked_models: list[str] = []
    """Models that questions were for lately."""
    asked_pods: list[str] = []
    """Pods that questions named lately."""


class Asked:
    """The names that questions were for lately: at most 256 of either kind, those asked for first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, None] = {}
        self._pods: dict[str, None] = {}

    def note(self, model: str, pods: Iterable[str] | None) -> None:
        """Remember what one question was for."""
        note("kvindex.model", model)
        if model in self._models and all(map(self._pods.__contains__, pods or ())):
            return
        with self._lock:
            for known, names in ((self._models, (model,)), (self._pods, pods or ())):
                for name in names:
                    if len(known) < _MOST_NAMES:
                        known.setdefault(name[:_MOST_NAMES])

    def names(self) -> tuple[list[str], list[str]]:
        """Give the models and the pods."""
        with self._lock:
            return list(self._models), list(self._pods)

    def forget(self) -> None:
        """Begin anew, so that a name nobody asks for any more is gone."""
        with self._lock:
            self._models, self._pods = {}, {}


def statuses_of(index: Index, pool: EventPool) -> list[PodStatus]:
    """Look at all pods. Raises `IndexUnavailable`."""
    now = time.time()
    connected, heard, sequences = pool.connected(), pool.heard(), pool.sequences()
    statuses = []
    for status in index.sources():
        last = heard.get(status.source)
        statuses.append(
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
                connected=connected.get(status.source.pod),
                last_seq=sequences.get(status.source, status.last_seq),
                messages=last.messages if last else 0,
                gaps=last.gaps if last else 0,
                lag_s=last.lag_s if last else None,
                silent_s=now - last.at if last else None,
                live_s=now - last.live_at if last and last.live_at is not None else None,
            )
        )
    return statuses


def collect(
    index: Index,
    pool: EventPool,
    asked: Asked,
    followed: Mapping[str, discovery.Found],
    *,
    block_size: int | None = None,
) -> Stats:
    """Look at a service that follows these pods. Raises `IndexUnavailable`."""
    models, pods = asked.names()
    return Stats(
        at=time.time(),
        index=dict(index.stats()),
        pool=pool.stats(),
        pods=statuses_of(index, pool),
        not_connected=sorted(pod for pod, is_connected in pool.connected().items() if not is_connected),
        followed=sorted(followed),
        unheard=pool.unheard(),
        block_size=block_size,
        without_replay=sorted(pod for pod, found in followed.items() if not all(one.replay for one in found.endpoints)),
        asked_models=models,
        asked_pods=pods,
    )
