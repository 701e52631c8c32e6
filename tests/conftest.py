"""What several tests use."""

import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import xxhash

from indexer import (
    BlockRemoved,
    BlockStored,
    Index,
    InvalidQuestion,
    Limits,
    Source,
    implementation,
    keys,
    open_index,
    prompt,
)

from .redis_cluster import RedisCluster
from .redis_server import BINARY, RedisServer

GOLDEN = sorted((Path(__file__).parent / "data" / "golden").glob("*.jsonl"))
MODEL = "test/model"
POD = Source("pod-a")


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
    """`block_keys` and `Prompt` of one implementation."""
    if impl == "python":
        return SimpleNamespace(block_keys=keys.block_keys, Prompt=prompt.Prompt)
    from indexer import _native, native

    return SimpleNamespace(block_keys=native.block_keys, Prompt=_native.Prompt)


def blocks_in(index: Index) -> int:
    """How many blocks an index keeps for anybody, after what is no longer seen is swept."""
    stats = index.stats()
    if "blocks" in stats:
        return stats["blocks"]
    while index.sweep():
        pass
    return len(index._store.run([("KEYS", index._layout._block + b"*")])[0])


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


@pytest.fixture(scope="session", params=[*IMPLEMENTATIONS, pytest.param("redis", marks=NEEDS_REDIS)])
def open_new(request) -> Callable[..., Index]:
    """Opens an empty index of each kind; `limits` as `open_index` takes them."""
    numbers = itertools.count()

    def opened(limits: Limits | None = None) -> Index:
        if request.param != "redis":
            return open_index(f"memory://?impl={request.param}", limits=limits)
        server = request.getfixturevalue("redis_server")
        return open_index(f"{server.url}?prefix={next(numbers)}:", limits=limits)

    return opened


@pytest.fixture
def index(open_new) -> Iterator[Index]:
    """Every implementation of the index, empty, following one source."""
    opened = open_new()
    opened.register(POD, model=MODEL)
    yield opened
    opened.close()
