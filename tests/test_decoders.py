"""The decoder in Rust says of every payload what the one in Python says.

``KVINDEX_FUZZ`` sets how many mutated payloads are tried, ``KVINDEX_FUZZ_SEED`` with which seed.
"""

import itertools
import os
import struct
import subprocess
import sys
import tomllib
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexer import open_index
from kvevents import DecodeError, decode_batches
from kvevents.wire import (
    MAX_BLOCK_SIZE,
    MAX_EVENTS,
    MAX_HASH_BYTES,
    MAX_HASHES,
    MAX_RANK,
    MAX_TEXT,
    MAX_TOKENS,
)

from .conftest import GOLDEN, IMPLEMENTATIONS, POD, payload, read_capture

pytestmark = list(IMPLEMENTATIONS[1].marks)

MUTATIONS = int(os.environ.get("KVINDEX_FUZZ", "50000"))
SEED = int(os.environ.get("KVINDEX_FUZZ_SEED", "1"))
CRATE = Path(__file__).parents[1] / "native" / "Cargo.toml"


# ---- both decoders


def open_native():
    index = open_index("memory://?impl=native")
    index.register(POD, model="m")
    return index


def agree(payloads) -> list:
    """What both decoders make of the payloads; it must be the same."""
    ours = decode_batches(payloads)
    theirs = decode_batches(payloads, open_native())
    assert len(theirs) == len(payloads)
    for body, batch, other in zip(payloads, ours, theirs, strict=True):
        difference = compare(batch, other)
        assert not difference, f"{difference}: {bytes(body[:4000]).hex()}"
    return ours


def compare(batch, other) -> str:
    """Where the two differ, "" if nowhere."""
    if isinstance(batch, DecodeError) or isinstance(other, DecodeError):
        if type(batch) is not type(other) or batch.reason != other.reason:
            return f"{batch!r} against {other!r}"
        # each names its own what is wrong with msgpack; elsewhere the one in Python adds what it got
        return "" if batch.reason == "bad_msgpack" or str(batch).startswith(str(other)) else f"{batch} against {other}"
    for name in ("clears", "model", "rank"):
        if getattr(batch, name) != getattr(other, name):
            return f"{name} {getattr(batch, name)!r} against {getattr(other, name)!r}"
    if repr(batch.ts) != repr(other.ts):
        return f"ts {batch.ts!r} against {other.ts!r}"
    if list(batch.discards.items()) != list(other.discards.items()):
        return f"discards {batch.discards} against {other.discards}"
    if len(batch.events) != len(other) or other != type(other)(batch.events):
        return f"events other than {batch.events!r:.4000}"
    return ""


def told(index):
    """What an index says of itself. How many bytes it takes depends on where its tables happen to lie."""
    return index.sources(), {**index.stats(), "bytes": 0}


# ---- payloads


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


def spans_of(body: bytes) -> list[tuple[int, int]]:
    """Where each value begins and ends."""
    spans: list[tuple[int, int]] = []

    def walk(at: int) -> int:
        place = len(spans)
        spans.append((at, at))
        tag, end, items = body[at], at + 1, 0

        def number(width: int) -> int:
            return int.from_bytes(body[at + 1 : at + 1 + width])

        if 0x80 <= tag <= 0x8F:
            items = 2 * (tag & 15)
        elif 0x90 <= tag <= 0x9F:
            items = tag & 15
        elif 0xA0 <= tag <= 0xBF:
            end += tag & 31
        elif 0xC4 <= tag <= 0xC6 or 0xD9 <= tag <= 0xDB:
            width = 1 << (tag - (0xC4 if tag <= 0xC6 else 0xD9))
            end += width + number(width)
        elif tag in {0xCA, 0xCB}:
            end += 4 << (tag - 0xCA)
        elif 0xCC <= tag <= 0xD3:
            end += 1 << (tag - 0xCC) % 4
        elif 0xDC <= tag <= 0xDF:
            width = 2 << (tag - 0xDC) % 2
            items = number(width) * (2 if tag >= 0xDE else 1)
            end += width
        for _ in range(items):
            end = walk(end)
        spans[place] = (at, end)
        return end

    assert walk(0) == len(body)
    return spans


