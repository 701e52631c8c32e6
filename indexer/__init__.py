"""Which source holds which blocks of the KV cache: sources, block keys, ledgers and the index."""

from typing import TYPE_CHECKING

from indexer._impl import Prompt, block_keys, implementation
from indexer.base import Copies, Decoded, Holding, Index, Limits, Run, Source, SourceStatus, tier_of
from indexer.errors import IndexerError, IndexUnavailable, InvalidQuestion, LimitReached
from indexer.events import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, Event, Events
from indexer.keys import ImageItem, TokenIds
from indexer.memory import MemoryIndex
from indexer.opening import open_index

if TYPE_CHECKING:
    from indexer.redis_index import AsyncRedisReader, RedisIndex
    from indexer.redis_leases import Leases

__all__ = [
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
    "block_keys",
    "implementation",
    "open_index",
    "tier_of",
]


def __getattr__(name: str) -> object:
    """Load what needs the Redis client when it is asked for: that takes longer than all the rest."""
    if name in ("AsyncRedisReader", "RedisIndex"):
        from indexer import redis_index

        return getattr(redis_index, name)
    if name == "Leases":
        from indexer.redis_leases import Leases

        return Leases
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
