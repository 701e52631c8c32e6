"""A fleet of simulated engines that publish over real sockets, and the traffic that keeps them busy.

`run_fleet` is the program behind `kvindex fleet`: it can also ask a running service about prompts and compare every
answer with what the engines themselves hold.
"""

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import httpx
import zmq

from kvevents.testing import DIALECTS, Dialect, Publisher, RawEvent, cleared, removed, stored
from kvindex.client import open_client
from kvindex.engine import EngineEvent, Removed, Request, SimulatedEngine, Stored
from kvindex.errors import UserError
from kvindex.signals import stopped_by_signals
from kvindex.workload import Workload

_LINGER_S = 0.02
_ASK_EVERY_S = 0.5
_REMEMBERED_HOMES = 2_000
_DIFFERENCES_SHOWN = 10


def on_the_wire(dialect: Dialect, event: EngineEvent, block_size: int) -> RawEvent:
    """Say an engine's event in the words of a dialect."""
    match event:
        case Stored(hashes, parent, tokens, lora_name, salt):
            return stored(dialect, hashes, parent, tokens, block_size, lora_name=lora_name, cache_salt=salt)
        case Removed(name):
            return removed(dialect, [name])
        case _:
            return cleared(dialect)


@dataclass(eq=False)
class Pod:
    """One engine and its publisher."""

    name: str
    engine: SimulatedEngine
    publisher: Publisher
    dialect: Dialect
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    blocks_published: int = 0

    @property
    def hit_share(self) -> float:
        """The share of all prompt tokens that was not computed again."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def begin(self, prompt: Sequence[int]) -> Request:
        """Run a prompt, publish what it did to the cache, and keep its blocks in use."""
        request = self.engine.begin(prompt)
        self.requests += 1
        self.prompt_tokens += len(prompt)
        self.cached_tokens += request.cached_tokens
        self._publish(request.events)
        return request

    def finish(self, request: Request, output: Sequence[int] = ()) -> None:
        """End a request and publish what its output did to the cache."""
        self._publish(self.engine.finish(request, output))

    def reset(self) -> None:
        """Empty the cache."""
        self._publish(self.engine.reset())

    def _publish(self, events: Sequence[EngineEvent]) -> None:
        if not events:
            return
        self.blocks_published += sum(len(event.hashes) for event in events if isinstance(event, Stored))
        self.publisher.publish([on_the_wire(self.dialect, event, self.engine.block_size) for event in events])


class Fleet:
    """Simulated pods, each with an engine, a publisher and a replay socket.

    Pod number i publishes at port `base_port + 2 * i` of `host` and replays at the port after it; `base_port=0` takes
    any free ports. `dialects` are given to the pods in turn. Use it as a context manager or call `close`.

    Raises `zmq.ZMQError` when an endpoint cannot be bound.
    """

    def __init__(
        self,
        pods: int = 16,
        *,
        base_port: int = 0,
        host: str = "127.0.0.1",
        model: str = "sim/model",
        block_size: int = 16,
        num_blocks: int = 2_048,
        dialects: Sequence[Dialect] = ("vllm-map",),
        seed: int = 0,
    ) -> None:
        if pods < 1 or not dialects:
            raise ValueError(f"expected at least one pod and one dialect, got {pods} and {list(dialects)}")
        self.model = model
        self.pods: list[Pod] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.max_sockets = 4 * pods + 64
        try:
            for number in range(pods):
                name = f"pod-{number:02}"
                ports = (base_port + 2 * number, base_port + 2 * number + 1) if base_port else (0, 0)
                publisher = Publisher(
                    f"tcp://{host}:{ports[0]}",
                    replay=f"tcp://{host}:{ports[1]}",
                    topic=f"kv@{name}@{model}".encode(),
                    context=self._context,
                )
                engine = SimulatedEngine(block_size=block_size, num_blocks=num_blocks, seed=seed * 1_000 + number)
                self.pods.append(Pod(name, engine, publisher, dialects[number % len(dialects)]))
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Fleet({len(self.pods)} pods of {self.model!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, pod: Pod | int, prompt: Sequence[int], output: Sequence[int] = ()) -> int:
        """Run one request on a pod (or the pod of a number); give the tokens that were cached."""
        chosen = self.pods[pod] if isinstance(pod, int) else pod
        request = chosen.begin(prompt)
        chosen.finish(request, output)
        return request.cached_tokens

    def endpoints(self) -> list[dict[str, str]]:
        """Say where each pod publishes and replays."""
        return [
            {
                "pod": pod.name,
                "endpoint": pod.publisher.endpoint,
                "replay": pod.publisher.replay or "",
                "model": self.model,
            }
            for pod in self.pods
        ]

    def blocks_published(self) -> int:
        """Give the number of blocks that all pods have announced."""
        return sum(pod.blocks_published for pod in self.pods)

    def close(self) -> None:
        """Close all sockets. May be called twice."""
        for pod in self.pods:
            pod.publisher.close()
        if not self._context.closed:
            self._context.term()


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


def run_fleet(
    *,
    pods: int = 16,
    base_port: int = 15_557,
    host: str = "127.0.0.1",
    model: str = "sim/model",
    block_size: int = 16,
    num_blocks: int = 2_048,
    dialects: Sequence[Dialect] = ("vllm-map",),
    seed: int = 0,
    wait_subscribers: int = 1,
    wait_timeout: float = 0.0,
    rate: float = 200.0,
    seconds: float = 0.0,
    check: Sequence[str] = (),
    every: float = 5.0,
    samples: int = 50,
    sync_timeout: float = 30.0,
    as_json: bool = False,
    question: Path | None = None,
    token: str = "",
) -> int:
    """Run a fleet until its time is over or somebody stops it; give the exit status.

    Endpoints go to standard output, with `as_json` as one line of JSON (all else then goes to standard error). Traffic
    of `rate` requests a second (0: as fast as it goes) starts when each pod has `wait_subscribers` subscribers; waiting
    ends with status 1 after `wait_timeout` seconds (0: never). It ends after `seconds` (0: at SIGINT or SIGTERM).
    `check` has the URLs of services: each `every` seconds, and at the end, traffic pauses and `samples` prompts are
    compared with each of them, see `Checker`, which are asked with `token`. Any difference makes the status 1.
    `question` is a file that has, once there is traffic, a question about one of the last prompts: a body for
    `/v1/score`. Raises `UserError` where it cannot be written.
    """
    unknown = set(dialects) - set(DIALECTS)
    if unknown:
        print(f"dialects: expected some of {', '.join(DIALECTS)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    out = sys.stderr if as_json else sys.stdout

    def say(text: str) -> None:
        print(text, file=out, flush=True)

    try:
        fleet = Fleet(
            pods,
            base_port=base_port,
            host=host,
            model=model,
            block_size=block_size,
            num_blocks=num_blocks,
            dialects=dialects,
            seed=seed,
        )
    except zmq.ZMQError as error:
        print(f"cannot bind the pods' ports from {base_port} on {host}: {error.strerror}", file=sys.stderr)
        return 1
    with fleet, stopped_by_signals() as stop:
        if as_json:
            print(json.dumps(fleet.endpoints()), flush=True)
        else:
            for entry in fleet.endpoints():
                say(f"{entry['pod']}  events {entry['endpoint']}  replay {entry['replay']}  model {entry['model']}")
        publishers = [pod.publisher for pod in fleet.pods]
        if wait_subscribers and not wait_for_subscribers(publishers, wait_subscribers, stop, say, timeout=wait_timeout):
            return 0 if stop.is_set() else 1
        checkers = [Checker(fleet, url, timeout=sync_timeout, token=token) for url in check]
        try:
            return _traffic(fleet, checkers, rate, seconds, every, samples, seed, question, stop, say)
        finally:
            for checker in checkers:
                checker.close()


def wait_for_subscribers(
    publishers: Sequence[Publisher],
    count: int,
    stop: threading.Event,
    say: Callable[[str], None],
    *,
    timeout: float = 0.0,
) -> bool:
    """Wait until each publisher has `count` subscribers, and say how it goes; say no after `timeout` s (0: never)."""
    deadline = time.monotonic() + timeout if timeout else float("inf")
    shown = -1
    while not stop.is_set():
        ready = sum(publisher.subscribers >= count for publisher in publishers)
        if ready != shown:
            say(f"{ready} of {len(publishers)} pods have {count} subscriber{'s' if count > 1 else ''}")
            shown = ready
        if ready == len(publishers):
            return True
        if time.monotonic() >= deadline:
            say(f"no subscribers within {timeout:g} s")
            return False
        stop.wait(_LINGER_S)
    return False


def _traffic(
    fleet: Fleet,
    checkers: Sequence[Checker],
    rate: float,
    seconds: float,
    every: float,
    samples: int,
    seed: int,
    question: Path | None,
    stop: threading.Event,
    say: Callable[[str], None],
) -> int:
    rng = random.Random(seed)
    engine = fleet.pods[0].engine
    workload = Workload(
        seed, max_tokens=min(max(2_048, 8 * engine.block_size), engine.num_blocks * engine.block_size // 2)
    )
    homes: dict[int, Pod] = {}
    status = requests = checkpoints = 0
    start = due = ask_at = time.monotonic()
    report_at = start + every
    while not stop.is_set():
        now = time.monotonic()
        over = bool(seconds) and now - start >= seconds
        if over or now >= report_at:
            checkpoints += 1
            status |= _report(fleet, checkers, workload.sample(samples), checkpoints, requests, stop, say)
            if over:
                break
            # the time that a checkpoint took does not count as missed traffic
            due += time.monotonic() - now
            report_at = time.monotonic() + every
        turn = next(workload)
        home = homes.get(turn.conversation)
        pod = home if home is not None and rng.random() < 0.7 else rng.choice(fleet.pods)
        homes[turn.conversation] = pod
        fleet.step(pod, turn.prompt, turn.output)
        requests += 1
        if question is not None and now >= ask_at:
            ask_at = now + _ASK_EVERY_S
            _write_question(question, fleet.model, turn.prompt)
        if len(homes) > _REMEMBERED_HOMES:
            homes.clear()
        if rate:
            due += 1 / rate
            stop.wait(max(0.0, due - time.monotonic()))
    say(f"{requests} requests, {fleet.blocks_published()} blocks published, {checkpoints} checkpoints")
    return status


def _write_question(path: Path, model: str, prompt: list[int]) -> None:
    """Write it beside the file and move it there: who reads meanwhile gets the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(json.dumps({"model": model, "token_ids": prompt}))
        new.replace(path)
    except OSError as error:
        raise UserError(f"--question {path}: {error.strerror}") from error


def _report(
    fleet: Fleet,
    checkers: Sequence[Checker],
    prompts: list[list[int]],
    number: int,
    requests: int,
    stop: threading.Event,
    say: Callable[[str], None],
) -> int:
    blocks, status = fleet.blocks_published(), 0
    if not checkers:
        say(f"{requests} requests, {blocks} blocks published")
    for checker in checkers:
        result, name = checker.check(prompts, stop), f"checkpoint {number}"
        if len(checkers) > 1:
            name += f", {checker.url}"
        if not result.differences:
            trust = f", {result.degraded} pods called degraded" if result.degraded else ""
            equal = f"{result.prompts} prompts x {len(fleet.pods)} pods equal"
            say(f"{name}: {equal}, {blocks} blocks published{trust}")
        elif stop.is_set():
            say(f"{name}: stopped before it was done")
        else:
            say(f"{name}: {len(result.differences)} DIFFERENCES, {blocks} blocks published")
            for difference in result.differences[:_DIFFERENCES_SHOWN]:
                say(f"  {difference}")
            status = 1
    return status
