"""Payloads drawn at random: most of what they say is usual, some of it anything."""

from random import Random

from hypothesis import strategies as st

from kvevents.wire import MAX_BLOCK_SIZE, MAX_RANK

from .payloads import FLOATS, HASHES, INTS, RAW, TEXTS, WORDS, Pairs, Raw, pack

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
