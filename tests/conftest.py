"""What several tests use."""

import itertools
import json
import os
import re
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import redis
import xxhash

from indexer import (
    BlockRemoved,
    BlockStored,
    Index,
    InvalidQuestion,
    Limits,
    RedisIndex,
    Source,
    implementation,
    keys,
    open_index,
    prompt,
)
from indexer.redis.cluster import ClusterStore

from .redis_cluster import RedisCluster
from .redis_server import BINARY, RedisServer, somewhere

GOLDEN = sorted((Path(__file__).parent / "data" / "golden").glob("*.jsonl"))
MODEL = "test/model"
POD = Source("pod-a")


def until(true, seconds=30.0):
    """Wait until something is true; give what it said."""
    deadline = time.monotonic() + seconds
    while not (answer := true()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)
    return answer


class Followed:
    """In the place of a pool: keeps what is wanted, and every change of it."""

    def __init__(self):
        self.pods = {}
        self.log = []
        self.refuse = {}

    def update(self, wanted):
        for name in self.pods.keys() - wanted.keys():
            self.log.append((name, f"-{self.pods[name].uid}"))
        for name, found in wanted.items():
            if self.pods.get(name) != found:
                self.log.append((name, f"+{found.uid}"))
        self.pods = dict(wanted)
        return {name: error for name, error in self.refuse.items() if name in wanted}

    def changes(self, name):
        return [change for pod, change in self.log if pod == name]


def read_capture(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stored(hashes, tokens, *, parent=None, size=4, **more) -> BlockStored:
    return BlockStored(
        block_hashes=list(hashes), parent_block_hash=parent, token_ids=array("I", tokens), block_size=size, **more
    )


def removed(*hashes, **more) -> BlockRemoved:
    return BlockRemoved(block_hashes=list(hashes), **more)


def payload(*events, rank: int | None = 0) -> bytes:
    return msgspec.msgpack.encode([1.0, list(events), rank])


def slow_keys(tokens, model, size, lora=None, salt=None, images=(), *, bare=False) -> list[int]:
    """The definition of DESIGN section 5, word for word."""
    key = xxhash.xxh3_64_intdigest(msgspec.msgpack.encode([model, size, lora, salt]), 0)
    found = []
    for start in range(0, len(tokens) - size + 1, size):
        data = b"".join(int(t).to_bytes(4, "little") for t in tokens[start : start + size])
        inside = [n if bare else [n, f - start] for n, f, c in images if f < start + size and f + c > start]
        key = xxhash.xxh3_64_intdigest(data + (msgspec.msgpack.encode(inside) if inside else b""), key)
        found.append(key)
    return found


def hashing_of(impl: str) -> SimpleNamespace:
    """`block_keys`, `Prompt` and `token_ids_of_json` of one implementation."""
    if impl == "python":
        return SimpleNamespace(
            block_keys=keys.block_keys, Prompt=prompt.Prompt, token_ids_of_json=keys.token_ids_of_json
        )
    from indexer import _native, native

    return SimpleNamespace(
        block_keys=native.block_keys, Prompt=_native.Prompt, token_ids_of_json=native.token_ids_of_json
    )


def blocks_in(index: Index) -> int:
    """How many blocks an index keeps for anybody, after what is no longer seen is swept."""
    stats = index.stats()
    if "blocks" in stats:
        return stats["blocks"]
    while index.sweep():
        pass
    return len(block_names(index))


def names_in(index: RedisIndex) -> list[bytes]:
    """All keys that an index has in Redis."""
    pattern = index._layout.models.removesuffix(b"models") + b"*"
    if isinstance(index._store, ClusterStore):
        owners = sorted(set(index._store._topology._owners))
        return [name for node in owners for name in redis.Redis(*node, socket_timeout=20).keys(pattern)]
    return index._store.run([("KEYS", pattern)])[0]


def block_names(index: RedisIndex) -> list[bytes]:
    """The keys of all blocks that an index has in Redis."""
    start = index._layout.models.removesuffix(b"models")
    kinds = {name: name.removeprefix(start) for name in names_in(index)}
    return [name for name, kind in kinds.items() if re.fullmatch(rb"(\{[0-9a-f.]+\})?b.{8}", kind, re.DOTALL)]


def _has_core() -> bool:
    try:
        open_index("memory://?impl=native").close()
    except InvalidQuestion:
        return False
    return True


HAS_CORE = _has_core()
# skipped at the desk of somebody without Rust, never in CI: there a core that is missing has to fail
NEEDS_CORE = pytest.mark.skipif(not HAS_CORE and "CI" not in os.environ, reason="the compiled core is not built")
NEEDS_REDIS = pytest.mark.skipif(not BINARY and "CI" not in os.environ, reason="there is no redis-server")
IMPLEMENTATIONS = ["python", pytest.param("native", marks=NEEDS_CORE)]


def pytest_report_header() -> str:
    return f"memory:// is the index in {implementation}; compiled core: {'built' if HAS_CORE else 'not built'}"


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request) -> str:
    """The name of each implementation of the index."""
    return request.param


@pytest.fixture
def hashing(impl) -> SimpleNamespace:
    """`block_keys` and `Prompt` of each implementation."""
    return hashing_of(impl)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    """A Redis for all tests that leave it as it is."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory) -> Iterator[RedisCluster]:
    """A Redis Cluster for all tests; who harms it calls its `heal` afterwards."""
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session", params=["redis_server", "redis_cluster"])
def redis_place(request) -> RedisServer | RedisCluster:
    """One server, and a cluster."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def redis_url(redis_place) -> str:
    """An empty index in Redis, of each kind."""
    return somewhere(redis_place)


@pytest.fixture
def own_server(tmp_path) -> Iterator[RedisServer]:
    """A Redis that a test may harm."""
    server = RedisServer(tmp_path)
    yield server
    server.thaw()
    server.kill()


@pytest.fixture(
    scope="session",
    params=[*IMPLEMENTATIONS, *(pytest.param(name, marks=NEEDS_REDIS) for name in ("redis_server", "redis_cluster"))],
)
def open_new(request) -> Callable[..., Index]:
    """Opens an empty index of each kind; `limits` as `open_index` takes them."""
    numbers = itertools.count()

    def opened(limits: Limits | None = None) -> Index:
        if not request.param.startswith("redis"):
            return open_index(f"memory://?impl={request.param}", limits=limits)
        place = request.getfixturevalue(request.param)
        return open_index(f"{place.url}?prefix={next(numbers)}:&timeout=5", limits=limits)

    return opened


@pytest.fixture
def index(open_new) -> Iterator[Index]:
    """Every implementation of the index, empty, following one source."""
    opened = open_new()
    opened.register(POD, model=MODEL)
    yield opened
    opened.close()
