"""From payload bytes to events, for every dialect that engines speak.

A batch is an array ``[ts, events, rank?]`` or a map. An event is a tagged array (vLLM up to 0.23, older SGLang), a
tagged map (vLLM from 0.24, SGLang), an RFC 1527 map (Mooncake), or bytes that hold a packed array (llm-d's storage
connector). Unknown keys and extra fields are ignored. A bad event costs that event, never its batch; a broken batch
raises.

Sources: vLLM `distributed/kv_events.py` 0.9 to 0.33, SGLang 0.5.23, LMCache 0.5, Mooncake's master events,
llm-d-kv-cache 7be76e1.
"""

import re
import struct
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from indexer import AllBlocksCleared, BlockRemoved, BlockStored, Decoded, EngineHash, Event, Index, Undecodable
from kvevents.errors import DecodeError

MAX_EVENTS = 65_536
MAX_HASHES = 1_048_576
MAX_TOKENS = 16_777_216
MAX_BLOCK_SIZE = 65_536
MAX_RANK = 65_535
MAX_TEXT = 1_024
MAX_HASH_BYTES = 64

_STORED = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
)
_REMOVED = ("block_hashes", "medium", "group_idx")
_TAGS = {"stored": "BlockStored", "removed": "BlockRemoved", "cleared": "AllBlocksCleared"}
_PAIRS_SINCE = 9
"""Fields after the tag from which on tagged arrays name images with their place (vLLM 0.20 added group_idx)."""
_NOT_SAID = 0
"""The parent of blocks that have one which the publisher does not name (LMCache sends it so, WIRE B1a)."""
_DIGEST = re.compile(r"[0-9a-fA-F]{16,}")

_BROKEN = (msgspec.DecodeError, RecursionError, ValueError, OverflowError, TypeError)

_DOUBLE = struct.Struct(">d")

_decode = msgspec.msgpack.Decoder().decode
_encode = msgspec.msgpack.Encoder().encode


class Batch(NamedTuple):
    """What one message carries."""

    ts: float
    """When the engine made it, seconds since the epoch. Not for ordering."""
    rank: int | None
    """The data-parallel rank, None where the publisher does not say."""
    events: list[Event]
    discards: Counter[str]
    """Events that were dropped or ignored, by reason."""

    @property
    def clears(self) -> bool:
        """Whether one of the events empties the cache."""
        return any(type(event) is AllBlocksCleared for event in self.events)

    @property
    def model(self) -> str | None:
        """The model that the events name, None where they do not."""
        return next((event.model for event in self.events if type(event) is BlockStored and event.model), None)


class _BadEvent(Exception):
    """An event cannot be used; the argument is the reason it is counted under."""


def decode_batch(payload: bytes | bytearray | memoryview) -> Batch:
    """Decode the payload frame of one message.

    Raises `DecodeError` when it is no batch at all. Events that cannot be used are left out and counted in `discards`.
    """
    try:
        raw = _decode(payload)
    except _BROKEN as error:
        raise DecodeError("bad_msgpack", str(error)) from error
    if isinstance(raw, dict):
        ts: Any = raw.get("ts")
        raw_events: Any = raw.get("events")
        rank: Any = raw.get("data_parallel_rank")
    elif isinstance(raw, list) and len(raw) >= 2:
        ts, raw_events = raw[0], raw[1]
        rank = raw[2] if len(raw) > 2 else None
    else:
        raise DecodeError("bad_batch", f"expected [ts, events, rank], got {type(raw).__name__}")
    if type(raw_events) is not list or type(ts) not in (int, float):
        raise DecodeError("bad_batch", "expected a number and a list of events")
    if rank is not None and (type(rank) is not int or not 0 <= rank <= MAX_RANK):
        raise DecodeError("bad_rank", f"expected a rank from 0 to {MAX_RANK}, got {rank!r:.40}")
    if len(raw_events) > MAX_EVENTS:
        raise DecodeError("too_many_events", f"{len(raw_events)} events, at most {MAX_EVENTS} are read")
    events: list[Event] = []
    discards: Counter[str] = Counter()
    for item in raw_events:
        try:
            events.append(_event(item))
        except _BadEvent as bad:
            discards[bad.args[0]] += 1
    return Batch(ts / 1000 if ts > 1e11 else float(ts), rank, events, discards)


