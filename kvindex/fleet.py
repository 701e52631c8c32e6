"""`kvindex fleet`: simulated pods that publish real events, and know what they hold."""

import json
import random
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import httpx
import zmq

from kvevents.testing import Dialect, Publisher
from kvindex.engine import Ran, SimulatedEngine
from kvindex.errors import UserError

DIALECTS: tuple[Dialect, ...] = ("vllm-map", "vllm-array", "vllm-0.9", "sglang")
_CAUGHT_UP_S = 30.0
_SHOWN = 5


class Workload:
    """Prompts as chats make them: some system prompts, many conversations that grow turn by turn."""

    def __init__(self, seed: int = 0, *, systems: int = 8, conversations: int = 64) -> None:
        self._rng = random.Random(seed)
        self._systems = [self._tokens(200, 1200) for _ in range(systems)]
        self._open = [self._begin() for _ in range(conversations)]

    def next(self) -> tuple[list[int], list[int]]:
        """Give the tokens of the next prompt, and those of the answer it will get."""
        number = self._rng.randrange(len(self._open))
        if len(self._open[number]) > 4000 or self._rng.random() < 0.1:
            self._open[number] = self._begin()
        prompt = self._open[number] + self._tokens(20, 200)
        answer = self._tokens(20, 120)
        self._open[number] = prompt + answer
        return prompt, answer

    def _begin(self) -> list[int]:
        return list(self._rng.choice(self._systems))

    def _tokens(self, least: int, most: int) -> list[int]:
        return [self._rng.randrange(150_000) for _ in range(self._rng.randint(least, most))]


@dataclass
class SimulatedPod:
    """An engine and its publisher."""

    name: str
    engine: SimulatedEngine
    publisher: Publisher
    blocks: int = 0

    def run(self, prompt: list[int], answer: list[int]) -> Ran:
        """Serve one request and publish what happened."""
        ran = self.engine.run(prompt, answer)
        self.blocks += len(prompt + answer) // self.engine.block_size - ran.cached_tokens // self.engine.block_size
        if ran.events:
            self.publisher.publish(ran.events)
        return ran


class Fleet:
    """Some simulated pods. With `base_port` 0 any free ports, else pod i has base + 2i, and base + 2i + 1 for replay."""

    def __init__(
        self,
        pods: int = 16,
        *,
        host: str = "127.0.0.1",
        base_port: int = 0,
        model: str = "demo/model",
        block_size: int = 16,
        num_blocks: int = 4096,
        dialects: tuple[Dialect, ...] = ("vllm-map",),
    ) -> None:
        self.model = model
        self.pods: list[SimulatedPod] = []
        for number in range(pods):
            ports = (base_port + 2 * number, base_port + 2 * number + 1) if base_port else (0, 0)
            name = f"pod-{number}"
            try:
                publisher = Publisher(
                    f"tcp://{host}:{ports[0]}",
                    replay=f"tcp://{host}:{ports[1]}",
                    topic=f"kv@{name}@{model}".encode(),
                )
            except zmq.ZMQError as error:
                self.close()
                raise UserError(
                    f"ports {ports[0]} and {ports[1]} on {host}: {error.strerror}; choose others with --base-port"
                ) from error
            engine = SimulatedEngine(block_size, num_blocks, dialects[number % len(dialects)])
            self.pods.append(SimulatedPod(name, engine, publisher))

    def close(self) -> None:
        """Close all sockets."""
        for pod in self.pods:
            pod.publisher.close()


