"""How soon a service is right again after SIGKILL: `python benchmarks/restart.py [--plot FILE]`.

Simulated pods serve conversations at a steady rate, each pod saying what it does through its own sockets. A service
follows them and is asked all the time about prompts of lately. What it says of a pod is right when it is what the pod's
engine held just before or just after; what is wrong is asked once more 50 ms later, as events need a moment. Each
engine can say its last batches again, far fewer than it takes to know its cache. After some seconds the service
is killed with SIGKILL and started again at once: with the file that it wrote every few seconds, with a peer that
follows the same pods, and with neither. No pod announces anything again.

The table has the time from the kill until the service answered, until it was ready, and until no answer was wrong any
more for two seconds; and the share of right answers (each about one pod) in its first and last five seconds.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec

from kvindex.bench.machine import machine
from kvindex.fleet import Fleet
from kvindex.workload import Workload

WARM, BEFORE_S, AFTER_S = 3_000, 8.0, 40.0
SETTLED_S = 2.0


class Asked(NamedTuple):
    """One question."""

    at: float
    """Seconds after the kill."""
    right: float | None
    """The share of pods of which the answer was right; None where there was none."""


class Traffic(threading.Thread):
    """Requests on the pods at a steady rate; `lock` holds them still while their caches are looked at."""

    def __init__(self, fleet: Fleet, rate: float) -> None:
        super().__init__(daemon=True)
        self.fleet, self.workload, self.rate = fleet, Workload(1, conversations=16 * len(fleet.pods)), rate
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def step(self) -> None:
        turn = next(self.workload)
        self.fleet.step(turn.conversation % len(self.fleet.pods), turn.prompt, turn.output)

    def run(self) -> None:
        due = time.monotonic()
        while not self.stopped.wait(max(0.0, due - time.monotonic())):
            with self.lock:
                self.step()
            due += random.expovariate(self.rate)

    def held(self, prompt: list[int]) -> list[int]:
        with self.lock:
            return [pod.engine.hit_blocks(prompt) for pod in self.fleet.pods]

    def prompt(self) -> list[int]:
        with self.lock:
            return self.workload.sample(1)[0]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def serving(fleet: Fleet, port: int, log: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("KVINDEX_")}
    environ |= {f"KVINDEX_{key.upper()}": value for key, value in settings.items()}
    environ["KVINDEX_PODS"] = msgspec.json.encode(fleet.endpoints()).decode()
    command = [sys.executable, "-m", "kvindex", "serve", "--port", str(port)]
    with log.open("ab") as stderr, subprocess.Popen(command, env=environ, stderr=stderr) as process:
        try:
            yield process
        finally:
            process.kill()


def is_ready(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/readyz").status_code == httpx.codes.OK
    return False


def wait_until_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while not is_ready(client):
        if time.monotonic() > deadline:
            raise SystemExit("the service did not become ready within 60 s")
        time.sleep(0.02)


def ask(client: httpx.Client, traffic: Traffic, start: float) -> Asked:
    prompt = traffic.prompt()
    at = time.monotonic() - start
    right = compare(client, traffic, prompt)
    if right is not None and right < 1:
        time.sleep(0.05)
        right = compare(client, traffic, prompt)
    return Asked(at, right)


def compare(client: httpx.Client, traffic: Traffic, prompt: list[int]) -> float | None:
    before = traffic.held(prompt)
    try:
        answer = client.post("/v1/score", json={"model": traffic.fleet.model, "token_ids": prompt}).json()
    except httpx.TransportError:
        return None
    said = {match["pod"]: match["blocks"] for match in answer["matches"]}
    after = traffic.held(prompt)
    pods = zip(traffic.fleet.pods, before, after, strict=True)
    return sum(said.get(pod.name, 0) in (one, other) for pod, one, other in pods) / len(before)


def run(way: str, pods: int, rate: float, ring: int) -> tuple[list[Asked], float]:
    """Give all questions, and when the service was ready after the kill."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleet = stack.enter_context(Fleet(pods, num_blocks=4_096))
        port, peer = free_port(), free_port()
        settings = {
            "file": {"snapshot_path": str(folder / "snapshot"), "snapshot_interval_s": "5"},
            "peer": {"snapshot_peers": f'["http://127.0.0.1:{peer}"]'},
            "cold": {},
        }[way]
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30))
        first = stack.enter_context(serving(fleet, port, folder / "log", **settings))
        if way == "peer":
            stack.enter_context(serving(fleet, peer, folder / "log"))
            other = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{peer}", trust_env=False))
            wait_until_ready(other)
        wait_until_ready(client)
        for pod in fleet.pods:
            pod.publisher.buffer_steps = ring
        traffic = Traffic(fleet, rate)
        for _ in range(WARM):
            traffic.step()
        traffic.start()
        asked: list[Asked] = []
        kill_at = time.monotonic() + BEFORE_S
        while time.monotonic() < kill_at:
            asked.append(ask(client, traffic, kill_at))
        first.send_signal(signal.SIGKILL)
        first.wait()
        kill_at = time.monotonic()
        stack.enter_context(serving(fleet, port, folder / "log", **settings))
        ready_at = 0.0
        while time.monotonic() < kill_at + AFTER_S:
            asked.append(ask(client, traffic, kill_at))
            if not ready_at and is_ready(client):
                ready_at = time.monotonic() - kill_at
            if asked[-1].right is None:
                time.sleep(0.02)
        traffic.stopped.set()
        traffic.join()
        return asked, ready_at


