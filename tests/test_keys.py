"""Block keys: the joint between what is written and what is asked."""

from array import array

import msgspec
import numpy as np
import pytest
import xxhash

from indexer import InvalidQuestion, Prompt, block_keys

MODEL = "m"


def slow_keys(tokens, size, lora=None, salt=None, images=()):
    """The definition of DESIGN section 5, word for word."""
    key = xxhash.xxh3_64_intdigest(msgspec.msgpack.encode([MODEL, size, lora, salt]), 0)
    keys = []
    for start in range(0, len(tokens) - size + 1, size):
        data = b"".join(int(t).to_bytes(4, "little") for t in tokens[start : start + size])
        inside = [[n, f - start] for n, f, c in images if f < start + size and f + c > start]
        key = xxhash.xxh3_64_intdigest(data + (msgspec.msgpack.encode(inside) if inside else b""), key)
        keys.append(key)
    return keys


@pytest.mark.parametrize("lora", [None, "ad", 3])
@pytest.mark.parametrize("salt", [None, "ad"])
@pytest.mark.parametrize("images", [(), (("a", 3, 9), ("b", 14, 2))])
def test_keys_are_as_defined(lora, salt, images):
    tokens = [2**32 - 1 - 7 * i for i in range(43)]
    expected = slow_keys(tokens, 4, lora, salt, images)
    assert len(expected) == 10
    assert block_keys(tokens, MODEL, block_size=4, lora_name=lora, cache_salt=salt, mm_items=images) == expected
    prompt = Prompt(tokens, MODEL, lora_name=lora, cache_salt=salt, mm_items=images)
    assert prompt.keys(4, 3) == expected[:3]
    assert prompt.keys(4, 100) == expected


@pytest.mark.parametrize(
    "give",
    [list, tuple, lambda t: array("I", t), lambda t: np.array(t, dtype=np.uint32), np.array, lambda t: array("q", t),
     lambda t: np.array(t, dtype=np.uint32).tobytes(), lambda t: memoryview(array("I", t)), range],
)  # fmt: skip
def test_every_form_of_token_ids_gives_the_same_keys(give):
    tokens = range(100) if give is range else give(list(range(100)))
    assert block_keys(tokens, MODEL) == slow_keys(list(range(100)), 16)


def test_no_tokens_no_keys():
    assert block_keys([], MODEL) == block_keys(array("I"), MODEL) == block_keys([1] * 15, MODEL) == []


@pytest.mark.parametrize("bad", [[-1], [2**32], ["1"], [1.5], b"123", np.zeros((2, 2), np.uint32), 5])
def test_what_is_no_token_id_is_refused(bad):
    with pytest.raises((InvalidQuestion, TypeError), match=r"token_ids|iterable"):
        block_keys(bad, MODEL)


@pytest.mark.parametrize("bad", [("a", -1, 2), ("a", 1), (1, 1, 1), "abc"])
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(InvalidQuestion, match="mm_items"):
        Prompt([1], MODEL, mm_items=[bad])