def run_fleet(
    *,
    pods: int = 16,
    host: str = "127.0.0.1",
    base_port: int = 5557,
    model: str = "demo/model",
    block_size: int = 16,
    num_blocks: int = 4096,
    dialects: tuple[Dialect, ...] = ("vllm-map",),
    rate: float = 0.0,
    seconds: float = 0.0,
    wait_subscribers: int = 1,
    check: str | None = None,
    every: float = 10.0,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """Run simulated pods for `seconds` (0: until SIGINT or SIGTERM) at `rate` requests/s (0: full speed).

    With `check`, the URL of a `kvindex serve`, traffic pauses each `every` seconds and the scores given there are
    compared with what the pods hold; the exit status is 1 where they differ.
    """
    stop = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    fleet = Fleet(
        pods,
        host=host,
        base_port=base_port,
        model=model,
        block_size=block_size,
        num_blocks=num_blocks,
        dialects=dialects,
    )
    try:
        _introduce(fleet, as_json=as_json)
        if not _await_subscribers(fleet, wait_subscribers, stop):
            return 0
        return _traffic(fleet, Workload(seed), stop, rate=rate, seconds=seconds, check=check, every=every)
    finally:
        fleet.close()


def _introduce(fleet: Fleet, *, as_json: bool) -> None:
    listed = [
        {"pod": p.name, "endpoint": p.publisher.endpoint, "replay": p.publisher.replay, "model": fleet.model}
        for p in fleet.pods
    ]
    if as_json:
        print(json.dumps(listed), flush=True)
        return
    for pod in listed:
        print(f"{pod['pod']}  events {pod['endpoint']}  replay {pod['replay']}  model {pod['model']}", flush=True)


def _await_subscribers(fleet: Fleet, count: int, stop: threading.Event) -> bool:
    for number, pod in enumerate(fleet.pods):
        said = False
        while not pod.publisher.wait_for_subscribers(count, 1.0):
            if stop.is_set():
                return False
            if not said:
                print(
                    f"waiting for {count} subscriber(s) of {pod.name} ({number} of {len(fleet.pods)} ready)", flush=True
                )
                said = True
    return True


def _traffic(
    fleet: Fleet,
    workload: Workload,
    stop: threading.Event,
    *,
    rate: float,
    seconds: float,
    check: str | None,
    every: float,
) -> int:
    rng = random.Random(1)
    start = time.monotonic()
    checkpoint, number, requests, wrong = start + every, 0, 0, 0
    recent: list[list[int]] = []
    while not stop.is_set():
        now = time.monotonic()
        over = bool(seconds) and now - start >= seconds
        if now >= checkpoint or over:
            number += 1
            blocks = sum(pod.blocks for pod in fleet.pods)
            if check is None:
                print(f"{now - start:6.0f} s  {requests} requests, {blocks} blocks published", flush=True)
            else:
                differences = compare(fleet, check, recent + [workload.next()[0] for _ in range(10)])
                wrong += len(differences)
                verdict = "equal" if not differences else f"{len(differences)} DIFFERENT"
                print(
                    f"checkpoint {number}: {len(recent) + 10} prompts x {len(fleet.pods)} pods {verdict}, "
                    f"{requests} requests, {blocks} blocks published",
                    flush=True,
                )
                for line in differences[:_SHOWN]:
                    print(f"  {line}", flush=True)
            checkpoint = time.monotonic() + every
            if over:
                break
        prompt, answer = workload.next()
        rng.choice(fleet.pods).run(prompt, answer)
        requests += 1
        if len(recent) < 40:
            recent.append(prompt)
        elif rng.random() < 0.1:
            recent[rng.randrange(40)] = prompt
        if rate and stop.wait(max(0.0, start + requests / rate - time.monotonic())):
            break
    return 1 if wrong else 0


def compare(fleet: Fleet, url: str, prompts: list[list[int]]) -> list[str]:
    """Ask a service about some prompts, and say where its answers are not what the pods hold.

    Waits until the service has applied everything that was published. Raises `UserError` when it does not answer.
    """
    try:
        with httpx.Client(base_url=url, timeout=30.0) as client:
            late = _await_caught_up(fleet, client)
            if late:
                return [late]
            return [line for prompt in prompts for line in _differences(fleet, client, prompt)]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise UserError(f"{url}: no usable answer: {error!r}; is `kvindex serve` running there?") from error


def _await_caught_up(fleet: Fleet, client: httpx.Client) -> str:
    expected = {pod.name: pod.publisher.seq - 1 for pod in fleet.pods if pod.publisher.seq}
    deadline = time.monotonic() + _CAUGHT_UP_S
    pause = threading.Event()
    while True:
        known: dict[str, Any] = {pod["pod"]: pod["last_seq"] for pod in client.get("/v1/pods").json()["pods"]}
        behind = [name for name, seq in expected.items() if known.get(name) != seq]
        if not behind:
            return ""
        if time.monotonic() > deadline:
            name = behind[0]
            return f"{name}: published up to {expected[name]}, applied up to {known.get(name)} after {_CAUGHT_UP_S} s"
        pause.wait(0.02)


def _differences(fleet: Fleet, client: httpx.Client, prompt: list[int]) -> list[str]:
    response = client.post("/v1/score", json={"model": fleet.model, "token_ids": prompt})
    response.raise_for_status()
    told = {match["pod"]: (match["tokens"], match["trust"]) for match in response.json()["matches"]}
    lines = []
    for pod in fleet.pods:
        held = pod.engine.hit_blocks(prompt) * pod.engine.block_size
        tokens, trust = told.get(pod.name, (0, "exact"))
        if tokens != held or trust != "exact":
            lines.append(f"{pod.name}: {len(prompt)} tokens, holds {held}, told {tokens} ({trust})")
    return lines
