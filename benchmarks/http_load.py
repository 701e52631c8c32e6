"""Measure the HTTP service under load, service and load on the same machine.

    python benchmarks/http_load.py --rounds 3 --seconds 3

A service follows 64 pods that go on publishing while it is asked. Each round asks `/healthz` and `/v1/score` in turn:
as fast as a few connections can, and then each at half of that with arrivals at even distances, timed from the moment
at which a request was due. What the service itself took is what `Server-Timing` says.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection

import uvloop

from kvevents.testing import Publisher, removed, stored
from kvindex.bench.machine import machine, percentile
from kvindex.bench.report import number

MODEL = "bench/model"
SIZE = 16
HOLDERS = 8
PROMPTS = 64
STAGES = re.compile(rb"dur=([0-9.]+)")


def fleet(pods: int, tokens: int, rate: float, pipe: Connection) -> None:
    """Publish what `pods` hold of the prompts, and then stores and removals, `rate` events a second in all."""
    rng = random.Random(0)
    publishers = [Publisher("tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0") for _ in range(pods)]
    with contextlib.ExitStack() as closing:
        for publisher in publishers:
            closing.enter_context(publisher)
        pipe.send([(publisher.endpoint, publisher.replay) for publisher in publishers])
        prompts = pipe.recv()
        blocks = tokens // SIZE
        for prompt_number, prompt in enumerate(prompts):
            names = [prompt_number * blocks + block + 1 for block in range(blocks)]
            for pod in rng.sample(range(pods), HOLDERS):
                held = rng.randint(blocks // 2, blocks)
                publishers[pod].publish([stored("vllm-map", names[:held], None, prompt[: held * SIZE], SIZE)])
        pipe.send("stored")
        name, live = 10_000_000, deque()
        due = time.perf_counter()
        while not pipe.poll():
            pod = rng.randrange(pods)
            names = list(range(name, name + 8))
            name += 8
            batch = [stored("vllm-map", names, None, [rng.randrange(128_000) for _ in range(8 * SIZE)], SIZE)]
            live.append((pod, names))
            publishers[pod].publish(batch)
            if len(live) > 4_000:
                old, names = live.popleft()
                publishers[old].publish([removed("vllm-map", names)])
            due += 2 / rate
            time.sleep(max(0.0, due - time.perf_counter()))


class Client(asyncio.Protocol):
    """One kept connection."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[bytes]] = deque()
        self._read = b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future:
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._transport.write(request)
        return answer

    def data_received(self, data: bytes) -> None:
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            head = self._read[:end].lower()
            length = int(re.search(rb"content-length: (\d+)", head)[1])
            if len(self._read) < end + 4 + length:
                return
            assert head.startswith(b"http/1.1 200"), self._read[:500]
            self._read = self._read[end + 4 + length :]
            self._waiting.popleft().set_result(head)


