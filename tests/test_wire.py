"""Every dialect of WIRE, and every kind of bad input."""

import contextlib
from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer import AllBlocksCleared, BlockRemoved, BlockStored
from kvevents import DecodeError, decode_batch, parse_topic
from kvevents.wire import batch_time

from .conftest import payload

TOKENS = list(range(8))
FULL_ARRAY = [
    "BlockStored", [1, 2], None, TOKENS, 4, None, "GPU", None, None, 0, "sliding_window", 16, "more", {"to": "come"},
]  # fmt: skip


def one(event):
    batch = decode_batch(payload(event))
    assert not batch.discards
    return batch.events[0]


@pytest.mark.parametrize("fields", range(6, 15))
def test_tagged_arrays_of_every_length(fields):
    event = one(FULL_ARRAY[:fields])
    assert event.block_hashes == [1, 2]
    assert event.token_ids == array("I", TOKENS)
    assert event.medium == "gpu"
    assert event.group_idx == (0 if fields > 9 else None)
    assert event.sliding_window == (16 if fields > 11 else None)


def test_vllm_0_9_arrays_without_medium_and_rank():
    batch = decode_batch(
        msgspec.msgpack.encode([1.5, [["BlockStored", [1], None, [1, 2, 3, 4], 4, 7], ["BlockRemoved", [1]]]])
    )
    assert batch.rank is None
    assert batch.events[0].lora == 7
    assert batch.events[1] == BlockRemoved(block_hashes=[1])


def test_tagged_maps_and_map_batches():
    event = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": 9, "token_ids": [1, 2], "block_size": 2,
             "lora_id": 3, "lora_name": "ad", "medium": "CPU", "unknown": [1]}  # fmt: skip
    batch = decode_batch(
        msgspec.msgpack.encode({"ts": 1.0, "events": [event, {"type": "AllBlocksCleared"}], "more": 1})
    )
    stored, cleared = batch.events
    assert (stored.parent_block_hash, stored.lora, stored.medium) == (9, "ad", "cpu")
    assert cleared == AllBlocksCleared()


def test_events_packed_as_bytes():
    packed = msgspec.msgpack.encode(["BlockStored", [1], 0, [], 0, None, "SHARED_STORAGE"])
    event = one(packed)
    assert event.medium == "shared_storage"
    assert not event.token_ids
    assert event.block_size == 0


def test_rfc_maps_with_milliseconds():
    event = {"event_id": 1, "event_type": "stored", "seq_hashes": [5], "block_hashes": None, "medium": "cpu",
             "parent_hash": None, "token_ids": None, "block_size": None, "model_name": "m"}  # fmt: skip
    batch = decode_batch(msgspec.msgpack.encode([1763932000500, [event, {"event_type": "removed", "seq_hashes": [5]},
                                                                 {"event_type": "cleared"}], 0]))  # fmt: skip
    assert batch.ts == 1763932000.5
    assert [type(e) for e in batch.events] == [BlockStored, BlockRemoved, AllBlocksCleared]
    assert batch.events[0].model == "m"


@pytest.mark.parametrize(
    ("said", "parent"),
    [
        ({"parent_hash": 7}, 7),
        ({"parent_block_hash": None, "parent_hash": 7}, 7),
        ({"parent_block_hash": 6, "parent_hash": 7}, 6),
        ({"parent_hash": None, "base_block_idx": 0}, None),
        ({"parent_hash": None, "base_block_idx": None}, None),
        ({"parent_hash": None, "base_block_idx": 3}, 0),
        ({"parent_hash": 7, "base_block_idx": 3}, 7),
    ],
)
def test_blocks_that_do_not_begin_a_prompt_are_no_root(said, parent):
    event = {"event_type": "stored", "seq_hashes": [5], "token_ids": [1, 2], "block_size": 2, "cache_salt": "s", **said}
    stored = one(event)
    assert (stored.parent_block_hash, stored.cache_salt) == (parent, "s" if parent is None else None)


def test_signed_and_unsigned_hashes_are_the_same_and_bytes_stay_bytes():
    assert one(["BlockRemoved", [-1]]) == one(["BlockRemoved", [2**64 - 1]])
    assert one(["BlockRemoved", [b"\x01" * 32]]).block_hashes == [b"\x01" * 32]


def test_eagle_pairs_give_their_first_tokens():
    event = one(["BlockStored", [1], None, [[1, 2], [2, 3]], 2, None])
    assert event.token_ids == array("I", [1, 2])


def test_salt_adapter_and_images_in_extra_keys():
    keys = [["ad", ["img", 2], "ad"], ["ad", ["img", -2]]]
    event = one({"type": "BlockStored", "block_hashes": [1, 2], "token_ids": TOKENS, "block_size": 4,
                 "lora_name": "ad", "extra_keys": keys})  # fmt: skip
    assert event.cache_salt == "ad"
    assert event.extras == [msgspec.msgpack.encode([["img", 2]]), msgspec.msgpack.encode([["img", -2]])]
    assert not event.bare_images


