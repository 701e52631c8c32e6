"""Ways to keep the holders of blocks in Redis: `python benchmarks/redis_layouts.py [--blocks N] [--rounds N]`.

Starts a redis-server of its own (from PATH, nothing on disk) on a free port of the loopback and ends it. For fleets of
64 and of 1,000 pods, each run of 32 blocks on 8 pods drawn by lot, it prints a table with a line for each layout:

- bits: a string for each block in which bit `slot` is set, read by MGET;
- set: a set of slots, which Redis keeps as an intset, read by SMEMBERS in one pipeline;
- hash: a hash with a short field for each slot, read by HKEYS in one pipeline;
- packed: a string of sorted slots of 3 bytes, changed by a script, read by MGET;
- json: a hash under `<model>@<key>`, fields are JSON of pod and tier, values are timestamps, read by HKEYS;
- llm-d: what llm-d-router stores in 2026: a hash under the decimal key, fields are JSON of all it knows of a pod.

Columns: growth of used_memory for each (block, pod); pairs written in a second by one client, in pipelines of 512
commands; 50th percentile of reading 2,048 blocks that are there, in one round trip; the same where only the first 4 are
there, asking for 128 blocks first (json and llm-d always ask for all); pairs released in a second, one of each block,
by commands that remove the key with its last holder. Reading ends with an int of bits or a set of slots for each block;
json and llm-d look the field up instead of decoding it, which llm-d does. Rates of writing are mostly the client's.

The last table is for the ledger of a source, 100,000 engine hashes of 8 bytes with a block key of 8 bytes each: a hash
in 512 buckets, each kept as a listpack; a string to which each record of 32 blocks is appended; the same after a SET of
what it holds. Reading ends with a dict.

The layouts take turns, round by round: median of the rounds (lowest to highest).
"""

import argparse
import json
import platform
import random
import shutil
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeAlias

from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from report import Figures, Row, aligned, note

from kvindex.bench.machine import each, machine, percentile, version_of
from kvindex.bench.report import number
from kvindex.bench.workload import CHAIN, STORE

FLEETS, SHARE, FIRST, SHORT = (64, 1_000), 8, 128, 4
PIPELINE, PROMPTS, CHECKED = 512, 20, 256
ENTRIES, BUCKETS = 100_000, 512
PREFIX = b"kvi:"

MEMORY, WRITTEN = Row("memory", "bytes/pair"), Row("written", "pairs/s", more=True)
FULL, EARLY = Row(f"{CHAIN:,} blocks", "ms p50"), Row(f"{SHORT} of {CHAIN:,}", "ms p50")
RELEASED = Row("released", "pairs/s", more=True)
ENTRY, ENTERED, READ = Row("memory", "bytes/entry"), Row("written", "entries/s", more=True), Row("read", "ms")

Command: TypeAlias = tuple[str | bytes | int, ...]

RELEASE_BIT = """
redis.call('SETBIT', KEYS[1], ARGV[1], 0)
if redis.call('BITCOUNT', KEYS[1]) == 0 then redis.call('DEL', KEYS[1]) end
"""

CHANGE_PACKED = """
local held, slot, add = redis.call('GET', KEYS[1]) or '', tonumber(ARGV[1]), ARGV[2] == '1'
local at, there = 1, false
while at <= #held do
  local high, middle, low = held:byte(at, at + 2)
  local other = high * 65536 + middle * 256 + low
  if other >= slot then there = other == slot; break end
  at = at + 3
end
if there == add then return 0 end
local before, after = held:sub(1, at - 1), held:sub(there and at + 3 or at)
if add then
  local packed = string.char(math.floor(slot / 65536), math.floor(slot / 256) % 256, slot % 256)
  redis.call('SET', KEYS[1], before .. packed .. after)
elseif #before + #after == 0 then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], before .. after)
end
return 1
"""


class Fleet(NamedTuple):
    """Block keys, the slots that hold each, and (block, slot) in the order of writing."""

    blocks: list[int]
    holders: list[tuple[int, ...]]
    pairs: list[tuple[int, int]]


