"""Which source holds which blocks of the KV cache: sources, block keys, ledgers and the index."""

from indexer._impl import Prompt, block_keys, implementation
from indexer.base import Copies, Decoded, Holding, Index, Limits, Run, Source, SourceStatus, tier_of
from indexer.errors import IndexerError, InvalidQuestion, LimitReached
from indexer.events import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, Event, Events
from indexer.keys import ImageItem, TokenIds
from indexer.memory import MemoryIndex
from indexer.opening import open_index

__all__ = [
    "AllBlocksCleared",
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
    "IndexerError",
    "InvalidQuestion",
    "LimitReached",
    "Limits",
    "MemoryIndex",
    "Prompt",
    "Run",
    "Source",
    "SourceStatus",
    "TokenIds",
    "block_keys",
    "implementation",
    "open_index",
    "tier_of",
]