class Mutator:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.odd = [pack(item) for item in ODD]
        captures = [body for body in golden_payloads() if len(body) < 1200][::7]
        made = made_payloads()
        self.corpus = [(body, self.some(spans_of(body))) for body in captures + made * (len(captures) // len(made))]

    def some(self, spans):
        """Spans without most of those in long lists, which would be nearly all."""
        few = [span for span in spans if span[1] - span[0] > 3]
        return few + self.random.sample(spans, min(len(spans), 30))

    def payload(self) -> bytes:
        random = self.random
        body, spans = random.choice(self.corpus)
        choice = random.random()
        if choice < 0.75:
            body = self.replace(body, spans)
        if choice > 0.65:
            for _ in range(random.randrange(1, 4)):
                body = self.garble(body)
        return body

    def replace(self, body, spans):
        """Other values in the places of some: nearly always still msgpack."""
        random = self.random
        done = len(body)
        for start, end in sorted({random.choice(spans) for _ in range(random.randrange(1, 4))}, reverse=True):
            if end > done:
                continue
            done = start
            old = body[start:end]
            match random.randrange(10):
                case 0:
                    new = b"\x91" + old
                case 1:
                    new = pack(old)
                case 2 | 3:
                    other, places = random.choice(self.corpus)
                    first, last = random.choice(places)
                    new = other[first:last]
                case 4:
                    first, last = random.choice(spans)
                    new = body[first:last] if last <= start else old
                case 5:
                    new = self.rewritten(old)
                case _:
                    new = random.choice(self.odd)
            body = body[:start] + new + body[end:]
        return body

    def rewritten(self, body):
        """The same value in another form."""
        try:
            return pack(msgspec.msgpack.decode(body), self.random)
        except (msgspec.DecodeError, TypeError):
            return body

    def garble(self, body):
        random = self.random
        at = random.randrange(len(body) + 1)
        to = at + random.randrange(12)
        match random.randrange(9):
            case 0:
                return body[:at] + bytes(byte ^ 1 << random.randrange(8) for byte in body[at : at + 1]) + body[at + 1 :]
            case 1:
                return body[:at] + bytes([random.randrange(0x80, 0xE0)]) + body[at + 1 :]
            case 2:
                return body[:at]
            case 3:
                return body[:at] + random.randbytes(random.randrange(1, 5)) + body[at:]
            case 4:
                return body[:at] + body[to:]
            case 5:
                return body[:to] + body[at:]
            case 6:
                other, _ = random.choice(self.corpus)
                return body[:at] + other[random.randrange(len(other)) :]
            case 7:
                return body[:at] + random.choice(self.odd) + body[at:]
            case _:
                return self.lie(body)

    def lie(self, body):
        """A list, map or text says that it is longer or shorter than it is."""
        random = self.random
        heads = [
            at for at, byte in enumerate(body) if 0x80 <= byte < 0xC0 or 0xC4 <= byte < 0xCA or 0xD9 <= byte < 0xE0
        ]
        if not heads:
            return body
        at = random.choice(heads)
        if body[at] >= 0xC0:
            wrong = at + random.randrange(1, 5)
            return body[:wrong] + random.randbytes(1) + body[wrong + 1 :]
        if random.randrange(2):
            return body[:at] + bytes([body[at] ^ random.randrange(1, 16)]) + body[at + 1 :]
        wide = 0xDF if body[at] < 0x90 else 0xDD if body[at] < 0xA0 else 0xDB
        length = random.choice([0, len(body) // 2, len(body), 1 << 16, 1 << 31, (1 << 32) - 1])
        return body[:at] + bytes([wide]) + length.to_bytes(4) + body[at + 1 :]


# ---- tests


def test_captures_and_made_payloads():
    for batch in agree(golden_payloads() + made_payloads()):
        assert not isinstance(batch, DecodeError)
        assert not batch.discards


def test_every_odd_value_in_every_place():
    payloads = []
    for odd in ODD + DEEPEST:
        payloads += [pack(odd), pack([odd, []]), pack([1, odd]), pack([1, [], odd]), pack([1, [odd], 0, odd])]
        payloads += [
            pack({"ts": odd, "events": []}),
            pack({"ts": 1, "events": odd}),
            pack({"ts": 1, "events": [], "x": odd}),
        ]
        payloads.append(pack({"ts": 1, "events": [], "data_parallel_rank": odd}))
        payloads.append(pack(Pairs([("ts", 1), ("events", []), (odd, 1)])))
        payloads += [
            pack([1, [pack(odd)]]),
            pack([1, [["BlockRemoved", [odd]]]]),
            pack([1, [Pairs([(odd, 1)])]]),
        ]
        for event in EVENTS:
            for place in range(len(event)) if isinstance(event, list) else event:
                other = event.copy()
                other[place] = odd
                payloads.append(pack([1, [other]]))
        for name in ("block_hashes", "seq_hashes", "token_ids", "extra_keys"):
            for event in (STORED, RFC):
                payloads += [pack([1, [{**event, name: [item, odd]}]]) for item in (1, [1, 2], odd, None, ["S"])]
        payloads += [
            pack([1, [{**STORED, "extra_keys": keys, "parent_block_hash": parent, "lora_name": lora}]])
            for keys in (
                [[odd], None],
                [None, [odd]],
                [["ad", odd], ["ad"]],
                [[["img", odd]], None],
                [[[odd, 1]], None],
            )
            for parent in (None, 1)
            for lora in ("ad", None)
        ]
    for start in range(0, len(payloads), 1000):
        agree(payloads[start : start + 1000])


def test_names_that_are_there_twice_or_in_part():
    values = {
        "type": [None, "BlockStored", "Never"],
        "event_type": [None, "removed", 5],
        "block_hashes": [None, [1], 5],
        "seq_hashes": [None, [2], "x"],
        "parent_block_hash": [None, 3, "x"],
        "parent_hash": [None, 4, "x"],
        "base_block_idx": [None, 0, 5, -1, True, 2.0, "x"],
        "cache_salt": [None, "", "a", 5],
        "additional_salt": [None, "b", 5],
    }
    random = Random(SEED)
    payloads = []
    for _ in range(3000):
        names = random.choices(list(values), k=random.randrange(1, 10))
        event = Pairs((name, random.choice(values[name])) for name in names)
        event += random.sample([("token_ids", [1, 2]), ("block_size", 2), ("lora_id", 2), ("lora_name", "")], 3)
        payloads.append(pack([1, [event]]))
    parts = [("ts", 1), ("ts", "x"), ("events", []), ("events", [None]), ("events", 1), ("data_parallel_rank", 1)]
    payloads += [pack(Pairs(some)) for some in itertools.permutations([*parts, ("data_parallel_rank", "x")], 4)]
    agree(payloads)


def test_limits():
    def many(count, item=b"\x01"):
        return Raw(b"\xdd" + count.to_bytes(4) + item * count)

    agree([
        pack([1, many(MAX_EVENTS)]),
        pack([1, many(MAX_EVENTS + 1)]),
        pack([1, many(MAX_EVENTS + 1), MAX_RANK + 1]),
        pack([1, [["BlockRemoved", many(MAX_HASHES)], ["BlockRemoved", many(MAX_HASHES + 1)]]]),
        pack([1, [["BlockStored", [1], None, many(MAX_TOKENS + 1), MAX_BLOCK_SIZE]]]),
        pack([1, [["BlockStored", [1], None, many(MAX_TOKENS), MAX_BLOCK_SIZE]]]),
    ])  # fmt: skip


def test_lists_of_token_ids_in_any_form():
    random = Random(SEED)
    payloads = []
    for number in range(1500):
        length = random.randrange(2000) if number % 10 == 0 else random.randrange(30)
        bits = random.randrange(33)
        tokens = [random.getrandbits(random.randrange(bits + 1)) for _ in range(length)]
        if tokens and random.randrange(4) == 0:
            tokens[random.randrange(length)] = random.choice([True, -1, 2**32, None, 1.0, "x", [1, 2], DEEP[2], RAW[0]])
        body = Raw(pack(tokens, random if random.randrange(2) else None))
        payloads.append(pack([1, [["BlockStored", [1], None, body, random.choice([1, 16, 65536])]]]))
    agree(payloads)


def test_mutated_payloads():
    mutator = Mutator(SEED)
    seen = set()
    whole = events = 0
    for _ in range(0, MUTATIONS, 1000):
        for batch in agree([mutator.payload() for _ in range(1000)]):
            if isinstance(batch, DecodeError):
                seen.add(batch.reason)
            else:
                whole += 1
                events += len(batch.events)
                seen.update(batch.discards)
    assert whole > MUTATIONS * 0.4
    assert events > MUTATIONS
    if MUTATIONS >= 20_000:
        assert seen == {
            "bad_batch", "bad_block_size", "bad_event", "bad_extra_keys", "bad_group", "bad_hash", "bad_hashes",
            "bad_lora", "bad_msgpack", "bad_rank", "bad_text", "bad_tokens", "bad_window", "too_few_tokens",
            "unknown_event",
        }  # fmt: skip


SCALAR = (
    st.none()
    | st.booleans()
    | st.sampled_from(INTS)
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from(FLOATS)
    | st.floats()
    | st.sampled_from(TEXTS)
    | st.text(st.characters(max_codepoint=0x24F), max_size=20)
    | st.sampled_from(HASHES)
    | st.binary(max_size=70)
    | st.sampled_from(RAW)
    | st.builds(lambda kind, data: Raw(b"\xc7" + bytes([len(data), kind]) + data), st.sampled_from([0, 5, 127, 255]),
                st.binary(max_size=13))
)  # fmt: skip
ANYTHING = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=5) | st.builds(Pairs, st.lists(st.tuples(inner, inner), max_size=4)),
    max_leaves=12,
)
NAME = st.sampled_from(INTS) | st.sampled_from(HASHES[1:-6]) | st.integers(0, 2**64 - 1)
TEXT = st.sampled_from([None, "", *TEXTS[1:11]])
TOKEN = st.integers(0, 2**32 - 1) | st.sampled_from([0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, True])
KEY = st.sampled_from(["ad", "S", "", "ab" * 32, b"", b"\x01" * 32, ["img", 0], ["img", -(2**63)], ["", 2**64 - 1]])
USUAL = {
    "type": st.sampled_from(WORDS),
    "event_type": st.sampled_from(WORDS),
    "block_hashes": st.lists(NAME, max_size=4),
    "seq_hashes": st.lists(NAME, max_size=4),
    "parent_block_hash": st.none() | NAME,
    "parent_hash": st.none() | NAME,
    "base_block_idx": st.sampled_from([None, 0, 1, 2**64 - 1]),
    "token_ids": st.lists(TOKEN, max_size=40) | st.lists(st.tuples(TOKEN, TOKEN), max_size=10),
    "block_size": st.sampled_from([0, 1, 2, 4, 16, MAX_BLOCK_SIZE, MAX_BLOCK_SIZE + 1]),
    "lora_id": st.sampled_from([None, 0, 1, 2**63, 2**63 + 1]),
    "medium": TEXT,
    "lora_name": st.sampled_from([None, "", "ad"]),
    "extra_keys": st.none() | st.lists(st.none() | st.lists(KEY, max_size=4), max_size=4),
    "group_idx": st.sampled_from([None, 0, 65535, 65536]),
    "kv_cache_spec_kind": TEXT,
    "kv_cache_spec_sliding_window": st.sampled_from([None, 0, 2**31, 2**31 + 1]),
    "cache_salt": TEXT,
    "additional_salt": TEXT,
    "model_name": TEXT,
    "locality": TEXT,
}
ORDER = ["block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys",
         "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window", "locality"]  # fmt: skip


@st.composite
def an_event(draw):
    """An event of any dialect: most fields usual, some absent, some anything."""

    def value(name):
        return draw(ANYTHING if draw(st.integers(0, 19)) == 0 else USUAL[name])

    blocks, size = draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 4]))
    whole = {  # fields that fit together, or few events would be good ones
        "block_hashes": list(range(blocks)),
        "token_ids": list(range(blocks * size)),
        "block_size": size,
    }
    whole = whole if draw(st.booleans()) else {}
    match draw(st.integers(0, 4)):
        case 0:
            event = ["BlockStored", *(whole.get(name) or value(name) for name in ORDER[: draw(st.integers(4, 12))])]
        case 1:
            event = ["BlockRemoved", *(value(name) for name in ("block_hashes", "medium", "group_idx", "locality"))]
            event = event[: draw(st.integers(1, 5))]
        case 2:
            event = draw(ANYTHING | st.lists(ANYTHING, max_size=3).map(lambda rest: ["AllBlocksCleared", *rest]))
        case kind:
            tag = (
                ("type", draw(st.sampled_from(WORDS[:3])))
                if kind == 3
                else ("event_type", draw(st.sampled_from(WORDS[4:])))
            )
            names = draw(st.lists(st.sampled_from(list(USUAL)), max_size=14))
            items = [tag, *whole.items()] + [(name, value(name)) for name in names]
            event = Pairs(draw(st.permutations(items)))
    return draw(st.sampled_from([event, event, event, Raw(pack(pack(event)))]))


