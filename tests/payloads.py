"""Payloads as engines send them and as nobody does: values, and msgpack of anything."""

import itertools
import struct
from random import Random

import msgspec

from kvevents.wire import MAX_HASH_BYTES, MAX_TEXT

from .conftest import GOLDEN, payload, read_capture


class Raw(bytes):
    """Msgpack as it is."""


class Pairs(list):
    """A map, also with keys that come twice."""


def pack(item, random: Random | None = None) -> bytes:
    """Msgpack of anything; with `random` now and then longer than it needs to be."""
    loose = random.randrange(8) if random else 7
    match item:
        case Raw():
            return item
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if item else b"\xc2"
        case int():
            widths = [w for w in (1, 2, 4, 8) if item < 1 << 8 * w] if item >= 0 else []
            signed = [w for w in (1, 2, 4, 8) if -(1 << 8 * w - 1) <= item < 1 << 8 * w - 1]
            if random and not loose:
                forms = [(0xCB + w.bit_length(), w, False) for w in widths]
                forms += [(0xCF + w.bit_length(), w, True) for w in signed]
                tag, width, sign = random.choice(forms)
                return bytes([tag]) + item.to_bytes(width, signed=sign)
            return msgspec.msgpack.encode(item)
        case float():
            return b"\xcb" + struct.pack(">d", item)
        case str() | bytes():
            body = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
            tags = (0xD9, 0xDA, 0xDB) if isinstance(item, str) else (0xC4, 0xC5, 0xC6)
            if isinstance(item, str) and len(body) < 32 and loose:
                return bytes([0xA0 | len(body)]) + body
            return _head(tags, len(body), loose) + body
        case Pairs():
            head = bytes([0x80 | len(item)]) if len(item) < 16 and loose else _head((0xDE, 0xDF), len(item), loose)
            return head + b"".join(pack(key, random) + pack(value, random) for key, value in item)
        case dict():
            return pack(Pairs(item.items()), random)
        case list() | tuple():
            head = bytes([0x90 | len(item)]) if len(item) < 16 and loose else _head((0xDC, 0xDD), len(item), loose)
            return head + b"".join([pack(one, random) for one in item])
        case _:
            raise TypeError(item)


def _head(tags, length, loose):
    widths = (1, 2, 4)[-len(tags) :]
    forms = [(tag, width) for tag, width in zip(tags, widths, strict=True) if length < 1 << 8 * width]
    tag, width = forms[0 if loose else -1]
    return bytes([tag]) + length.to_bytes(width)


INTS = sorted({10**11, 10**11 + 1} | {
    sign * (1 << bits) + more
    for bits in (0, 4, 5, 7, 8, 15, 16, 31, 32, 33, 53, 62, 63, 64)
    for more in (-1, 0, 1)
    for sign in (-1, 1)
    if -(1 << 63) <= sign * (1 << bits) + more < 1 << 64
})  # fmt: skip
FLOATS = [
    0.0,
    -0.0,
    1.5,
    -1.5,
    1e11,
    1.0000000000000002e11,
    1763932000500.0,
    1e300,
    float("inf"),
    float("-inf"),
    float("nan"),
]
LENGTHS = (0, 1, 7, 8, 9, 16, 17, 32, MAX_HASH_BYTES, MAX_HASH_BYTES + 1, 128, 129, 240, 241, 300)
HASHES = [bytes(7 * n % 256 for n in range(length)) for length in LENGTHS]
TEXTS = ["", "x", "GPU", "cpu_PINNED", "Disk", "Größe", "\N{KELVIN SIGN}", "İ", "ΑΣ", "ab" * 32, "ab" * 8,
         "ab" * 7, "é" * MAX_TEXT, "x" * (MAX_TEXT + 1), "é" * (MAX_TEXT + 1), "a\0b", "\U0001f600"]  # fmt: skip