def requests_of(route: str, bodies: list[bytes]) -> list[bytes]:
    if route == "/healthz":
        return [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"]
    return [
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % (route.encode(), len(body))
        + body
        for body in bodies
    ]


async def at_once(port: int, requests: list[bytes], seconds: float, connections: int) -> tuple[float, list[float]]:
    """Ask as fast as it goes; give answers a second, and what the service says each took."""
    loop = asyncio.get_running_loop()
    inside: list[float] = []
    count = 0
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        nonlocal count
        _, client = await loop.create_connection(Client, "127.0.0.1", port)
        while time.perf_counter() < end:
            number += 1
            head = await client.ask(requests[number % len(requests)])
            count += 1
            inside.append(sum(map(float, STAGES.findall(head))) * 1e-3)

    begun = time.perf_counter()
    await asyncio.gather(*(one(number * 7) for number in range(connections)))
    return count / (time.perf_counter() - begun), inside


async def evenly(port: int, requests: list[bytes], seconds: float, rate: float) -> list[float]:
    """Ask `rate` times a second; give the seconds from when each was due until its answer was there."""
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(16)]
    times: list[float] = []
    waiting = []
    begun = time.perf_counter() + 0.05
    for count in range(int(seconds * rate)):
        due = begun + count / rate
        if (left := due - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        answer = clients[count % 16].ask(requests[count % len(requests)])
        answer.add_done_callback(lambda _, due=due: times.append(time.perf_counter() - due))
        waiting.append(answer)
    await asyncio.gather(*waiting)
    return sorted(times)


@contextlib.contextmanager
def service(endpoints: list[tuple[str, str]], *, python: bool) -> Iterator[int]:
    pods = [
        {"pod": f"pod-{number}", "endpoint": endpoint, "replay": replay, "model": MODEL}
        for number, (endpoint, replay) in enumerate(endpoints)
    ]
    environ = os.environ | {"KVINDEX_PODS": json.dumps(pods), "KVINDEX_HTTP_PORT": "0", "KVINDEX_LOG_FORMAT": "json"}
    if python:
        environ["KVINDEX_IMPL"] = "python"
    command = [sys.executable, "-m", "kvindex", "serve"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if (said := json.loads(line))["event"] == "serving":
                    break
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield int(said["url"].rpartition(":")[2])
        finally:
            process.terminate()
            process.wait(30)


def held_of(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/pods") as answer:
        return sum(pod["blocks"] for pod in json.load(answer)["pods"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--pods", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--events", type=float, default=1000.0, help="events a second meanwhile")
    parser.add_argument("--holders-only", action="store_true", help="ask for pods that hold something")
    parser.add_argument("--python", action="store_true", help="the index in plain Python")
    args = parser.parse_args()
    rng = random.Random(1)
    prompts = [[rng.randrange(128_000) for _ in range(args.tokens)] for _ in range(PROMPTS)]
    more = {"holders_only": True} if args.holders_only else {}
    questions = [{"model": MODEL, "token_ids": prompt, **more} for prompt in prompts]
    bodies = [json.dumps(question, separators=(",", ":")).encode() for question in questions]
    here, there = get_context("spawn").Pipe()
    publishing = get_context("spawn").Process(target=fleet, args=(args.pods, args.tokens, args.events, there))
    publishing.start()
    rates: dict[str, list[float]] = {"/healthz": [], "/v1/score": []}
    late: dict[str, list[list[float]]] = {route: [] for route in rates}
    inside: list[float] = []
    try:
        with service(here.recv(), python=args.python) as port:
            here.send(prompts)
            assert here.recv() == "stored"
            wanted = PROMPTS * HOLDERS * (args.tokens // SIZE) // 2
            while held_of(port) < wanted:
                time.sleep(0.05)
            gc.disable()
            for number_of_round in range(args.rounds):
                print(f"round {number_of_round + 1} of {args.rounds}", file=sys.stderr)
                for route, measured in rates.items():
                    asked = requests_of(route, bodies)
                    rate, took = uvloop.run(at_once(port, asked, args.seconds, args.connections))
                    measured.append(rate)
                    late[route].append(uvloop.run(evenly(port, asked, args.seconds, rate / 2)))
                    if route == "/v1/score":
                        inside += took
            half = statistics.median(rates["/v1/score"]) / 2
    finally:
        here.send("end")
        publishing.join(30)
        publishing.kill()
    print(machine())
    print(f"{args.pods} pods, {args.tokens} tokens, {args.events:,.0f} events/s; medians of {args.rounds} rounds")
    for route, measured in rates.items():
        p50, p99 = (
            statistics.median(percentile(times, percent) for times in late[route]) * 1e3 for percent in (50, 99)
        )
        least, most = number(min(measured)), number(max(measured))
        print(
            f"{route:10} {number(statistics.median(measured))} requests/s ({least} to {most}); "
            f"at half of that p50 {p50:.2f} ms, p99 {p99:.2f} ms"
        )
    whole, scoring = 1e6 / (2 * half), statistics.mean(inside) * 1e6
    print(f"of {whole:.0f} us for a score {scoring:.0f} are scoring (Server-Timing), {whole - scoring:.0f} HTTP")


if __name__ == "__main__":
    main()