@st.composite
def a_payload(draw):
    events = draw(st.lists(an_event(), max_size=4))
    ts = draw(st.sampled_from([1.5, 1763932000500]) | st.sampled_from(INTS) | st.sampled_from(FLOATS) | SCALAR)
    rank = draw(st.none() | st.integers(0, MAX_RANK + 1) | SCALAR)
    batch = draw(
        st.sampled_from([
            [ts, events], [ts, events, rank], [ts, events, rank, None],
            {"ts": ts, "events": events}, {"more": ts, "data_parallel_rank": rank, "events": events, "ts": ts},
        ])
    )  # fmt: skip
    return pack(batch, Random(draw(st.integers(0, 9))))


@settings(
    max_examples=max(250, MUTATIONS // 200),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(a_payload())
def test_batches_of_any_dialect(body):
    agree([body])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_an_index_takes_both_for_the_same(path):
    payloads = [bytes.fromhex(line["payload"]) for line in read_capture(path) if line["kind"] == "message"]
    one, other = open_native(), open_native()
    for ours, theirs in zip(decode_batches(payloads), decode_batches(payloads, one), strict=True):
        one.apply(POD, theirs.events)
        other.apply(POD, ours.events)
    assert told(one) == told(other)
    assert one.stats()["held"]


def test_payloads_of_any_kind_of_buffer():
    body = payload(*EVENTS)
    around = memoryview(b"\xcf" * 9 + body + b"\xc0" * 600)
    agree([body, bytearray(body), memoryview(body), around[9 : 9 + len(body)]])
    with pytest.raises(BufferError):
        decode_batches([around[::2]], open_native())


PANIC = """
from indexer import Source, open_index
from indexer import _native
from kvevents import decode_batches
prompt = _native.Prompt([1, 2, 3], "m")
try:
    _native.block_keys(prompt, 0)  # its caller checks this, so here it panics, with the interpreter lock released
except BaseException as error:
    print(type(error).__name__, error)
index = open_index("memory://?impl=native")
index.register(Source("pod"), model="m")
print(len(prompt.keys(1, 3)), len(index.sources()), decode_batches([b"\\xc1"], index))
"""


def test_a_panic_is_an_exception_and_all_goes_on():
    done = subprocess.run([sys.executable, "-c", PANIC], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "PanicException attempt to divide by zero"
    assert second.startswith("3 1 [DecodeError(")
    assert "panicked at" in done.stderr


def test_panics_unwind_in_every_profile():
    # an abort would end the process; pyo3 makes an exception only of what unwinds
    profiles = tomllib.loads(CRATE.read_text())["profile"]
    assert "release" in profiles
    assert {profile.get("panic", "unwind") for profile in profiles.values()} == {"unwind"}