def test_bare_images_of_vllm_0_18():
    digest = "ab" * 32
    event = one(["BlockStored", [1, 2], None, TOKENS, 4, None, "GPU", None, [[digest, "salt"], [digest]]])
    assert event.bare_images
    assert event.cache_salt == "salt"
    assert event.extras == [msgspec.msgpack.encode([digest])] * 2


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (5, "bad_event"),
        ([], "bad_event"),
        ([5], "bad_event"),
        ({}, "bad_event"),
        (["Never"], "unknown_event"),
        ({"event_type": "never"}, "unknown_event"),
        (b"\xc1", "bad_msgpack"),
        (b"\xa1\x80", "bad_msgpack"),
        (["BlockRemoved", ["text"]], "bad_hash"),
        (["BlockRemoved", [1.5]], "bad_hash"),
        (["BlockRemoved", [True]], "bad_hash"),
        (["BlockRemoved", [b""]], "bad_hash"),
        (["BlockRemoved", [b"x" * 65]], "bad_hash"),
        (["BlockRemoved", None], "bad_hashes"),
        (["BlockRemoved", [1], 5], "bad_text"),
        (["BlockRemoved", [1], "x" * 1025], "bad_text"),
        (["BlockRemoved", [1], None, -1], "bad_group"),
        (["BlockStored", [1], None, [-1, 2], 2, None], "bad_tokens"),
        (["BlockStored", [1], None, [1, 2**32], 2, None], "bad_tokens"),
        (["BlockStored", [1], None, [1, "2"], 2, None], "bad_tokens"),
        (["BlockStored", [1], None, "12", 2, None], "bad_tokens"),
        (["BlockStored", [1], None, [[1, 2], 3], 2, None], "bad_tokens"),
        (["BlockStored", [1], None, [1, 2], 0, None], "bad_block_size"),
        (["BlockStored", [1], None, [1, 2], -2, None], "bad_block_size"),
        (["BlockStored", [1], None, [1, 2], 2**20, None], "bad_block_size"),
        (["BlockStored", [1, 2, 3], None, [1, 2], 2, None], "too_few_tokens"),
        (["BlockStored", [1], None, [1, 2], 2, None, "GPU", None, ["x", "y"]], "bad_extra_keys"),
        (["BlockStored", [1], None, [1, 2], 2, None, "GPU", None, [[5.5]]], "bad_extra_keys"),
    ],
)
def test_a_bad_event_costs_that_event_alone(bad, reason):
    batch = decode_batch(payload(["BlockRemoved", [1]], bad, ["BlockRemoved", [2]]))
    assert batch.discards == {reason: 1}
    assert [event.block_hashes for event in batch.events] == [[1], [2]]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "bad_msgpack"),
        (b"\xdd\xff\xff\xff\xff", "bad_msgpack"),
        (b"\x91" * 5000 + b"\x01", "bad_msgpack"),
        (b"\x01", "bad_batch"),
        (msgspec.msgpack.encode([1.0]), "bad_batch"),
        (msgspec.msgpack.encode([None, []]), "bad_batch"),
        (msgspec.msgpack.encode([1.0, {}]), "bad_batch"),
        (msgspec.msgpack.encode([1.0, [], -1]), "bad_rank"),
        (msgspec.msgpack.encode([1.0, [], "0"]), "bad_rank"),
        (msgspec.msgpack.encode([1.0, [1] * 65_537]), "too_many_events"),
    ],
)
def test_a_broken_batch_is_refused_with_its_reason(body, reason):
    with pytest.raises(DecodeError) as caught:
        decode_batch(body)
    assert caught.value.reason == reason


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(0, 9), inner),
    max_leaves=20,
)
FIELDS = st.sampled_from(
    ["type", "event_type", "block_hashes", "token_ids", "block_size", "extra_keys", "medium", "group_idx", "lora_id"]
)
TAGS = st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared"])


@given(
    st.lists(
        ANYTHING
        | st.builds(lambda tag, rest: [tag, *rest], TAGS, st.lists(ANYTHING, max_size=12))
        | st.builds(lambda tag, rest: {**rest, "type": tag}, TAGS, st.dictionaries(FIELDS, ANYTHING))
    )
)
def test_any_event_is_decoded_or_counted(events):
    batch = decode_batch(payload(*events))
    assert len(batch.events) + batch.discards.total() == len(events)


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(body):
    with contextlib.suppress(DecodeError):  # anything else fails the test
        decode_batch(body)


@pytest.mark.parametrize(
    ("topic", "pod", "model"),
    [
        (b"kv@10.0.0.7:8000@Qwen/Qwen3-8B", "10.0.0.7:8000", "Qwen/Qwen3-8B"),
        (b"kv@pod@a@b", "pod", "a@b"),
        (b"kv-events", "kv-events", ""),
        (b"", "", ""),
        (b"\xff@x@y", "x", "y"),
    ],
)
def test_topics(topic, pod, model):
    assert parse_topic(topic) == (pod, model)


@pytest.mark.parametrize(
    ("batch", "ts"),
    [
        ([12.5, [], 0], 12.5),
        ([12.5, []], 12.5),
        ([1_763_932_000_500, [], 0], None),  # milliseconds as an int: decoding tells
        ([float("nan"), [], 0], None),
        ({"ts": 12.5, "events": []}, None),
        ([], None),
        (None, None),
    ],
)
def test_the_time_of_a_batch_is_read_without_decoding_it(batch, ts):
    assert batch_time(msgspec.msgpack.encode(batch)) == ts
    assert batch_time(memoryview(msgspec.msgpack.encode(batch))) == ts
    assert batch_time(msgspec.msgpack.encode(batch)[:9]) is None
