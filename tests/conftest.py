"""What several tests use."""

import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from indexer import BlockRemoved, BlockStored, Index, InvalidQuestion, Source, implementation, open_index

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


def _has_core() -> bool:
    try:
        open_index("memory://?impl=native").close()
    except InvalidQuestion:
        return False
    return True


HAS_CORE = _has_core()
# skipped at the desk of somebody without Rust, never in CI: there a core that is missing has to fail
NEEDS_CORE = pytest.mark.skipif(not HAS_CORE and "CI" not in os.environ, reason="the compiled core is not built")
IMPLEMENTATIONS = ["python", pytest.param("native", marks=NEEDS_CORE)]


def pytest_report_header() -> str:
    return f"memory:// is the index in {implementation}; compiled core: {'built' if HAS_CORE else 'not built'}"


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request) -> str:
    """The name of each implementation of the index."""
    return request.param


@pytest.fixture
def index(impl) -> Iterator[Index]:
    """Every implementation of the index, empty, following one source."""
    opened = open_index(f"memory://?impl={impl}")
    opened.register(POD, model=MODEL)
    yield opened
    opened.close()