def batch_time(payload: bytes | memoryview) -> float | None:
    """Read when the engine made a batch without decoding it; None where it does not begin like engines' batches do."""
    if len(payload) < 10 or payload[0] not in (0x92, 0x93) or payload[1] != 0xCB:
        return None
    (ts,) = _DOUBLE.unpack_from(payload, 2)
    return ts if 0.0 <= ts < 1e11 else None


def decode_batches(payloads: Sequence[bytes | memoryview], index: Index | None = None) -> list[Decoded | DecodeError]:
    """Decode many payload frames at once, in the form that `index` applies fastest.

    Gives a `DecodeError` in the place of each that is no batch at all. Without an index, and for one that is written in
    Python, the others are what `decode_batch` gives.
    """
    if index is not None and index.decoder is not None:
        return name_errors(index.decoder.decode_batches(payloads))
    batches: list[Decoded | DecodeError] = []
    for payload in payloads:
        try:
            batches.append(decode_batch(payload))
        except DecodeError as error:
            batches.append(error)
    return batches


def name_errors(decoded: Sequence[Decoded | Undecodable]) -> list[Decoded | DecodeError]:
    """Give what an index decoded, with a `DecodeError` in the place of each frame that is no batch."""
    return [DecodeError(*batch) if isinstance(batch, tuple) else batch for batch in decoded]


def _event(item: Any) -> Event:
    if isinstance(item, bytes):
        try:
            item = _decode(item)
        except _BROKEN as error:
            raise _BadEvent("bad_msgpack") from error
    if isinstance(item, list):
        if not item or not isinstance(item[0], str):
            raise _BadEvent("bad_event")
        tag: Any = item[0]
        names = _STORED if tag == "BlockStored" else _REMOVED
        fields: Mapping[Any, Any] = dict(zip(names, item[1:], strict=False))
        pairs = len(item) > _PAIRS_SINCE
    elif isinstance(item, dict):
        fields = item
        tag = item.get("type")
        if tag is None and isinstance(item.get("event_type"), str):
            tag = _TAGS.get(item["event_type"], "unknown")
        pairs = True
    else:
        raise _BadEvent("bad_event")
    if tag == "BlockStored":
        return _stored(fields, pairs=pairs)
    if tag == "BlockRemoved":
        return BlockRemoved(
            block_hashes=_hashes(fields),
            medium=_medium(fields.get("medium")),
            group_idx=_group(fields.get("group_idx")),
        )
    if tag == "AllBlocksCleared":
        return AllBlocksCleared()
    raise _BadEvent("unknown_event" if isinstance(tag, str) else "bad_event")


def _stored(fields: Mapping[Any, Any], *, pairs: bool) -> BlockStored:
    hashes = _hashes(fields)
    tokens = _tokens(fields.get("token_ids"))
    size = fields.get("block_size")
    size = 0 if size is None else _number(size, MAX_BLOCK_SIZE, "bad_block_size")
    if tokens and not size:
        raise _BadEvent("bad_block_size")
    if tokens and len(hashes) - len(tokens) // size > (1 if len(tokens) % size else 0):
        raise _BadEvent("too_few_tokens")
    parent = fields.get("parent_block_hash")
    if parent is None:
        parent = fields.get("parent_hash")
    place = fields.get("base_block_idx")
    if parent is None and type(place) is int and place > 0:
        parent = _NOT_SAID
    lora = _text(fields.get("lora_name"))
    salt = _text(fields.get("cache_salt")) or _text(fields.get("additional_salt"))
    extras = None
    bare = False
    extra_keys = fields.get("extra_keys")
    if extra_keys is not None and tokens:
        own_salt, extras, bare = _extras(extra_keys, len(hashes), lora, root=parent is None, pairs=pairs)
        salt = salt or own_salt or None
    window = fields.get("kv_cache_spec_sliding_window")
    return BlockStored(
        block_hashes=hashes,
        parent_block_hash=None if parent is None else _hash(parent),
        token_ids=tokens,
        block_size=size,
        medium=_medium(fields.get("medium")),
        group_idx=_group(fields.get("group_idx")),
        kind=_text(fields.get("kv_cache_spec_kind")),
        sliding_window=None if window is None else _number(window, 2**31, "bad_window"),
        lora=lora or _lora_number(fields.get("lora_id")),
        cache_salt=salt if parent is None else None,
        extras=extras,
        bare_images=bare,
        model=_text(fields.get("model_name")),
    )


