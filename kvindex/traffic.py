"""The traffic that keeps a fleet of simulated engines busy: the program behind `kvindex fleet`.

It can also ask running services about prompts and compare every answer with what the engines themselves hold.
"""

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from kvevents.testing import DIALECTS, Dialect, Publisher
from kvindex.comparing import Checker
from kvindex.errors import UserError
from kvindex.fleet import Fleet, Pod
from kvindex.signals import stopped_by_signals
from kvindex.workload import Workload

_LINGER_S = 0.02
_ASK_EVERY_S = 0.5
_REMEMBERED_HOMES = 2_000
_DIFFERENCES_SHOWN = 10


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