def row(way: str, asked: list[Asked], ready_at: float) -> list[str]:
    answered = [one for one in asked if one.at >= 0 and one.right is not None]
    wrong = [one.at for one in answered if one.right != 1]
    exact_at = max([answered[0].at, *(at for at in wrong if at < AFTER_S - SETTLED_S)])
    first = [one.right or 0.0 for one in answered if one.at < answered[0].at + 5]
    last = [one.right or 0.0 for one in answered if one.at > AFTER_S - 5]
    never = any(at >= AFTER_S - SETTLED_S for at in wrong)
    shares = [f"{sum(some) / len(some):.1%}" for some in (first, last)]
    return [way, f"{answered[0].at:.2f}", f"{ready_at:.2f}", "never" if never else f"{exact_at:.2f}", *shares]


def plot(path: Path, ways: dict[str, list[Asked]]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    for way, asked in ways.items():
        times = [n / 2 for n in range(-2 * int(BEFORE_S), 2 * int(AFTER_S))]
        shares = []
        for at in times:
            some = [one.right or 0.0 for one in asked if at <= one.at < at + 0.5]
            shares.append(100 * sum(some) / len(some) if some else float("nan"))
        axes.plot([at + 0.25 for at in times], shares, label=way, drawstyle="steps-mid")
    axes.axvline(0, color="grey", linewidth=1, linestyle=":")
    axes.set(xlabel="seconds after SIGKILL", ylabel="right answers, %", ylim=(-3, 103))
    axes.legend(title="started again with", loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", type=int, default=8)
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second on all pods together")
    parser.add_argument("--ring", type=int, default=400, help="batches that an engine can say again")
    parser.add_argument("--plot", type=Path, help="write the shares over time to this picture (.svg, .png)")
    options = parser.parse_args()
    print(machine())
    names = {"file": "a file", "peer": "a peer", "cold": "neither"}
    ways: dict[str, list[Asked]] = {}
    heads = ["started with", "answers after s", "ready after s", "all right after s", "right in 5 s", "in the last 5 s"]
    rows = [heads]
    for way, name in names.items():
        asked, ready_at = run(way, options.pods, options.rate, options.ring)
        ways[name] = asked
        rows.append(row(name, asked, ready_at))
    for number, cells in enumerate(rows):
        print("|", " | ".join(cells), "|")
        if not number:
            print("|" + "---|" * len(cells))
    if options.plot:
        plot(options.plot, ways)


if __name__ == "__main__":
    main()