class Layout:
    """How the holders of blocks are stored: the commands that change a block, and reading many."""

    name: str
    first = FIRST

    def __init__(self, client: Redis) -> None:
        self._client = client

    def key(self, block: int) -> bytes:
        return PREFIX + block.to_bytes(8, "big")

    def add(self, key: bytes, slot: int) -> Command:
        raise NotImplementedError

    def release(self, key: bytes, slot: int) -> Command:
        raise NotImplementedError

    def holders(self, keys: Sequence[bytes]) -> Sequence[int | set[int]]:
        """Give the holders of each block, read in one round trip."""
        raise NotImplementedError

    def match(self, keys: Sequence[bytes]) -> Sequence[int | set[int]]:
        """Give the holders of each block, where the rest is not asked for if one of the first has none."""
        found = self.holders(keys[: self.first])
        return [*found, *self.holders(keys[self.first :])] if self.first < len(keys) and all(found) else found

    def _pipelined(self, command: str, keys: Sequence[bytes]) -> list[Iterable[bytes]]:
        pipe = self._client.pipeline(transaction=False)
        for key in keys:
            pipe.execute_command(command, key)
        return pipe.execute()


class Bits(Layout):
    name = "bits"

    def __init__(self, client: Redis) -> None:
        super().__init__(client)
        self._release = client.script_load(RELEASE_BIT)

    # Redis counts the bits of a byte from the highest: with `^ 7`, bit n of the little-endian int is slot n.
    def add(self, key: bytes, slot: int) -> Command:
        return "SETBIT", key, slot ^ 7, 1

    def release(self, key: bytes, slot: int) -> Command:
        return "EVALSHA", self._release, 1, key, slot ^ 7

    def holders(self, keys: Sequence[bytes]) -> Sequence[int]:
        return [int.from_bytes(value or b"", "little") for value in self._client.mget(keys)]


class IntSet(Layout):
    name = "set"

    def add(self, key: bytes, slot: int) -> Command:
        return "SADD", key, slot

    def release(self, key: bytes, slot: int) -> Command:
        return "SREM", key, slot

    def holders(self, keys: Sequence[bytes]) -> Sequence[set[int]]:
        return [set(map(int, members)) for members in self._pipelined("SMEMBERS", keys)]


class ShortHash(Layout):
    name = "hash"

    def add(self, key: bytes, slot: int) -> Command:
        return "HSET", key, slot, 1

    def release(self, key: bytes, slot: int) -> Command:
        return "HDEL", key, slot

    def holders(self, keys: Sequence[bytes]) -> Sequence[set[int]]:
        return [set(map(int, fields)) for fields in self._pipelined("HKEYS", keys)]


class Packed(Layout):
    name = "packed"

    def __init__(self, client: Redis) -> None:
        super().__init__(client)
        self._change = client.script_load(CHANGE_PACKED)

    def add(self, key: bytes, slot: int) -> Command:
        return "EVALSHA", self._change, 1, key, slot, 1

    def release(self, key: bytes, slot: int) -> Command:
        return "EVALSHA", self._change, 1, key, slot, 0

    def holders(self, keys: Sequence[bytes]) -> Sequence[set[int]]:
        return [
            {
                high << 16 | middle << 8 | low
                for high, middle, low in zip(value[::3], value[1::3], value[2::3], strict=True)
            }
            for value in (value or b"" for value in self._client.mget(keys))
        ]


class Json(Layout):
    name = "json"
    first = CHAIN
    entry: dict[str, object] = {"DeviceTier": "gpu"}
    value = "2026-01-31T12:00:00.123456789Z"

    def __init__(self, client: Redis) -> None:
        super().__init__(client)
        pods = [f"10.0.{slot // 250}.{slot % 250}:8000" for slot in range(max(FLEETS))]
        entries = [{"PodIdentifier": pod, **self.entry} for pod in pods]
        self._fields = [json.dumps(entry, separators=(",", ":")).encode() for entry in entries]
        self._slots = {field: slot for slot, field in enumerate(self._fields)}

    def key(self, block: int) -> bytes:
        return b"llama-8b@%d" % block

    def add(self, key: bytes, slot: int) -> Command:
        return "HSET", key, self._fields[slot], self.value

    def release(self, key: bytes, slot: int) -> Command:
        return "HDEL", key, self._fields[slot]

    def holders(self, keys: Sequence[bytes]) -> Sequence[set[int]]:
        return [{self._slots[field] for field in fields} for fields in self._pipelined("HKEYS", keys)]


