"""What several tests use."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from indexer import BlockRemoved, BlockStored, Index, Source, open_index

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


@pytest.fixture(params=["memory://?impl=python", "memory://?impl=native"])
def index(request) -> Iterator[Index]:
    """Every implementation of the index, empty, following one source."""
    opened = open_index(request.param)
    opened.register(POD, model=MODEL)
    yield opened
    opened.close()
