"""The index in Redis beside llm-d's layout, on one private server: `python benchmarks/redis_index.py [--pods N]`.

64 pods, blocks of 16 tokens in chains of 2,048, each chain on 8 pods drawn by lot. The table has for each row the
median of the rounds with the lowest and highest, and how many times better this index is:

- match: a prompt of 2,048 blocks that pods hold whole, and one that leaves what is cached after 4 blocks; here tokens
  to what each pod holds, hashing included; there the keys are made beforehand;
- memory: what readers need for each (block, pod); below it, ours with the ledgers that a builder goes on from when
  another was killed;
- write: blocks stored by one builder, from events that are decoded;
- clear: until a pod of so many blocks is out of all answers.

llm-d's layout, as llm-d-router at 50cbb48 has it (`pkg/kvcache/kvblock/redis.go`), in plain commands: for each block a
hash named by the decimal number of its key, with a field for each holder, which is the JSON of the pod's entry, and
nothing in it. A prompt is one pipeline of HKEYS, whatever its length, each field decoded; a pod is cleared by reading
the fields of all keys that SCAN gives. The server is started for this and ends with it: redis-server has to be there.

While it is measured, a process of the lowest priority spins on each core, so that none of them sleeps: on a virtual
machine with nothing else to do, waking a core takes longer than all else that a short question does (a bare PING 61 us
instead of 16). `--idle` measures without.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis
from report import Figures, Row, note, note_latency, table

from indexer import block_keys
from kvindex.bench.machine import each, machine
from kvindex.bench.shared import Shared, ledger_bytes
from kvindex.bench.workload import BLOCK, CHAIN, MODEL, Fleet, make_fleet, prompts, random_tokens

SHARE, SHORT, QUESTIONS, PIPELINE = 8, 4, 60, 512
OURS, THEIRS = "kvindex", "llm-d's layout"


@contextmanager
def server() -> Iterator[int]:
    """Run a Redis of our own; give its port."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        sys.exit("redis-server is not installed: apt install redis-server, or brew install redis")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no"]
        with subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL) as process:
            try:
                client = redis.Redis(port=port)
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline:
                    try:
                        client.ping()
                        break
                    except redis.ConnectionError:
                        time.sleep(0.02)
                yield port
            finally:
                process.terminate()


class Ours(Shared):
    """A builder and a reader of this index."""

    name = OURS

    def __init__(self, port: int, pods: int) -> None:
        super().__init__(f"redis://127.0.0.1:{port}/0?timeout=30", pods)

    def question(self, tokens: object) -> object:
        return tokens

    def clear(self, pod: int) -> None:
        self.index.restart(self.sources[pod])


class Theirs:
    """llm-d's layout."""

    name = THEIRS

    def __init__(self, client: redis.Redis, pods: int) -> None:
        self._client = client
        self._fields = [
            json.dumps(
                {
                    "PodIdentifier": f"10.0.{pod >> 8}.{pod & 255}:8000",
                    "DeviceTier": "gpu",
                    "Speculative": False,
                    "HasGroup": False,
                    "GroupIdx": 0,
                },
                separators=(",", ":"),
            )
            for pod in range(pods)
        ]

    def write(self, fleet: Fleet) -> float:
        pairs = [
            (str(key), pod) for chain in fleet.chains for key in block_keys(chain.tokens, MODEL) for pod in chain.pods
        ]
        start = time.perf_counter()
        for first in range(0, len(pairs), PIPELINE):
            with self._client.pipeline(transaction=False) as pipeline:
                for key, pod in pairs[first : first + PIPELINE]:
                    pipeline.execute_command("HSET", key, self._fields[pod], "")
                pipeline.execute()
        return time.perf_counter() - start

    def question(self, tokens: object) -> list[str]:
        return [str(key) for key in block_keys(tokens, MODEL)]

    def match(self, keys: list[str]) -> dict[str, int]:
        with self._client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.execute_command("HKEYS", key)
            answers = pipeline.execute()
        held: dict[str, int] = {}
        alive: set[str] | None = None
        for number, fields in enumerate(answers, 1):
            holders = {json.loads(field)["PodIdentifier"] for field in fields}
            alive = holders if alive is None else alive & holders
            if not alive:
                break
            held.update(dict.fromkeys(alive, number))
        return held

    def clear(self, pod: int) -> None:
        wanted = self._fields[pod]
        cursor = 0
        while True:
            cursor, keys = self._client.scan(cursor, count=1000)
            with self._client.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.execute_command("HDEL", key, wanted)
                pipeline.execute()
            if cursor == 0:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300_000, help="(block, pod) in the index")
    parser.add_argument("--pods", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", action="store_true", help="let cores sleep that have nothing to do")
    options = parser.parse_args()
    with contextlib.nullcontext() if options.idle else awake():
        measure(options)


@contextmanager
def awake() -> Iterator[None]:
    """Keep all cores from sleeping."""
    spin = "import os\nos.nice(19)\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    spinning = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def measure(options: argparse.Namespace) -> None:
    fleet = make_fleet(options.pairs, pods=options.pods, share=SHARE)
    print(f"{machine()}, python {platform.python_version()}", end="")
    figures: Figures = {}
    whole = [asked for asked in prompts(fleet, CHAIN) if len(asked.tokens) == CHAIN * BLOCK]
    rng = random.Random(3)
    short = [asked.tokens[: SHORT * BLOCK] + random_tokens(rng, (CHAIN - SHORT) * BLOCK) for asked in whole]
    for number in range(options.rounds):
        with server() as port:
            client = redis.Redis(port=port)
            if not number:
                print(f", redis-server {client.info('server')['redis_version']}")
                print(f"{fleet.pairs:,} (block, pod), {options.pods} pods, {options.rounds} rounds")
            for make in (lambda: Ours(port, options.pods), lambda: Theirs(client, options.pods)):  # noqa: B023
                client.flushall()
                side = make()
                before = client.info("memory")["used_memory"]
                note(figures, Row("write", "k blocks/s", more=True), side.name, fleet.pairs / side.write(fleet) / 1e3)
                grown = client.info("memory")["used_memory"] - before
                ledgers = ledger_bytes(client, "kvindex:") if isinstance(side, Ours) else 0
                note(figures, Row("memory", "bytes/pair"), side.name, (grown - ledgers) / fleet.pairs)
                note(figures, Row("memory with ledgers", "bytes/pair"), side.name, grown / fleet.pairs)
                for what, asked in (
                    ("match 2,048 of 2,048 blocks", [asked.tokens for asked in whole]),
                    ("match 4 of 2,048 blocks", short),
                ):
                    expected = CHAIN if asked is not short else SHORT
                    for tokens, about in zip(asked, whole, strict=True):
                        held = side.match(side.question(tokens))
                        assert sorted(held.values()) == [expected] * len(about.holds), (side.name, what, held)
                    questions = [side.question(asked[number % len(asked)]) for number in range(QUESTIONS)]
                    note_latency(figures, what, side.name, each(side.match, questions))
                pod = min(whole[0].holds)
                blocks = sum(len(chain.hashes) for chain in fleet.chains if pod in chain.pods)
                (taken,) = each(side.clear, [pod])
                note(figures, Row(f"clear a pod of {blocks:,} blocks", "ms"), side.name, taken * 1e3)
                assert len(side.match(side.question(whole[0].tokens))) == SHARE - 1
    print("\n" + table(figures, [OURS, THEIRS]))


if __name__ == "__main__":
    main()