class LlmD(Json):
    name = "llm-d"
    entry = {"DeviceTier": "gpu", "Speculative": False, "HasGroup": False, "GroupIdx": 0}
    value = ""

    def key(self, block: int) -> bytes:
        return b"%d" % block


LAYOUTS = (Bits, IntSet, ShortHash, Packed, Json, LlmD)


def make_fleet(pods: int, blocks: int, rng: random.Random) -> Fleet:
    drawn = [tuple(rng.sample(range(pods), SHARE)) for _ in range(blocks // STORE)]
    stores = [(run, slot) for run, slots in enumerate(drawn) for slot in slots]
    rng.shuffle(stores)
    pairs = [(run * STORE + block, slot) for run, slot in stores for block in range(STORE)]
    holders = [slots for slots in drawn for _ in range(STORE)]
    return Fleet([rng.getrandbits(64) for _ in holders], holders, pairs)


@contextmanager
def server() -> Iterator[Redis]:
    """Start a redis-server and end it."""
    if not (program := shutil.which("redis-server")):
        raise SystemExit("redis-server is not on PATH: install it (apt install redis-server)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    with TemporaryDirectory() as directory:
        process = subprocess.Popen([program, *options, "--dir", directory], stdout=subprocess.DEVNULL)
        try:
            client = Redis("127.0.0.1", port, retry=Retry(ConstantBackoff(0.05), 100))
            assert client.info("server")["process_id"] == process.pid
            yield client
        finally:
            process.terminate()
            process.wait()


def send(client: Redis, commands: Iterable[Command]) -> float:
    """Send commands in pipelines and give the seconds that it took."""
    start = time.perf_counter()
    pipe = client.pipeline(transaction=False)
    for count, command in enumerate(commands, 1):
        pipe.execute_command(*command)
        if count % PIPELINE == 0:
            pipe.execute()
    pipe.execute()
    return time.perf_counter() - start


def used_bytes(client: Redis) -> int:
    """Give what the server uses, without the buffers of the connection that did the work."""
    client.connection_pool.disconnect()
    time.sleep(0.1)
    return client.info("memory")["used_memory"]


def slots_of(holders: int | set[int]) -> set[int]:
    return (
        {slot for slot in range(holders.bit_length()) if holders >> slot & 1} if isinstance(holders, int) else holders
    )


def check(client: Redis, layout: Layout, fleet: Fleet) -> None:
    """See that what is added is read, that an unknown block is empty, and that nothing stays of what is released."""
    client.flushall()
    keys = [layout.key(block) for block in fleet.blocks[:CHECKED]]
    pairs = [(keys[block], slot) for block, slot in fleet.pairs if block < CHECKED]
    for _ in range(2):
        send(client, (layout.add(*pair) for pair in pairs))
    found = layout.holders([*keys, layout.key(0)])
    assert list(map(slots_of, found)) == [*map(set, fleet.holders[:CHECKED]), set()], layout.name
    send(client, (layout.release(*pair) for pair in pairs[1:]))
    assert client.dbsize() == 1, layout.name
    send(client, [layout.release(*pairs[0])])
    assert client.dbsize() == 0, layout.name


def measure(client: Redis, layout: Layout, fleet: Fleet, rng: random.Random, figures: Figures) -> None:
    """Fill the server once, ask and release."""
    client.flushall()
    before = used_bytes(client)
    keys = [layout.key(block) for block in fleet.blocks]
    seconds = send(client, (layout.add(keys[block], slot) for block, slot in fleet.pairs))
    note(figures, MEMORY, layout.name, (used_bytes(client) - before) / len(fleet.pairs))
    note(figures, WRITTEN, layout.name, len(fleet.pairs) / seconds)

    firsts = [rng.randint(0, len(keys) - CHAIN) for _ in range(PROMPTS)]
    prompts = [keys[first : first + CHAIN] for first in firsts]
    assert all(len(slots_of(holders)) == SHARE for holders in layout.holders(prompts[0]))
    strange = [[layout.key(rng.getrandbits(64)) for _ in range(CHAIN - SHORT)] for _ in prompts]
    shorts = [prompt[:SHORT] + rest for prompt, rest in zip(prompts, strange, strict=True)]
    note(figures, FULL, layout.name, percentile(sorted(each(layout.holders, prompts)), 50) * 1e3)
    note(figures, EARLY, layout.name, percentile(sorted(each(layout.match, shorts)), 50) * 1e3)

    held = zip(keys, fleet.holders, strict=True)
    seconds = send(client, [layout.release(key, rng.choice(slots)) for key, slots in held])
    note(figures, RELEASED, layout.name, len(keys) / seconds)


def measure_ledger(client: Redis, entries: dict[bytes, bytes], figures: Figures) -> None:
    """Write the ledger of a source in each form and read it back."""
    buckets = [PREFIX + b"%d" % count for count in range(BUCKETS)]

    def written(name: str, commands: Iterable[Command], key: bytes | None = None) -> None:
        before = used_bytes(client)
        seconds = send(client, commands)
        note(figures, ENTRY, name, (used_bytes(client) - before) / len(entries))
        note(figures, ENTERED, name, len(entries) / seconds)
        start = time.perf_counter()
        found = dict(struct.iter_unpack("8s8s", client.get(key))) if key else read_buckets()
        note(figures, READ, name, (time.perf_counter() - start) * 1e3)
        assert found == entries, name

    def bucket(engine_hash: bytes) -> bytes:
        return buckets[int.from_bytes(engine_hash, "big") % BUCKETS]

    def read_buckets() -> dict[bytes, bytes]:
        pipe = client.pipeline(transaction=False)
        for key in buckets:
            pipe.hgetall(key)
        found: dict[bytes, bytes] = {}
        for fields in pipe.execute():
            found |= fields
        return found

    client.flushall()
    written(f"hash in {BUCKETS} buckets", (("HSET", bucket(name), name, key) for name, key in entries.items()))
    assert {client.object("encoding", key) for key in buckets} == {b"listpack"}
    client.flushall()
    blocks = [name + key for name, key in entries.items()]
    records = (b"".join(blocks[first : first + STORE]) for first in range(0, len(blocks), STORE))
    written("log", (("APPEND", PREFIX, record) for record in records), PREFIX)
    log = client.get(PREFIX)
    client.flushall()
    written("log, rewritten", [("SET", PREFIX, log)], PREFIX)


def table(figures: Figures) -> str:
    """Give a line for each contender and a column for each row of the figures."""
    lines = [["", *(f"{row.what}, {row.unit}" for row in figures)]]
    for name in next(iter(figures.values())):
        cells = []
        for values in figures.values():
            middle, low, high = (number(of(values[name])) for of in (statistics.median, min, max))
            cells.append(middle if low == high else f"{middle} ({low} to {high})")
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(aligned, line, widths)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.blocks < CHAIN or options.rounds < 1:
        parser.error(f"--blocks: at least {CHAIN:,}; --rounds: at least 1")

    rng = random.Random(1)
    with server() as client:
        versions = f"redis-py {version_of('redis')}, hiredis {version_of('hiredis')}"
        redis = client.info("server")["redis_version"]
        print(f"{machine()}, python {platform.python_version()}, redis-server {redis}, {versions}")
        for pods in FLEETS:
            fleet = make_fleet(pods, options.blocks, rng)
            figures: Figures = {}
            layouts = [layout(client) for layout in LAYOUTS]
            for layout in layouts:
                check(client, layout, fleet)
            for turn in range(options.rounds):
                for layout in layouts[:: -1 if turn % 2 else 1]:
                    measure(client, layout, fleet, rng, figures)
            print(f"\n{pods:,} pods, {len(fleet.blocks):,} blocks on {SHARE} each, {options.rounds} rounds\n")
            print(table(figures), flush=True)

        entries = {rng.randbytes(8): rng.randbytes(8) for _ in range(ENTRIES)}
        figures = {}
        for _ in range(options.rounds):
            measure_ledger(client, entries, figures)
        print(f"\nledger of {len(entries):,} entries, {options.rounds} rounds\n\n{table(figures)}")


if __name__ == "__main__":
    main()
