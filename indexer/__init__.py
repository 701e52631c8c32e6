"""Which source holds which blocks of the KV cache: sources, block keys, ledgers and the index."""

from indexer.base import Copies, Holding, Index, Limits, Run, Source, SourceStatus, tier_of
from indexer.errors import IndexerError, InvalidQuestion, LimitReached
from indexer.events import AllBlocksCleared, BlockRemoved, BlockStored, EngineHash, Event
from indexer.keys import ImageItem, TokenIds, block_keys
from indexer.memory import MemoryIndex
from indexer.opening import open_index
from indexer.prompt import Prompt

__all__ = [
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "Copies",
    "EngineHash",
    "Event",
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
    "open_index",
    "tier_of",
]