def _hashes(fields: Mapping[Any, Any]) -> list[EngineHash]:
    hashes = fields.get("block_hashes")
    if hashes is None:
        hashes = fields.get("seq_hashes")
    if type(hashes) is not list:
        raise _BadEvent("bad_hashes")
    if len(hashes) > MAX_HASHES:
        raise _BadEvent("too_many_hashes")
    # the usual case is told without a step per hash
    if hashes and set(map(type, hashes)) == {int} and min(hashes) >= 0:
        return hashes
    return [_hash(value) for value in hashes]


def _hash(value: Any) -> EngineHash:
    if type(value) is int:
        return value & 0xFFFF_FFFF_FFFF_FFFF  # some engines send the same 64 bits with a sign
    if type(value) is bytes and 0 < len(value) <= MAX_HASH_BYTES:
        return value
    raise _BadEvent("bad_hash")


def _tokens(value: Any) -> "array[int]":
    if value is None:
        return array("I")
    if type(value) is not list:
        raise _BadEvent("bad_tokens")
    if len(value) > MAX_TOKENS:
        raise _BadEvent("too_many_tokens")
    if value and type(value[0]) is list:
        # EAGLE pages are over pairs [token, next token] (SGLang)
        if not all(type(pair) is list and len(pair) == 2 for pair in value):
            raise _BadEvent("bad_tokens")
        value = [pair[0] for pair in value]
    try:
        return array("I", value)
    except (TypeError, OverflowError):
        raise _BadEvent("bad_tokens") from None


def _number(value: Any, most: int, reason: str) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise _BadEvent(reason)
    return value


def _group(value: Any) -> int | None:
    return None if value is None else _number(value, 65_535, "bad_group")


def _lora_number(value: Any) -> int | None:
    return None if value is None else _number(value, 2**63, "bad_lora")


def _text(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if type(value) is not str or len(value) > MAX_TEXT:
        raise _BadEvent("bad_text")
    return value


def _medium(value: Any) -> str:
    return (_text(value) or "gpu").lower()


def _extras(
    extra_keys: Any, blocks: int, lora: str | None, *, root: bool, pairs: bool
) -> tuple[str | None, list[bytes] | None, bool]:
    """Read vLLM's extra keys: ``[lora name, [image, offset]..., salt, prompt-embedding digest]``, those that apply.

    Gives the salt, the extra bytes of each block (None where no block has any), and whether images came bare.
    """
    if type(extra_keys) is not list:
        raise _BadEvent("bad_extra_keys")
    if not any(extra_keys):
        return None, None, False
    if len(extra_keys) != blocks:
        raise _BadEvent("bad_extra_keys")
    salt = None
    bare = False
    extras = []
    for number, keys in enumerate(extra_keys):
        if keys is None:
            extras.append(b"")
            continue
        if type(keys) is not list:
            raise _BadEvent("bad_extra_keys")
        rest = keys[1:] if keys and lora is not None and keys[0] == lora else keys
        kept = []
        for key in rest:
            if type(key) is str and root and number == 0 and (pairs or not _DIGEST.fullmatch(key)):
                salt = key
                continue
            if type(key) is str:
                bare = bare or not pairs
            elif not (type(key) is bytes or _is_image(key)):
                raise _BadEvent("bad_extra_keys")
            kept.append(key)
        extras.append(_encode(kept) if kept else b"")
    return salt, extras if any(extras) else None, bare


def _is_image(key: Any) -> bool:
    return type(key) is list and len(key) == 2 and type(key[0]) is str and type(key[1]) is int
