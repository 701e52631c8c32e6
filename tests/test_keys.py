"""Block keys: the joint between what is written and what is asked."""

import json
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer import InvalidQuestion

from .conftest import IMPLEMENTATIONS, hashing_of, slow_keys

MODEL = "m"
BYTES = np.arange(100, dtype=np.uint32).tobytes()


FORMS = {
    "list": list(range(100)),
    "tuple": tuple(range(100)),
    "range": range(100),
    "list of uint32": list(np.arange(100, dtype=np.uint32)),
    "array I": array("I", range(100)),
    "array B": array("B", range(100)),
    "array b": array("b", range(100)),
    "array H": array("H", range(100)),
    "array L": array("L", range(100)),
    "array q": array("q", range(100)),
    "memoryview": memoryview(array("I", range(100))),
    "memoryview, read only": memoryview(array("I", range(100))).toreadonly(),
    "memoryview of bytes": memoryview(BYTES),
    "bytes": BYTES,
    "bytearray": bytearray(BYTES),
    "unaligned memoryview": memoryview(b"0" + BYTES)[1:],
    "uint32": np.arange(100, dtype=np.uint32),
    "uint32, a part": np.arange(-1, 101).astype(np.uint32)[1:101],
    "uint8": np.arange(100, dtype=np.uint8),
    "int8": np.arange(100, dtype=np.int8),
    "uint16": np.arange(100, dtype=np.uint16),
    "int32": np.arange(100, dtype=np.int32),
    "int64": np.arange(100, dtype=np.int64),
    "little-endian": np.arange(100, dtype="<u4"),
    "big-endian": np.arange(100, dtype=">u4"),
    "unaligned uint32": np.frombuffer(b"0" + BYTES, np.uint32, offset=1),
}


@pytest.mark.parametrize("lora", [None, "ad", "", 3, 0, -1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("salt", [None, "ad", ""])
@pytest.mark.parametrize("images", [(), (("a", 3, 9), ("b", 14, 2))])
def test_keys_are_as_defined(hashing, lora, salt, images):
    tokens = [2**32 - 1 - 7 * i for i in range(43)]
    # events have no empty names: asked for one, nothing would ever be found
    expected = slow_keys(tokens, MODEL, 4, None if lora == "" else lora, salt or None, images)
    assert len(expected) == 10
    more = {"lora_name": lora, "cache_salt": salt, "mm_items": images}
    assert hashing.block_keys(tokens, MODEL, block_size=4, **more) == expected
    prompt = hashing.Prompt(tokens, MODEL, **more)
    assert prompt.keys(4, 3)[:3] == expected[:3]
    assert prompt.keys(4, 100) == expected


@pytest.mark.parametrize("model", ["", "m" * 40, "Qwen/Qwen3-8B", "模型", "m" * 70_000])
def test_every_name_of_a_model_is_hashed_alike(hashing, model):
    assert hashing.block_keys(range(8), model, block_size=4) == slow_keys(range(8), model, 4)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 60, 61, 128, 256, 1000, 65_536])
def test_blocks_of_every_size_are_hashed_alike(hashing, size):
    tokens = array("I", range(2500))
    images = ("a", 0, 1), ("b", 255, 2), ("c", 255, 300), ("d", 70_000, 5)
    assert hashing.block_keys(tokens, MODEL, block_size=size) == slow_keys(tokens, MODEL, size)
    assert hashing.block_keys(tokens, MODEL, block_size=size, mm_items=images) == slow_keys(
        tokens, MODEL, size, images=images
    )


@pytest.mark.parametrize("tokens", FORMS.values(), ids=FORMS)
def test_every_form_of_token_ids_gives_the_same_keys(hashing, tokens):
    assert hashing.block_keys(tokens, MODEL) == slow_keys(range(100), MODEL, 16)
    assert hashing.Prompt(tokens, MODEL).length == 100


def test_no_tokens_no_keys(hashing):
    for none in ([], array("I"), b"", np.array([], dtype=np.uint32), [1] * 15):
        assert hashing.block_keys(none, MODEL) == []


@pytest.mark.parametrize(
    "bad",
    [[-1], [2**32], ["1"], [1.5], [None], b"123", np.zeros((2, 2), np.uint32), np.uint32(7), 5, None, "abc",
     np.arange(8, dtype=np.uint32)[::2], np.arange(8)[::-1], memoryview(bytes(32))[::2], array("d", [1.0]),
     array("q", [2**40]), np.array([1, -1], dtype=np.int32), np.array([2.0])],
)  # fmt: skip
def test_what_is_no_token_id_is_refused(hashing, bad):
    with pytest.raises((InvalidQuestion, TypeError), match=r"token_ids|iterable"):
        hashing.block_keys(bad, MODEL)
    prompt = hashing.Prompt([1, 2], MODEL)
    with pytest.raises((InvalidQuestion, TypeError), match=r"token_ids|iterable"):
        prompt.extend(bad)
    assert prompt.keys(1, 9) == slow_keys([1, 2], MODEL, 1)


@pytest.mark.parametrize("bad", [("a", -1, 2), ("a", 1), (1, 1, 1), "abc", ("a", 1.0, 1), (b"a", 1, 1), None])
def test_what_is_no_image_is_refused(hashing, bad):
    with pytest.raises(InvalidQuestion, match="mm_items"):
        hashing.Prompt([1], MODEL, mm_items=[bad])


def test_images_may_be_lists(hashing):
    prompt = hashing.Prompt(range(8), MODEL, mm_items=[["a", 1, 2]])
    assert prompt.keys(4, 2) == slow_keys(range(8), MODEL, 4, images=[("a", 1, 2)])


@pytest.mark.parametrize("size", [0, -1, -(2**40)])
def test_what_is_no_block_size_is_refused(hashing, size):
    with pytest.raises(InvalidQuestion, match=f"block_size.*{size}"):
        hashing.block_keys([1], MODEL, block_size=size)
    with pytest.raises(InvalidQuestion, match=f"block_size.*{size}"):
        hashing.Prompt([1], MODEL).prepare(size)


@pytest.mark.parametrize("size", [2**31, 2**32, 2**40])
def test_blocks_longer_than_any_prompt_have_no_keys(hashing, size):
    prompt = hashing.Prompt([1] * 20, MODEL)
    assert prompt.prepare(size) == 0
    assert prompt.keys(size, 10) == hashing.block_keys([1] * 20, MODEL, block_size=size) == []


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(
    text=st.one_of(
        st.lists(st.integers(0, 2**32 - 1)).map(json.dumps),
        st.lists(st.integers(-3, 2**33) | st.floats() | st.none() | st.text(max_size=2)).map(json.dumps),
        st.text(alphabet='[]0123456789, .-e\n"', max_size=12),
    )
)
def test_token_ids_of_json_are_those_of_a_json_reader(impl, text):
    try:
        ids = json.loads(text)
    except ValueError:
        ids = None
    are_ids = isinstance(ids, list) and all(type(i) in (int, float) and 0 <= i < 2**32 and i == int(i) for i in ids)
    read = hashing_of(impl).token_ids_of_json
    if are_ids:
        assert bytes(read(text.encode())) == array("I", map(int, ids)).tobytes()
    else:
        with pytest.raises(InvalidQuestion, match="token_ids"):
            read(text.encode())
