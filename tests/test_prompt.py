"""Prompts that are kept and grow: always the keys and answers of one that was made from all their tokens at once."""

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import Prompt
from scorer import InvalidRequest, PrefixScorer

from .conftest import IMPLEMENTATIONS, MODEL, POD, hashing_of, slow_keys, stored

FORMS = [
    list,
    tuple,
    lambda tokens: array("I", tokens),
    lambda tokens: np.array(tokens, dtype=np.uint32),
    lambda tokens: np.array(tokens, dtype=np.int64),
    lambda tokens: array("I", tokens).tobytes(),
    lambda tokens: memoryview(b"0" + array("I", tokens).tobytes())[1:],
]
SIZES = st.sampled_from([1, 2, 3, 16])
TURNS = st.lists(
    st.tuples(
        st.integers(0, 40), st.sampled_from(FORMS), st.lists(st.tuples(SIZES, st.integers(0, 80), st.booleans()))
    ),
    min_size=1,
)
IMAGES = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.integers(0, 50)), max_size=2, unique=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(
    turns=TURNS,
    images=IMAGES,
    lora=st.sampled_from([None, "ad", 3]),
    salt=st.sampled_from([None, "", "s"]),
)
@settings(max_examples=200, deadline=None)
def test_a_growing_conversation_has_the_keys_of_all_its_tokens(impl, turns, images, lora, salt):
    images = sorted(images, key=lambda image: (image[1], image[0]))
    prompt, said = None, []
    for count, form, looks in turns:
        more = [(7 * n) ** 5 % 2**32 for n in range(len(said), len(said) + count)]
        said += more
        if prompt is None:
            prompt = hashing_of(impl).Prompt(form(more), MODEL, lora_name=lora, cache_salt=salt, mm_items=images)
        else:
            prompt.extend(form(more))
        assert (prompt.length, prompt.model, prompt.images) == (len(said), MODEL, tuple(images))
        for size, upto, bare in looks:
            expected = slow_keys(said, MODEL, size, lora, salt or None, images, bare=bare)
            found = prompt.keys(size, upto, bare=bare)
            assert found == expected[: len(found)]
            assert len(found) >= min(upto, len(expected))
            if upto % 3 == 0:
                assert prompt.prepare(size) == len(expected)
                assert prompt.keys(size, upto) == slow_keys(said, MODEL, size, lora, salt or None, images)


def test_a_buffer_is_read_in_place_until_the_prompt_grows(hashing):
    tokens = array("I", range(8))
    prompt = hashing.Prompt(tokens, MODEL)
    with pytest.raises(BufferError):
        tokens.append(1)
    prompt.extend(tokens)
    tokens.append(1)
    assert prompt.keys(4, 9) == slow_keys([*range(8), *range(8)], MODEL, 4)


def test_what_grows_by_itself_or_by_nothing(hashing):
    prompt = hashing.Prompt([], MODEL)
    prompt.extend([])
    assert (prompt.length, prompt.keys(4, 9), prompt.prepare(4)) == (0, [], 0)
    prompt.extend(range(6))
    prompt.prepare(4)
    prompt.extend(b"")
    prompt.extend(array("I"))
    assert prompt.keys(4, 9) == slow_keys(range(6), MODEL, 4)


def test_a_kept_prompt_is_answered_as_its_tokens_are(index, hashing):
    index.apply(POD, [stored(range(1, 101), range(400)), stored([500, 501], range(32), size=16, medium="cpu")])
    kept, said = hashing.Prompt([], MODEL), []
    for first in range(0, 480, 37):
        more = list(range(first, first + 37))
        kept.extend(more)
        said += more
        for size in (None, 4, 16, 5):
            asked = {"block_size": size}
            assert index.match(kept, **asked) == index.match(hashing.Prompt(said, MODEL), **asked)
    (holding,) = index.match(kept)
    assert holding.tokens == 400


@pytest.mark.parametrize(
    ("about", "score"),
    [({}, 2.0), ({"lora_name": "ad"}, 1.0), ({"cache_salt": "s"}, 0.8), ({"mm_items": [("a", 5, 9)]}, 1.0)],
)
def test_the_scorer_takes_a_kept_prompt(index, about, score):
    scorer, kept, said = PrefixScorer(index), Prompt([], MODEL, **about), []
    index.apply(POD, [stored([1, 2], range(8)), stored([3], range(4), medium="cpu")])
    index.apply(POD, [stored([4], range(4), lora="ad"), stored([5], range(4), cache_salt="s", medium="cpu")])
    for turn in ([0, 1, 2], [3], [4, 5, 6, 7, 8, 9]):
        kept.extend(turn)
        said += turn
        matches = scorer.match(said, model=MODEL, **about)
        scores = scorer.score(said, model=MODEL, **about)
        assert scorer.match(kept) == scorer.match(kept, model=MODEL) == matches
        assert scorer.score(kept) == scorer.score(kept, model=MODEL, pods=[POD.pod]) == scores
        assert scorer.score(kept, pods=["nobody"]) == {}
    assert scores == {POD.pod: score}


@pytest.mark.parametrize(
    "more", [{"model": "other"}, {"lora_name": "ad"}, {"cache_salt": "s"}, {"mm_items": [("a", 0, 1)]}]
)
def test_what_a_prompt_says_itself_cannot_be_said_again(index, more):
    scorer = PrefixScorer(index)
    for ask in (scorer.match, scorer.score):
        with pytest.raises(InvalidRequest, match="prompt"):
            ask(Prompt([1], MODEL), **more)
        with pytest.raises(InvalidRequest, match="model"):
            ask([1])


def test_only_those_that_hold_something_where_that_is_asked(index):
    for pod in "bcd":
        index.register((other := POD._replace(pod=pod)), model=MODEL)
        index.apply(other, [stored([1], [*range(3), ord(pod) % 2])])
    index.apply(POD, [stored([1], [9, 9, 9, 9])])
    prompt = Prompt([0, 1, 2, 1, 5], MODEL)
    everyone = sorted(index.match(prompt), key=lambda holding: holding.source)
    assert [holding.tokens for holding in everyone] == [0, 4, 0, 0]
    assert index.match(prompt, holders_only=True) == [everyone[1]]
    assert index.match(prompt, holders_only=True, pods=["b", "d"]) == []
    assert index.match(prompt, holders_only=True, block_size=5) == []
    assert index.match(prompt, pods=["c", "b"]) == everyone[:2]
