"""Keeps the followed pods those that the sources of pods say there are."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import structlog

from kvevents.discovery.base import Discovery, Found
from kvevents.discovery.identity import Aliases, Identity, identity_of
from kvevents.errors import DiscoveryError, PodTaken, SubscriptionError

RETRY_S = 0.5
RETRY_MAX_S = 30.0
MAX_PODS = 16_384
"""Of one source. More is not a fleet but somebody else's answer."""
_JOIN_S = 1.0


class Target(Protocol):
    """What follows pods: `Subscriptions`, or what divides them among several builders."""

    def update(self, wanted: Mapping[str, Found]) -> Mapping[str, SubscriptionError]:
        """Follow these pods and no others; give those that cannot be followed, with the reason."""


class Follower:
    """Asks all sources, each in a thread of its own, and follows what any of them finds.

    A source that cannot be asked keeps what it said last: an outage never removes a pod. `fixed` are pods that are
    always there. Where two name the same pod, one that was registered goes first, then the fixed, then the sources in
    their order. `target` is None where pods are only to be known by all their names. `retry_s` is the first wait
    after an error; it doubles up to `retry_max_s`.

    All methods may be called from any thread. `put` and `drop` work also before `start`.
    """

    def __init__(
        self,
        target: Target | None,
        sources: Sequence[Discovery] = (),
        *,
        fixed: Iterable[Found] = (),
        identity: Identity = "name",
        retry_s: float = RETRY_S,
        retry_max_s: float = RETRY_MAX_S,
    ) -> None:
        self._target = target
        self._sources = list(sources)
        self._identity: Identity = identity
        self._retry_s = retry_s
        self._retry_max_s = retry_max_s
        self._log = structlog.get_logger("kvevents")
        # held while pods are subscribed, which may wait for sockets and for Redis: who only reads must not wait for it
        self._lock = threading.RLock()
        self._fixed = list(fixed)
        self._seen: list[Sequence[Found] | None] = [None] * len(self._sources)
        self._down: set[int] = set()
        self._registered: dict[str, Found] = {}
        self._set_aside: dict[str, Found] = {}
        self._wanted: dict[str, Found] = {}
        self._failed: dict[str, str] = {}
        self._conflicts: set[str] = set()
        self._counters: Counter[str] = Counter()
        self._aliases = Aliases({})
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"discovery-{number}", daemon=True)
            for number in range(len(self._sources))
        ]

    def start(self) -> None:
        """Follow the fixed pods, and begin to ask the sources. Raises `SubscriptionError` for a fixed pod."""
        with self._lock:
            for error in self._update().values():
                raise error
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop asking. The pods stay followed; who closes the pool ends that. May be called twice."""
        self._stop.set()
        until = time.monotonic() + _JOIN_S
        for thread in self._threads:
            if thread.ident is not None:
                # one may wait for a server that has nothing to say: nor has it, and it ends with the process
                thread.join(max(0.0, until - time.monotonic()))

    def put(self, pod: str, found: Found) -> bool:
        """Follow a pod that was registered by name; say whether it is new.

        Raises `PodTaken` when there is a pod of that name already which was not registered, `SubscriptionError` when
        it cannot be followed: then it is as it was, but for what a replaced one held.
        """
        with self._lock:
            if self._target is None:
                raise PodTaken(f"pod {pod!r}: this process follows no pods; register it where an index is built")
            before = self._registered.get(pod)
            if before is None and pod in self._wanted:
                raise PodTaken(f"pod {pod!r}: it is found by configuration or discovery; choose another name")
            aside = self._set_aside.pop(pod, None)
            self._registered[pod] = found
            error = self._update().get(pod)
            if error is not None:
                del self._registered[pod]
                if before is not None:
                    self._registered[pod] = before
                if aside is not None:
                    self._set_aside[pod] = aside
                self._update()
                raise error
            return before is None

    def drop(self, pod: str) -> bool:
        """Follow a pod no more; say whether it was followed.

        One that a source finds is left out until it is gone there, or another one under its name.
        """
        with self._lock:
            if pod not in self._wanted:
                return False
            if self._registered.pop(pod, None) is None:
                self._set_aside[pod] = self._wanted[pod]
            self._update()
            return True

    def resolve(self, asked: Iterable[str]) -> list[str]:
        """Give the names of pods that are asked for by address or any other name they have."""
        return self._aliases.resolve(asked)

    def pods(self) -> dict[str, Found]:
        """Give all pods that are wanted, by the name they are followed under."""
        return dict(self._wanted)

    def waiting(self) -> list[str]:
        """Give the sources that have not said anything yet."""
        return [source.label for source, seen in zip(self._sources, self._seen, strict=True) if seen is None]

    def stats(self) -> dict[str, int]:
        """Give all counters and gauges. Names that end in ``_total`` are counters."""
        names = ("added_total", "removed_total", "replaced_total", "errors_total")
        gauges = {
            "pods": len(self._wanted),
            "pods_failed": len(self._failed),
            "pods_set_aside": len(self._set_aside),
            "conflicts": len(self._conflicts),
            "sources": len(self._sources),
            "sources_unavailable": len(self._down),
        }
        return {name: self._counters[name] for name in names} | gauges

    def _run(self, number: int) -> None:
        source, failures = self._sources[number], 0
        while not self._stop.is_set():
            try:
                for pods in source.watch(self._stop):
                    if self._stop.is_set():
                        return
                    self._take(number, pods)
                    failures = 0
            except Exception as error:  # noqa: BLE001  (whatever a source runs into, the others go on, and it is asked again)
                failures += 1
                self._note_error(number, error)
            # also after an end without an error: a source that has nothing to wait for must not spin
            self._stop.wait(min(self._retry_max_s, self._retry_s * 2 ** min(failures, 16)))

    def _take(self, number: int, pods: Sequence[Found]) -> None:
        if len(pods) > MAX_PODS:
            raise DiscoveryError(f"{self._sources[number].label}: {len(pods)} pods, at most {MAX_PODS} are followed")
        with self._lock:
            unchanged = self._seen[number] is not None and list(self._seen[number] or ()) == list(pods)
            self._seen[number] = list(pods)
            if number in self._down:
                self._down.discard(number)
                self._log.info("discovery_back", source=self._sources[number].label, pods=len(pods))
            if not unchanged or self._failed:
                self._update()

    def _note_error(self, number: int, error: Exception) -> None:
        with self._lock:
            self._counters["errors_total"] += 1
            again = number in self._down
            self._down.add(number)
            seen = self._seen[number]
        if not again:
            # what has no name of ours is a defect of ours, or of a library
            text = str(error) if isinstance(error, DiscoveryError | SubscriptionError) else repr(error)
            source = self._sources[number].label
            self._log.warning("discovery_unavailable", source=source, error=text, pods_kept=len(seen or ()))

    def _update(self) -> Mapping[str, SubscriptionError]:
        wanted = self._union()
        before, self._wanted = self._wanted, wanted
        self._aliases = Aliases(wanted)
        self._counters["added_total"] += len(wanted.keys() - before.keys())
        self._counters["removed_total"] += len(before.keys() - wanted.keys())
        self._counters["replaced_total"] += sum(before[name] != wanted[name] for name in before.keys() & wanted.keys())
        failed = {} if self._target is None else self._target.update(wanted)
        texts = {name: str(error) for name, error in failed.items()}
        for name, text in texts.items():
            if self._failed.get(name) != text:
                self._log.error("not_subscribed", pod=name, error=text)
        self._failed = texts
        return failed

    def _union(self) -> dict[str, Found]:
        wanted = dict(self._registered)
        found_now: dict[str, Found] = {}
        conflicts: set[str] = set()
        for pods in [self._fixed, *(seen for seen in self._seen if seen is not None)]:
            for found in pods:
                name = identity_of(found, self._identity)
                first = found_now.setdefault(name, found)
                if first is not found and first != found:
                    conflicts.add(name)
                    if name not in self._conflicts:
                        self._log.warning("two_pods_of_one_name", pod=name, follows=first.ends(), ignores=found.ends())
        self._conflicts = conflicts
        # a pod that was set aside comes back as another one only
        self._set_aside = {name: found for name, found in self._set_aside.items() if found_now.get(name) == found}
        for name, found in found_now.items():
            if name not in self._set_aside:
                wanted.setdefault(name, found)
        return wanted
