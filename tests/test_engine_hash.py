"""The engine's hashes, computed again: against hashes that vLLM itself made."""

import hashlib
from array import array

import msgspec
import pytest

from indexer import BlockStored
from kvevents import decode_batch, engine_hash, recognise_hashes
from kvevents.engine_hash import ALGORITHMS, cbor, recompute

from .conftest import GOLDEN, read_capture

HASHED = [path for path in GOLDEN if path.stem.startswith("hash_")]


def stores(path):
    lines = [line for line in read_capture(path) if line["kind"] == "message"]
    batches = [decode_batch(bytes.fromhex(line["payload"])) for line in lines]
    return [event for batch in batches for event in batch.events if isinstance(event, BlockStored)]


@pytest.mark.parametrize("path", HASHED, ids=lambda path: path.stem)
def test_the_scheme_of_a_real_engine_is_recognised(path):
    meta = read_capture(path)[0]
    found = recognise_hashes(stores(path))
    assert found.checked > 0
    if meta["hash_seed"] is None:  # the engine's own default, which is not known
        assert (found.matched, found.algorithm) == (0, "")
    else:
        assert (found.algorithm, found.seed) == (meta["hash_algo"], meta["hash_seed"])
        assert found.matched == found.checked
        assert recognise_hashes(stores(path), ["41"]).matched == 0


def test_a_block_size_that_the_hashes_contradict_is_named():
    path = next(path for path in HASHED if path.stem == "hash_sha256_cbor_int")
    lying = [
        msgspec.structs.replace(event, block_size=8, block_hashes=event.block_hashes * 2)
        for event in stores(path)
        if event.parent_block_hash is None
    ]
    found = recognise_hashes(lying)
    assert (found.matched, found.block_size, found.said_block_size) == (0, 16, 8)


def test_only_so_much_is_computed_again(monkeypatch):
    hashed = []
    monkeypatch.setattr(engine_hash, "_gives", lambda _, __, event, ___: hashed.append(len(event.token_ids)) or 0)
    event = BlockStored(block_hashes=[1], parent_block_hash=None, token_ids=array("I", [0]) * 40_000, block_size=40_000)
    recognise_hashes([event] * 3, ["0"])
    assert hashed == [40_000] * len(engine_hash.ALGORITHMS)


def test_what_is_not_all_on_the_wire_is_left_alone():
    event = BlockStored(block_hashes=[1], token_ids=array("I", range(4)), block_size=4, lora="adapter")
    assert recognise_hashes([event]).checked == 0
    assert recognise_hashes([]).checked == 0


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (23, "17"),
        (24, "1818"),
        (255, "18ff"),
        (256, "190100"),
        (65_536, "1a00010000"),
        (2**32, "1b0000000100000000"),
        (b"\x01\x02", "420102"),
        ("IETF", "6449455446"),
        (None, "f6"),
        ((1, [2, 3]), "8201820203"),
    ],
)
def test_cbor_is_as_its_standard_shows_it(value, encoded):
    assert cbor(value).hex() == encoded


def test_the_chain_is_the_definition_word_for_word():
    root = hashlib.sha256(cbor("42")).digest()
    first = hashlib.sha256(cbor([root, [1, 2], None])).digest()
    assert recompute("sha256_cbor", "42", [1, 2, 3], 2) == [first]
    assert set(ALGORITHMS) == {"sha256", "sha256_cbor", "xxhash", "xxhash_cbor"}
