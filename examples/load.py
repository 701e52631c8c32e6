"""Sends the same conversations through the router under each policy, and compares what came of it.

    python -m examples.load --router http://127.0.0.1:8000 --scorer http://127.0.0.1:8080 \
        --pod pod-00=http://127.0.0.1:9000 --pod pod-01=http://127.0.0.1:9001 --rate 10 --rate 20 --folder out

Arrivals are open-loop: when a request is sent does not depend on when others end, and the time to its first token is
counted from the moment it was due. For each rate and policy the pods' caches are emptied, then the same requests come
at the same moments. The table goes to standard output; the folder gets `router.md`, `router.svg` and `router.json`.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from examples.plot import Panel, draw
from kvindex.workload import Turn, Workload

POLICIES = ("kv", "round-robin", "random")
READY_S = 60.0
_POLL_S = 0.02


class Served(msgspec.Struct):
    """What one request got."""

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int


class Result(msgspec.Struct):
    """What all requests of one rate under one policy got."""

    policy: str
    rate: float
    requests: int
    failed: int
    hit_share: float
    """Of all prompt tokens, those that were not computed again."""
    ttft_p50_ms: float
    ttft_p90_ms: float


class Load:
    """Drives one router."""

    def __init__(
        self, router: str, pods: dict[str, str], model: str, scorer: str | None, client: httpx.AsyncClient
    ) -> None:
        self._router = router.rstrip("/")
        self._pods = pods
        self._model = model
        self._scorer = scorer
        self._client = client

    async def ready(self) -> None:
        """Wait until the router, all pods and the scorer answer. Raises `TimeoutError`."""
        for url in [f"{self._router}/health", *(f"{pod}/health" for pod in self._pods.values())]:
            await self._until(f"{url} answers", self._answers(url))
        if self._scorer:
            await self._until(f"{self._scorer} is ready", self._answers(f"{self._scorer}/readyz"))

    async def empty(self) -> None:
        """Empty all caches, and wait until the scorer knows. Raises `TimeoutError`."""
        for url in self._pods.values():
            await self._until(f"{url} is empty", self._emptied(url))
        if self._scorer:
            await self._until("the scorer knows that the pods are empty", self._known_empty)

    async def run(self, policy: str, rate: float, turns: Sequence[Turn], seed: int) -> Result:
        """Send all requests at their moments, a Poisson process of `rate` a second; give what they got."""
        await self.empty()
        rng = random.Random(seed)
        due, sending = time.perf_counter() + 0.1, []
        for turn in turns:
            due += rng.expovariate(rate)
            sending.append(self._send(policy, turn, due))
        outcomes = await asyncio.gather(*sending, return_exceptions=True)
        served = [outcome for outcome in outcomes if isinstance(outcome, Served)]
        if not served:
            raise RuntimeError(f"{policy} at {rate:g}/s: no request was answered; one said {outcomes[0]!r}")
        times = sorted(one.ttft_s for one in served)
        return Result(
            policy=policy,
            rate=rate,
            requests=len(turns),
            failed=len(turns) - len(served),
            hit_share=sum(one.cached_tokens for one in served) / sum(one.prompt_tokens for one in served),
            ttft_p50_ms=1_000 * times[int(0.5 * len(times))],
            ttft_p90_ms=1_000 * times[int(0.9 * len(times))],
        )

    async def _send(self, policy: str, turn: Turn, due: float) -> Served:
        body = {
            "model": self._model,
            "prompt": turn.prompt,
            "max_tokens": len(turn.output),
            "simulated_output": turn.output,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        content, headers = msgspec.json.encode(body), {"x-routing-policy": policy, "content-type": "application/json"}
        await asyncio.sleep(due - time.perf_counter())
        first, usage = 0.0, None
        url = f"{self._router}/v1/completions"
        async with self._client.stream("POST", url, content=content, headers=headers) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter()
                    if '"usage"' in line:
                        usage = msgspec.json.decode(line[6:])["usage"]
        if usage is None:
            raise RuntimeError("the answer broke off")
        return Served(first - due, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])

    async def _until(self, what: str, true: Callable[[], Awaitable[bool]]) -> None:
        deadline = time.monotonic() + READY_S
        while not await true():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {READY_S:g} s: {what}")
            await asyncio.sleep(_POLL_S)

    def _answers(self, url: str) -> Callable[[], Awaitable[bool]]:
        async def ask() -> bool:
            try:
                return (await self._client.get(url)).is_success
            except httpx.HTTPError:
                return False

        return ask

    def _emptied(self, url: str) -> Callable[[], Awaitable[bool]]:
        async def ask() -> bool:
            answer = await self._client.post(f"{url}/reset_prefix_cache")
            return bool(answer.raise_for_status().json()["emptied"])

        return ask

    async def _known_empty(self) -> bool:
        answer: Any = (await self._client.get(f"{self._scorer}/v1/pods")).raise_for_status().json()
        return not any(pod["blocks"] for pod in answer["pods"] if pod["pod"] in self._pods)


async def compare(load: Load, turns: Sequence[Turn], rates: Sequence[float], seed: int) -> list[Result]:
    """Run all policies at all rates, one after the other."""
    await load.ready()
    results = []
    for rate in rates:
        for policy in POLICIES:
            results.append(await load.run(policy, rate, turns, seed))
            print(row(results[-1]), flush=True)
    return results


HEADER = "| requests/s | policy | hit share | first token p50 | p90 | failed |\n|---|---|---|---|---|---|"


def row(result: Result) -> str:
    """Give a line of the table."""
    times = f"{result.ttft_p50_ms:.0f} ms | {result.ttft_p90_ms:.0f} ms"
    return f"| {result.rate:g} | {result.policy} | {result.hit_share:.0%} | {times} | {result.failed} |"


def plot(results: Sequence[Result]) -> str:
    """Draw all of it, as SVG."""

    def lines(value: Callable[[Result], float]) -> dict[str, list[tuple[float, float]]]:
        return {policy: [(one.rate, value(one)) for one in results if one.policy == policy] for policy in POLICIES}

    return draw(
        [
            Panel("hit share, %", lines(lambda one: 100 * one.hit_share)),
            Panel("time to first token p50, ms", lines(lambda one: one.ttft_p50_ms)),
            Panel("time to first token p90, ms", lines(lambda one: one.ttft_p90_ms)),
        ],
        below="requests/s",
    )


async def measure(options: argparse.Namespace) -> int:
    """Do what the command line asks for; give the exit status."""
    pods = dict(pod.split("=", 1) for pod in options.pod)
    workload = Workload(
        options.seed,
        systems=options.systems,
        conversations=options.conversations,
        max_tokens=options.max_tokens,
        system_tokens=options.system_tokens,
    )
    turns = [next(workload) for _ in range(options.requests)]
    tokens = sum(len(turn.prompt) for turn in turns)
    print(
        f"{len(turns)} requests of {tokens // len(turns)} prompt tokens on {len(pods)} pods, for each line\n\n{HEADER}"
    )
    limits, timeout = httpx.Limits(max_connections=None, max_keepalive_connections=16), httpx.Timeout(120.0)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client:
        load = Load(options.router, pods, options.model, options.scorer, client)
        results = await compare(load, turns, options.rate, options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    table = "\n".join([HEADER, *map(row, results)])
    (options.folder / "router.md").write_text(table + "\n")
    (options.folder / "router.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    (options.folder / "router.svg").write_text(plot(results))
    print(f"\nplot: {options.folder / 'router.svg'}")
    return 1 if any(result.failed for result in results) else 0


def arguments() -> argparse.ArgumentParser:
    """Give the command line."""
    parser = argparse.ArgumentParser(description="The same conversations under each policy of the router.")
    parser.add_argument("--router", default="http://127.0.0.1:8000")
    parser.add_argument("--scorer", help="waited for until it knows that the caches are empty")
    parser.add_argument("--pod", action="append", required=True, metavar="NAME=URL")
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--rate", action="append", type=float, required=True, help="requests/s; several are compared")
    parser.add_argument("--requests", type=int, default=300, help="for each rate and policy")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--systems", type=int, default=12, help="system prompts that conversations share")
    parser.add_argument("--conversations", type=int, default=24, help="going on at a time")
    parser.add_argument("--system-tokens", type=int, default=3_072, help="of the longest system prompt")
    parser.add_argument("--max-tokens", type=int, default=8_192, help="of a conversation")
    parser.add_argument("--folder", type=Path, default=Path("build/router"), help="gets table and plot")
    return parser


if __name__ == "__main__":
    raise SystemExit(asyncio.run(measure(arguments().parse_args())))