WORDS = ["BlockStored", "BlockRemoved", "AllBlocksCleared", "Never", "stored", "removed", "cleared"]
HEX = """
    c1 c7ff c700ff c70105ff d40500 d4ffff d501ffff d6ff00000001 d6ffffffffff d605ffffffff d7ff0000000000000000
    d7ffee6b27fc00000000 d7ffee6b280000000000 d7ffffffffffffffffff ca3fc00000 ca7fc00000 ca7f800000
    d8ff00000000000000000000000000000000 a1ff a2c328 a3eda080 a4f4908080 a2c080 c403ffffff 81c0c0 8190c0 8191c0c0
    8180c0 819180c0 81d40500c0 8191d40500c0 82c0c0c0c0 81d6ff00000001c0 81cb7ff8000000000000c0 81c401ffc0 dd00000000
    df00000000 ddffffffff dfffffffff dbffffffff c6ffffffff c9ffffffff01 dc0001c0 d900 8f 9f bf
"""
STAMPS = [
    Raw(b"\xc7\x0c\xff" + struct.pack(">Iq", nanos, seconds))
    for nanos in (0, 1, 999_999_499, 999_999_500, 999_999_999, 1_000_000_000)
    for seconds in (0, -1, -62_135_596_801, -62_135_596_800, 253_402_300_799, 253_402_300_800, 2**63 - 1, -(2**63))
]
RAW = [Raw(bytes.fromhex(text)) for text in HEX.split()] + STAMPS
LONG = [[*first, *[None] * 15] for first in ([None], [[]], [None, None], [None, []], [None, [1]], [None, {}])]
DEEP = [Raw(b"\x91" * depth + b"\xc0") for depth in (1, 2, 3, 40)]
# between 256 and a thousand levels the two differ: how deep Python reads depends on what it is called from
DEEPEST = [Raw(b"\x91" * depth + b"\xc0") for depth in (240, 20000)]
ODD = [None, True, False, [], {}, [None], [[]], [0], ["x"], [1, "x"], ["x", 1], [["x", 1]], {"x": 1}, *INTS, *FLOATS,
       *HASHES, *TEXTS, *WORDS, *RAW, *LONG, *DEEP]  # fmt: skip
TOKENS = list(range(0, 72000, 9000))
PAIRS = [[token, token + 1] for token in TOKENS]
KEYS = [["ad", ["img", 2], "S", b"\x01" * 32], ["ad", ["img", -2], "x"]]
SALTED = [["S"], None]
STORED = {
    "type": "BlockStored", "block_hashes": [1, b"\x02" * 32], "parent_block_hash": None, "token_ids": TOKENS,
    "block_size": 4, "lora_id": 3, "medium": "CPU_PINNED", "lora_name": "ad", "extra_keys": KEYS, "group_idx": 2,
    "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 16, "locality": "LOCAL",
    "ownership": None, "session_id": "s", "lookahead_token_ids": [[1], None],
}  # fmt: skip
RFC = {
    "event_id": 1, "event_type": "stored", "seq_hashes": [5, 6], "block_hashes": None, "medium": "disk",
    "parent_hash": 4, "token_ids": TOKENS, "block_size": 4, "additional_salt": "S", "cache_salt": None,
    "model_name": "m", "tenant_id": "t",
}  # fmt: skip
ARRAY = ["BlockStored", [2**64 - 1, -2], None, TOKENS, 4, 7, "GPU", "ad", KEYS, 1, "full_attention", 9, "more"]
EVENTS = [
    STORED,
    RFC,
    ARRAY,
    ARRAY[:6],
    *(
        ["BlockStored", [1, 2], None, TOKENS, 4, 7, "GPU", None, [["ab" * 32, "S"], ["cd" * 8]], 0, ""][:n]
        for n in (9, 10, 11)
    ),
    *(["BlockStored", [1], None, TOKENS, 8, 7, "GPU", None, [["c" * n]]] for n in (15, 16)),
    {"type": "BlockStored", "block_hashes": [-5, 6], "token_ids": PAIRS, "block_size": 4, "cache_salt": "S"},
    {"type": "BlockStored", "block_hashes": [1, 2], "token_ids": TOKENS, "block_size": 4, "extra_keys": SALTED},
    ["BlockStored", [1], 0, [], 0, None, "SHARED_STORAGE"],
    ["BlockRemoved", [1, b"\x03" * 16, -4], "CPU", 1],
    {"type": "BlockRemoved", "block_hashes": [1], "medium": "gpu", "group_idx": 0},
    {"event_type": "removed", "seq_hashes": [5]},
    {"type": "AllBlocksCleared"},
    ["AllBlocksCleared"],
]


def golden_payloads() -> list[bytes]:
    lines = itertools.chain.from_iterable(map(read_capture, GOLDEN))
    return [bytes.fromhex(line["payload"]) for line in lines if line["kind"] == "message"]


def made_payloads() -> list[bytes]:
    payloads = [payload(event) for event in EVENTS]
    payloads += [payload(*EVENTS), payload(*map(pack, EVENTS))]
    payloads.append(pack({"ts": 1763932000500, "events": EVENTS, "data_parallel_rank": 3}))
    return payloads
