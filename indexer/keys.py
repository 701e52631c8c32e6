"""Block keys: our own name for a block of tokens and everything before it.

``key_i = XXH3_64(token ids of block i as little-endian uint32 + the block's extra bytes, seed = key_{i-1})`` and
``key_{-1} = XXH3_64(msgpack([model, block_size, lora, cache_salt]))``: the same tokens have the same key on every pod,
whatever the engines call them. Writers and readers of an index meet only in these functions.
"""

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from reprlib import repr as short
from typing import Annotated, NewType, TypeAlias, cast

import msgspec
from xxhash import xxh3_64_intdigest

from indexer.errors import InvalidQuestion

BlockKey = NewType("BlockKey", int)

TokenIds: TypeAlias = "Sequence[int] | array[int] | memoryview | bytes | bytearray"
"""Token ids: a sequence of ints, or a buffer of native uint32 (array, numpy array, bytes), which is read in place."""

ImageItem: TypeAlias = tuple[str, int, int]
"""An image or other multimodal item of a prompt: identifier, first token, number of tokens."""

MAX_TOKEN_ID = 2**32 - 1

_Id: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKEN_ID)]
_JSON = msgspec.json.Decoder(list[_Id])
_WHOLE = msgspec.json.Decoder(list[_Id], strict=False)

_KNOWN_FORMATS = frozenset("cbB?hHiIlLqQnNfd")
"""What `memoryview` can read."""


def token_buffer(token_ids: TokenIds) -> memoryview:
    """Give the tokens as bytes of little-endian uint32, without a copy where they are that already.

    Raises `InvalidQuestion` naming the first value that is no token id.
    """
    if isinstance(token_ids, (list, tuple)):
        return _packed(token_ids)
    try:
        view = memoryview(cast("bytes", token_ids))
    except TypeError:
        return _packed(list(token_ids))
    if view.ndim != 1 or not view.contiguous:
        raise InvalidQuestion(f"token_ids: expected one contiguous row of numbers, got a buffer of shape {view.shape}")
    # arrays hold a number in each byte; of all else bytes are what the numbers are made of
    if view.format in ("B", "c") and not (isinstance(token_ids, array) or hasattr(token_ids, "dtype")):
        if view.nbytes % 4:
            raise InvalidQuestion(f"token_ids: {view.nbytes} bytes are no whole number of uint32")
        return view.cast("B")
    if view.format in ("I", "L") and view.itemsize == 4:
        return view.cast("B") if sys.byteorder == "little" else _packed(view.tolist())
    # numbers in another byte order, or at odd places, are read one by one
    return _packed(view.tolist() if view.format.lstrip("@") in _KNOWN_FORMATS else list(token_ids))


def token_ids_of_json(text: bytes | memoryview | msgspec.Raw) -> bytes | memoryview:
    """Read a JSON array of token ids into a buffer of them, as `token_buffer` gives it.

    Raises `InvalidQuestion` naming the first value that is no token id.
    """
    try:
        return _packed(_JSON.decode(text))
    except msgspec.ValidationError as error:
        wrong = error
    except msgspec.DecodeError as error:
        raise InvalidQuestion(f"token_ids: {error}") from error
    # JSON does not tell 1.0 from 1; who reads so would take "1" too
    if "got `float`" in str(wrong) and b'"' not in bytes(text):
        try:
            return _packed(_WHOLE.decode(text))
        except msgspec.ValidationError as error:
            wrong = error
    what, _, where = str(wrong).partition(" - at `$")
    raise InvalidQuestion(f"token_ids{where.rstrip('`')}: {what}") from wrong


def _packed(token_ids: Sequence[int]) -> memoryview:
    try:
        packed = array("I", token_ids)
    except (TypeError, OverflowError):
        bad = next((t for t in token_ids if type(t) is not int or not 0 <= t <= MAX_TOKEN_ID), None)
        raise InvalidQuestion(f"token_ids: expected whole numbers from 0 to 2**32-1, got {short(bad)}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return memoryview(packed).cast("B")


@lru_cache(maxsize=4096)
def root_key(model: str, block_size: int, lora: str | int | None = None, cache_salt: str | None = None) -> BlockKey:
    """Give the key that stands before the first block of a chain."""
    return BlockKey(xxh3_64_intdigest(msgspec.msgpack.encode([model, block_size, lora, cache_salt])))


@lru_cache(maxsize=256)
def _rows(width: int) -> struct.Struct:
    return struct.Struct(f"{width}s")


def extend_chain(
    parent: BlockKey, tokens: memoryview, block_size: int, extras: Iterable[bytes] | None = None
) -> list[BlockKey]:
    """Give the keys of the whole blocks in `tokens`, the first following `parent`.

    `tokens` is what `token_buffer` gives; tokens after the last whole block are left out. `extras` has the extra bytes
    of each block, b"" for none.
    """
    width = 4 * block_size
    rows = _rows(width).iter_unpack(tokens[: len(tokens) // width * width])
    digest = xxh3_64_intdigest
    key: int = parent
    keys: list[int] = []
    add = keys.append
    if extras is None:
        for (row,) in rows:
            key = digest(row, key)
            add(key)
    else:
        for (row,), extra in zip(rows, extras, strict=False):
            key = digest(row + extra, key)
            add(key)
    return cast("list[BlockKey]", keys)


def image_extras(images: Sequence[ImageItem], block_size: int, blocks: range, *, bare: bool = False) -> list[bytes]:
    """Give the extra bytes of some consecutive blocks of a prompt with these images, b"" for a block without.

    They are the msgpack of ``[[identifier, offset in the block], ...]`` for the images that reach into the block, by
    place; the offset is negative in blocks after an image's start. `bare` leaves the offsets out (see
    `BlockStored.bare_images`).
    """
    inside: dict[int, list[tuple[int, str]]] = {}
    for name, first, length in images:
        end = -(-(first + length) // block_size)
        for block in range(max(first // block_size, blocks.start), min(end, blocks.stop)):
            inside.setdefault(block, []).append((first, name))
    extras = [b""] * len(blocks)
    for block, found in inside.items():
        found.sort()
        start = block * block_size
        extras[block - blocks.start] = msgspec.msgpack.encode(
            [name if bare else [name, first - start] for first, name in found]
        )
    return extras


def check_block_size(block_size: int) -> None:
    """Raise `InvalidQuestion` for what is no block size."""
    if block_size < 1:
        raise InvalidQuestion(f"block_size: expected at least 1, got {block_size}")


def block_keys(
    token_ids: TokenIds,
    model: str,
    *,
    block_size: int = 16,
    lora_name: str | int | None = None,
    cache_salt: str | None = None,
    mm_items: Sequence[ImageItem] = (),
) -> list[BlockKey]:
    """Give the key of every whole block of a prompt.

    >>> [hex(key) for key in block_keys(range(8), "m", block_size=4)]
    ['0x9bd9772b422c0351', '0x5f2235976a573658']

    Raises `InvalidQuestion` for values that are no token ids or a block size below 1.
    """
    check_block_size(block_size)
    tokens = token_buffer(token_ids)
    extras = image_extras(mm_items, block_size, range(len(tokens) // (4 * block_size))) if mm_items else None
    root = root_key(model, block_size, None if lora_name == "" else lora_name, cache_salt or None)
    return extend_chain(root, tokens, block_size, extras)
