"""How long a running service takes to answer, over HTTP and gRPC: one client, one question after the other.

`kvindex serve` follows simulated pods over real sockets; client and service share the machine. The floor of each
carrier is what it takes to say that the process is up.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any

import grpc
import httpx

from kvindex.fleet import Fleet
from kvindex.rpc.server import open_schema

OURS, HEALTH = "/kvindex.v1.ScorerService/Score", "/grpc.health.v1.Health/Check"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pods", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--questions", type=int, default=1_000, help="of each kind in each round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    command = [sys.executable, "-m", "kvindex", "serve", "--port", "0", "--grpc-port", "0"]
    with Fleet(options.pods, num_blocks=4_096) as fleet:
        environ = os.environ | {"KVINDEX_PODS": json.dumps(fleet.endpoints()), "KVINDEX_LOG_FORMAT": "json"}
        with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as serving:
            try:
                where: dict[str, Any] = {}
                while not {"serving", "serving_grpc"} <= where.keys():
                    line = json.loads(serving.stderr.readline())
                    where[line["event"]] = line
                measure(options, fleet, where["serving"]["url"], where["serving_grpc"]["address"])
            finally:
                serving.terminate()


def measure(options: argparse.Namespace, fleet: Fleet, url: str, address: str) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(100_000) for _ in range(options.tokens)] for _ in range(20)]
    client = httpx.Client(base_url=url, trust_env=False)
    while client.get("/readyz").status_code != httpx.codes.OK:
        time.sleep(0.01)
    for prompt in prompts:
        for pod in rng.sample(range(options.pods), min(8, options.pods)):
            fleet.step(pod, prompt)
    channel = grpc.insecure_channel(address)
    method = open_schema().methods["Score"]
    score, check = channel.unary_unary(OURS), channel.unary_unary(HEALTH)

    def over_http(prompt: list[int]) -> dict[str, float]:
        body = {"model": fleet.model, "token_ids": prompt}
        return client.post("/v1/score", json=body).json()["scores"]

    def over_grpc(**asked: Any) -> dict[str, float]:  # noqa: ANN401
        request = method.request(model=fleet.model, **asked).SerializeToString()
        return dict(method.response.FromString(score(request)).scores)

    ways: dict[str, Callable[[list[int]], Any]] = {
        "HTTP, floor": lambda _: client.get("/healthz"),
        "HTTP, token_ids": over_http,
        "gRPC, floor": lambda _: check(b""),
        "gRPC, token_ids": lambda prompt: over_grpc(token_ids=prompt),
        "gRPC, token_buffer": lambda prompt: over_grpc(token_buffer=array("I", prompt).tobytes()),
    }
    deadline = time.monotonic() + 30
    for prompt in prompts:  # all was heard, and all ways agree
        held = {pod.name: float(hits) for pod in fleet.pods if (hits := pod.engine.hit_blocks(prompt))}
        while not all(way(prompt) == held for name, way in ways.items() if "floor" not in name):
            assert time.monotonic() < deadline, "the answers do not become what the pods hold"
            time.sleep(0.01)
    print(f"{options.pods} pods, {options.tokens} tokens, {options.rounds} rounds of {options.questions} questions, us")
    figures = {name: ([], []) for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            took = []
            for number in range(options.questions):
                begun = time.perf_counter()
                way(prompts[number % len(prompts)])
                took.append(time.perf_counter() - begun)
            took.sort()
            figures[name][0].append(1e6 * statistics.median(took))
            figures[name][1].append(1e6 * took[int(0.99 * len(took))])
    for name, (p50, p99) in figures.items():
        print(f"{name:20} p50 {statistics.median(p50):6.0f} ({min(p50):.0f} to {max(p50):.0f})", end="  ")
        print(f"p99 {statistics.median(p99):6.0f} ({min(p99):.0f} to {max(p99):.0f})")


if __name__ == "__main__":
    main()
