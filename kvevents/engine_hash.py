"""The engine's own hashes, computed again from tokens: a test of what an engine says of itself.

vLLM chains ``H((parent digest, tokens, extra keys))`` over the blocks of a prompt, from ``H(seed text)`` where
`PYTHONHASHSEED` gives the text. ``H`` is SHA-256 or XXH3-128 over CBOR or over a pickle; on the wire is the digest, or
its last 8 bytes. Source: WIRE A5, and vLLM's `v1/core/kv_cache_utils.py` as its captures show it.

Nothing of the index depends on this: block keys are our own. Blocks with extra keys (adapters, salts, images) are left
out, since not all that is hashed of them is on the wire.
"""

import hashlib
import pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import msgspec
import xxhash

from indexer import BlockStored, EngineHash

DEFAULT_SEEDS = ("0", "42")
"""What `PYTHONHASHSEED` is set to in the guides of vLLM, LMCache and llm-d."""

_MAX_EVENTS = 64
_MAX_TOKENS = 65_536
_MAX_OTHER_SIZE = 1024
_OTHER_SIZES = tuple(2**power for power in range(11))

_Value: TypeAlias = "int | bytes | str | Sequence[_Value] | None"
_Hash: TypeAlias = Callable[[_Value], bytes]


def cbor(value: _Value) -> bytes:
    """Encode ints from 0, bytes, text, sequences and None as canonical CBOR (RFC 8949, 4.2.1)."""
    if value is None:
        return b"\xf6"
    if isinstance(value, int):
        return _head(0, value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        text = value.encode()
        return _head(3, len(text)) + text
    return _head(4, len(value)) + b"".join(map(cbor, value))


def _head(kind: int, number: int) -> bytes:
    if number < 24:
        return bytes([kind << 5 | number])
    for code, form in ((24, ">BB"), (25, ">BH"), (26, ">BI"), (27, ">BQ")):
        if number < 1 << 8 * (struct.calcsize(form) - 1):
            return struct.pack(form, kind << 5 | code, number)
    raise ValueError(f"CBOR: {number} does not fit 64 bits")


def _pickled(value: _Value) -> bytes:
    return pickle.dumps(value, protocol=5)


ALGORITHMS: dict[str, _Hash] = {
    "sha256_cbor": lambda value: hashlib.sha256(cbor(value)).digest(),
    "sha256": lambda value: hashlib.sha256(_pickled(value)).digest(),
    "xxhash_cbor": lambda value: xxhash.xxh3_128_digest(cbor(value)),
    "xxhash": lambda value: xxhash.xxh3_128_digest(_pickled(value)),
}
"""By the names of vLLM's ``--prefix-caching-hash-algo``."""


class HashFindings(msgspec.Struct, frozen=True):
    """What computing hashes again has shown."""

    checked: int = 0
    """Events that say all that is hashed: at a prompt's start, without extra keys."""
    matched: int = 0
    """How many of them have the hashes that `algorithm` and `seed` give."""
    algorithm: str = ""
    """The algorithm that gives the hashes, "" where none does that is known."""
    seed: str = ""
    block_size: int = 0
    """The block size the hashes were made with, 0 where not known. Another than the events' own is a contradiction."""
    said_block_size: int = 0


def recompute(algorithm: str, seed: str, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Give the digests of the whole blocks of a prompt without extra keys."""
    hash_of = ALGORITHMS[algorithm]
    digest = hash_of(seed)
    digests = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        digest = hash_of((digest, tuple(tokens[start : start + block_size]), None))
        digests.append(digest)
    return digests


def recognise_hashes(events: Iterable[BlockStored], seeds: Sequence[str] = DEFAULT_SEEDS) -> HashFindings:
    """Find the algorithm and seed that give the hashes of some events.

    At most 64 events with 65,536 tokens in all are looked at. A scheme that is not found is no error: the seed may be
    random or another one.
    """
    usable: list[BlockStored] = []
    left = _MAX_TOKENS
    for event in events:
        if len(usable) < _MAX_EVENTS and len(event.token_ids) <= left and _is_plain_root(event):
            usable.append(event)
            left -= len(event.token_ids)
    if not usable:
        return HashFindings()
    best = HashFindings(checked=len(usable), said_block_size=usable[0].block_size)
    for algorithm in ALGORITHMS:
        for seed in seeds:
            matched = sum(_gives(algorithm, seed, event, event.block_size) for event in usable)
            if matched > best.matched:
                size = usable[0].block_size
                best = HashFindings(len(usable), matched, algorithm, seed, size, size)
    return best if best.matched else _of_another_size(usable, seeds) or best


def _of_another_size(usable: Sequence[BlockStored], seeds: Sequence[str]) -> HashFindings | None:
    """Ask whether the first hash is of more or fewer tokens than the event says a block has."""
    event = usable[0]
    for size in _OTHER_SIZES:
        if size == event.block_size or size > min(len(event.token_ids), _MAX_OTHER_SIZE):
            continue
        for algorithm in ALGORITHMS:
            for seed in seeds:
                (digest,) = recompute(algorithm, seed, event.token_ids[:size].tolist(), size)
                if _published(digest, event.block_hashes[0]) == event.block_hashes[0]:
                    return HashFindings(len(usable), 0, algorithm, seed, size, event.block_size)
    return None


def _is_plain_root(event: BlockStored) -> bool:
    return (
        event.parent_block_hash is None
        and event.block_size > 0
        and 0 < len(event.block_hashes) == len(event.token_ids) // event.block_size
        and event.lora is None
        and event.cache_salt is None
        and event.extras is None
    )


def _gives(algorithm: str, seed: str, event: BlockStored, block_size: int) -> bool:
    digests = recompute(algorithm, seed, event.token_ids.tolist(), block_size)
    pairs = zip(digests, event.block_hashes, strict=True)
    return all(_published(digest, name) == name for digest, name in pairs)


def _published(digest: bytes, like: EngineHash) -> EngineHash:
    """Give a digest in the form another hash is in."""
    return digest if isinstance(like, bytes) else int.from_bytes(digest[-8:], "big")
