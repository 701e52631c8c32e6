"""`make demo`: simulated servers, kvindex and the router as processes of this machine, and a load run over HTTP."""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from examples import load

MODEL = "demo/model"
PODS = 4
ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def stack(servers: list[str]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Start all of it; give the URLs of router, scorer and pods. It ends with the block."""
    with contextlib.ExitStack() as running:
        folder = running.enter_context(tempfile.TemporaryDirectory())
        ports = ["--port", "0", "--events-port", "0", "--model", MODEL, "--pods", str(PODS), "--save-tokenizer", folder]
        said = running.enter_context(_process(["examples.simulated_servers", *ports, *servers])).stdout
        found = json.loads(said.readline() if said else "{}")
        urls: dict[str, str] = found["urls"]
        scorer, router = _free_port(), _free_port()
        environ = {"KVINDEX_PODS": json.dumps(found["pods"]), "KVINDEX_LOG_LEVEL": "warning"}
        environ["KVINDEX_TOKENIZERS_FOLDERS"] = json.dumps([folder])  # so that it reads text as the servers do
        running.enter_context(_process(["kvindex", "serve", "--port", str(scorer)], environ))
        pods = [part for name, url in urls.items() for part in ("--pod", f"{name}={url}")]
        asked = ["--scorer", f"http://127.0.0.1:{scorer}"]
        running.enter_context(_process(["examples.router", "--port", str(router), *asked, *pods]))
        yield f"http://127.0.0.1:{router}", f"http://127.0.0.1:{scorer}", urls


@contextlib.contextmanager
def _process(module: list[str], environ: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVINDEX_")}
    command = [sys.executable, "-m", *module]
    with subprocess.Popen(command, cwd=ROOT, env=clean | (environ or {}), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def main() -> int:
    """Run it; give the exit status."""
    parser = argparse.ArgumentParser(description="Routing by the cache against round robin and random, over HTTP.")
    parser.add_argument("--rate", action="append", type=float, help="requests/s; default 12, 20 and 28")
    parser.add_argument("--requests", type=int, default=64, help="for each rate and policy")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="gets table and plot")
    options = parser.parse_args()
    speed = ["--prefill", "4000", "--decode", "0.01", "--num-blocks", "2000"]
    with stack(speed) as (router, scorer, pods):
        print(f"{PODS} simulated servers, kvindex and a router; caches are empty at the start of each line", flush=True)
        asked = [part for name, url in pods.items() for part in ("--pod", f"{name}={url}")]
        asked += [part for rate in options.rate or (12, 20, 28) for part in ("--rate", str(rate))]
        asked += ["--router", router, "--scorer", scorer, "--model", MODEL, "--folder", str(options.folder)]
        asked += ["--requests", str(options.requests), "--seed", str(options.seed)]
        return asyncio.run(load.measure(load.arguments().parse_args(asked)))


if __name__ == "__main__":
    raise SystemExit(main())
