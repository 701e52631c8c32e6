"""What a service says of a fleet beside what the fleet's engines hold."""

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import httpx

from kvindex.client import open_client
from kvindex.fleet import Fleet

_LINGER_S = 0.02


class Checkpoint(NamedTuple):
    """What comparing a service with the engines gave."""

    prompts: int
    differences: list[str]
    degraded: int
    """Pods that the service calls degraded."""


class Checker:
    """Compares the answers of a service with what the engines of a fleet hold. Traffic must pause meanwhile."""

    def __init__(self, fleet: Fleet, url: str, *, timeout: float = 30.0, token: str = "") -> None:
        self._fleet = fleet
        self.url = url
        self._timeout = timeout
        self._base = url.rstrip("/")
        self._client = open_client(token=token, timeout=timeout, proxies=False)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def check(self, prompts: Sequence[list[int]], stop: threading.Event) -> Checkpoint:
        """Wait until the service has heard all that was published, then compare its answers for `prompts`.

        What keeps the service from answering is a difference too.
        """
        try:
            degraded, differences = self._catch_up(stop)
            if not differences:
                for prompt in prompts:
                    differences += self._compare(prompt)
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
            return Checkpoint(len(prompts), [f"the service did not answer as expected: {error!r:.300}"], 0)
        return Checkpoint(len(prompts), differences, degraded)

    def _catch_up(self, stop: threading.Event) -> tuple[int, list[str]]:
        deadline = time.monotonic() + self._timeout
        while True:
            answer = self._client.get(f"{self._base}/v1/pods").raise_for_status().json()
            known = {entry["pod"]: entry for entry in answer["pods"] if entry["rank"] == 0}
            behind = []
            for pod in self._fleet.pods:
                last = known.get(pod.name, {}).get("last_seq")
                if pod.publisher.last_seq >= 0 and last != pod.publisher.last_seq:
                    behind.append(f"{pod.name}: published up to {pod.publisher.last_seq}, the service is at {last}")
            if not behind or time.monotonic() >= deadline:
                names = {pod.name for pod in self._fleet.pods}
                return sum(known[name]["trust"] != "exact" for name in names & known.keys()), behind
            stop.wait(_LINGER_S)
            if stop.is_set():
                deadline = min(deadline, time.monotonic() + 1.0)
                threading.Event().wait(_LINGER_S)

    def _compare(self, prompt: list[int]) -> list[str]:
        body = {"model": self._fleet.model, "token_ids": prompt}
        answer = self._client.post(f"{self._base}/v1/score", json=body).raise_for_status().json()
        blocks: dict[str, int] = {match["pod"]: match["blocks"] for match in answer["matches"] if match["rank"] == 0}
        differences = []
        for pod in self._fleet.pods:
            held, said = pod.engine.hit_blocks(prompt), blocks.get(pod.name, 0)
            if held != said:
                differences.append(
                    f"{pod.name} ({pod.dialect}): {held} blocks of {len(prompt)} tokens, the service says {said}"
                )
        return differences
