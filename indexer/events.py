"""What happens in the cache of one source, in one form for all engines and versions.

The decoders of `kvevents` turn every dialect on the wire into these values; an `Index` applies them. Names are vLLM's
(`vllm/distributed/kv_events.py`) where the meaning is vLLM's.
"""

from array import array
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import msgspec

EngineHash: TypeAlias = int | bytes
"""An engine's own name of a block: an unsigned 64-bit int, or the raw digest. Opaque, and meaningful for one source."""


class BlockStored(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Blocks entered the cache.

    `token_ids` is an array of typecode ``I``. It covers ``len(block_hashes)`` blocks of `block_size` tokens; it is
    longer where an engine keeps only some blocks of the range (sparse retention), and empty where the engine names
    blocks that it described before (offloading). `parent_block_hash` names the block before the first token, None at a
    prompt's start.
    """

    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None = None
    token_ids: "array[int]" = msgspec.field(default_factory=lambda: array("I"))
    block_size: int = 0
    medium: str = "gpu"
    """Where the blocks lie, in the engine's words, lower-case."""
    group_idx: int | None = None
    """The cache group of a hybrid model, None where the engine does not say."""
    kind: str | None = None
    """The attention kind of the group (``full_attention``, ``sliding_window``, ...)."""
    sliding_window: int | None = None
    """The group's window in tokens."""
    lora: str | int | None = None
    """The adapter's name; its number where an old engine sends no name."""
    cache_salt: str | None = None
    """The salt of the prompt. Only events at a prompt's start carry it."""
    extras: list[bytes] | None = None
    """What else tells the blocks apart (images), one entry per hash, as `indexer.keys` hashes it. None: nothing."""
    bare_images: bool = False
    """The engine names images without their place (vLLM up to 0.18), so `extras` hold identifiers only."""
    model: str | None = None
    """The model, where the event itself names one."""


class BlockRemoved(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One copy of each named block left the cache on `medium`."""

    block_hashes: list[EngineHash]
    medium: str = "gpu"
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, gc=False):
    """The cache of the source was emptied, on all media and in all groups."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class EncodedEvents(Protocol):
    """Events in the form of the index whose decoder made them; only that kind of index can apply them."""

    def __len__(self) -> int: ...


Events: TypeAlias = Sequence[Event] | EncodedEvents
"""What happened in the cache of one source, in order."""
