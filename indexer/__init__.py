"""Which source holds which blocks of the KV cache: sources, block keys, ledgers and the index."""

from importlib import import_module
from typing import TYPE_CHECKING

from indexer import snapshots
from indexer._impl import Prompt, block_keys, implementation, token_ids_of_json
from indexer.base import (
    UNREACHABLE,
    Copies,
    Decoded,
    Holding,
    Index,
    Limits,
    Run,
    Source,
    SourceStatus,
    Undecodable,
    tier_of,
)
from indexer.errors import IndexerError, IndexUnavailable, InvalidQuestion, LimitReached
from indexer.events import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, Event, Events
from indexer.keys import ImageItem, TokenIds
from indexer.memory import MemoryIndex
from indexer.opening import open_index

if TYPE_CHECKING:
    from indexer.redis.index import RedisIndex
    from indexer.redis.leases import Leases
    from indexer.redis.reader import AsyncRedisReader

__all__ = [
    "UNREACHABLE",
    "AllBlocksCleared",
    "AsyncRedisReader",
    "BlockRemoved",
    "BlockStored",
    "Copies",
    "Decoded",
    "EngineHash",
    "Event",
    "Events",
    "Holding",
    "ImageItem",
    "Index",
    "IndexUnavailable",
    "IndexerError",
    "InvalidQuestion",
    "Leases",
    "LimitReached",
    "Limits",
    "MemoryIndex",
    "Prompt",
    "RedisIndex",
    "Run",
    "Source",
    "SourceStatus",
    "TokenIds",
    "Undecodable",
    "block_keys",
    "implementation",
    "open_index",
    "snapshots",
    "tier_of",
    "token_ids_of_json",
]


_LAZY = {"AsyncRedisReader": "redis.reader", "Leases": "redis.leases", "RedisIndex": "redis.index"}


def __getattr__(name: str) -> object:
    """Load what needs the Redis client when it is asked for: that takes longer than all the rest."""
    if name in _LAZY:
        return getattr(import_module(f"indexer.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
