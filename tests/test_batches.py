"""Payloads decoded all at once, in the form of each index, against `decode_batch` one by one."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import open_index
from kvevents import DecodeError, decode_batch, decode_batches

from .conftest import GOLDEN, IMPLEMENTATIONS, MODEL, POD, payload, read_capture
from .test_wire import ANYTHING

TOKENS = list(range(8))
STORED = {
    "type": "BlockStored",
    "block_hashes": [1, 2],
    "parent_block_hash": None,
    "token_ids": TOKENS,
    "block_size": 4,
}
BROKEN = [b"", b"\xc1", b"\x93", msgspec.msgpack.encode(7), msgspec.msgpack.encode([1.0]), msgspec.msgpack.encode({}),
          msgspec.msgpack.encode([None, []]), msgspec.msgpack.encode([1.0, {}]), msgspec.msgpack.encode([True, []]),
          msgspec.msgpack.encode([1.0, [], -1]), msgspec.msgpack.encode([1.0, [], "0"]), payload(rank=65_536),
          msgspec.msgpack.encode([1.0, [1] * 65_537]), payload() + b"x", b"\x91" * 5000]  # fmt: skip
WHOLE = [
    payload(),
    payload(rank=None),
    payload(STORED, ["AllBlocksCleared"], rank=65_535),
    payload(["BlockStored", [2**64 - 1, -1, 7], None, TOKENS[:6], 2, 3], ["BlockRemoved", [-1]]),
    payload(STORED | {"model_name": "x"}, STORED | {"model_name": "y"}),
    payload(7, None, [], ["Unknown", 1], {}, {"type": 3}, b"\xc1", ["BlockStored"], STORED | {"token_ids": [-1] * 8}),
    msgspec.msgpack.encode({"ts": 1_700_000_000_123, "events": [STORED], "data_parallel_rank": 3, "more": [None]}),
]
GOOD = {
    "block_hashes": [[1], [1, 2], [2**64 - 1], [-1], [b"x" * 32], [b""], [b"y" * 65], [], ["1"], 5, [1, b"a"], [2**63]],
    "parent_block_hash": [None, 0, 1, -1, b"x" * 32, "1"],
    "token_ids": [TOKENS, TOKENS[:4], TOKENS[:5], [], None, [-1], [2**32], [2**32 - 1] * 4, [[1, 2]] * 4, [[1]], "ab"],
    "block_size": [4, 4, 2, 0, None, 65_536, 65_537, -1, 4.0, True],
    "medium": [None, "GPU", "cpu", "", "x" * 1024, "x" * 1025, "Ärger", 5],
    "lora_id": [None, 3, 0, 2**63, -1, "3"],
    "lora_name": [None, "ad", "", 5],
    "cache_salt": [None, "s", 5],
    "extra_keys": [None, [], [None], [["s"]], [[["img", 3]], None], [["ad", "s"], ["img"]], [[b"d"]], [[3]], "x", [[]]],
    "group_idx": [None, 0, 65_535, 65_536, -1, "0"],
    "kv_cache_spec_kind": [None, "full_attention", "sliding_window", "mamba", 5],
    "kv_cache_spec_sliding_window": [None, 0, 4, 2**31, 2**31 + 1, -1],
    "model_name": [None, "x", 5],
    "seq_hashes": [[1]],
}
MAPS = st.fixed_dictionaries(
    {"type": st.sampled_from(["BlockStored"] * 4 + ["BlockRemoved", "AllBlocksCleared", "Other"])},
    optional={name: st.sampled_from(values) for name, values in GOOD.items()},
)
FIELDS = [*list(GOOD)[:4], "lora_id", "medium", "lora_name", "extra_keys", "group_idx"]
ARRAYS = st.builds(
    lambda head, tail: ["BlockStored", *head, *tail],
    st.tuples(*[st.sampled_from(GOOD[name]) for name in FIELDS[:4]]),
    st.one_of([st.tuples(*[st.sampled_from(GOOD[name]) for name in FIELDS[4:end]]) for end in range(4, 10)]),
)
EVENTS = MAPS | ARRAYS | st.builds(msgspec.msgpack.encode, ARRAYS) | ANYTHING
PAYLOADS = st.lists(
    st.builds(lambda events: payload(*events), st.lists(EVENTS, max_size=4))
    | st.sampled_from(WHOLE + BROKEN)
    | st.builds(msgspec.msgpack.encode, ANYTHING)
    | st.binary(max_size=50),
    max_size=6,
)


def one_by_one(payloads):
    for body in payloads:
        try:
            yield decode_batch(body)
        except DecodeError as error:
            yield error


def outline(batch):
    """All that can be said of a batch whatever form its events have."""
    if isinstance(batch, DecodeError):
        return batch.reason
    return batch.ts, batch.rank, len(batch.events), dict(batch.discards), batch.clears, batch.model


def left_by(index, payloads):
    """What an index holds after all these."""
    index.register(POD, model=MODEL)
    for batch in decode_batches(payloads, index):
        if not isinstance(batch, DecodeError):
            index.apply(POD, batch.events)
    (status,) = index.sources()
    return index.stats() | {"bytes": 0}, status.tiers, status.block_sizes, status.degraded


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(payloads=PAYLOADS)
@settings(max_examples=300, deadline=None)
def test_many_at_once_are_what_they_are_one_by_one(impl, payloads):
    index, python = open_index(f"memory://?impl={impl}"), open_index("memory://?impl=python")
    found = decode_batches(payloads, index)
    assert [outline(batch) for batch in found] == [outline(batch) for batch in one_by_one(payloads)]
    assert left_by(index, payloads) == left_by(python, payloads)


@pytest.mark.parametrize("wrap", [bytes, memoryview, bytearray, lambda body: memoryview(b"x" + body)[1:]])
def test_broken_and_whole_payloads_side_by_side(impl, wrap):
    payloads = [body for pair in zip(BROKEN, WHOLE * 3, strict=False) for body in pair]
    index = open_index(f"memory://?impl={impl}")
    found = decode_batches([wrap(body) for body in payloads], index)
    assert [outline(batch) for batch in found] == [outline(batch) for batch in one_by_one(payloads)]
    reasons = [batch.reason for batch in found if isinstance(batch, DecodeError)]
    assert {*reasons} == {"bad_msgpack", "bad_batch", "bad_rank", "too_many_events"}
    for batch in found:
        assert not isinstance(batch, DecodeError) or str(batch).startswith(f"{batch.reason}: ")


def test_captures_of_the_engine(index):
    for path in GOLDEN:
        payloads = [bytes.fromhex(line["payload"]) for line in read_capture(path) if line["kind"] == "message"]
        found = decode_batches(payloads, index)
        assert [outline(batch) for batch in found] == [outline(decode_batch(body)) for body in payloads]
        index.apply_all(POD, [batch.events for batch in found])
        index.restart(POD)


def test_nothing_is_nothing(index):
    assert decode_batches([], index) == decode_batches([]) == []
    index.apply_all(POD, [])
    index.apply(POD, [])
    assert index.stats()["stored_total"] == 0
