"""The prefix store: whatever it knows, the ids are those of the whole text tokenized at once."""

import gzip
import os
import threading
import tracemalloc
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from scorer import InvalidRequest
from scorer.cuts import SPLITS, Rule, rule_of
from scorer.prefix_store import PrefixStore

SHARED = Path(os.environ.get("KVINDEX_SHARED", "/work/shared")) / "data" / "tokenizers"
GPT2, LLAMA3, QWEN, QWEN35, GPT4O, DEEPSEEK = (
    next(p for p in SPLITS if p.startswith("'s")),
    next(p for p in SPLITS if p.startswith("(?i") and "{1,3}" in p),
    next(p for p in SPLITS if p.startswith("(?i") and r"\p{M}" not in p and "{1,3}" not in p),
    next(p for p in SPLITS if p.startswith("(?i") and r"\p{M}" in p),
    next(p for p in SPLITS if r"\p{Lu}" in p),
    next(p for p in SPLITS if p.startswith("[!")),
)
CORPUS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs; they'll say: \"hello, world!\"\n\nWe've 3.14 reasons.",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x.y_z / 2}\r\n\t# naïve café, Ünïcödé\n   \n",
    "今天天气很好。我们去公园吧！ 한국어 문장입니다. Привет, мир! これはテストです、はい。",  # noqa: RUF001
    '{"name":"get_user","arguments":{"user_id":"mia_li_3668","flight":"HAT001"}} <tool> </tool> foo bar',
] * 3
CHAT = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def byte_level(pattern, *, normalizer=None, added=(), prefix_space=False, ends=None, partial=()):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    else:
        splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in (*partial, pattern)]
        last = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=CHAT, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(list(added))
    if ends:
        start = tokenizer.token_to_id(CHAT[2])
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=f"{CHAT[2]} $A", special_tokens=[(CHAT[2], start)]),
            ]
        )
    return tokenizer


def word_piece(normalizer=None, added=()):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - no password
    tokenizer.normalizer = normalizer or normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    tokenizer.add_tokens(list(added))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"special_tokens": ["<unk>"], "unk_token": "<unk>", "show_progress": False}
    trainer = trainers.UnigramTrainer(vocab_size=200, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def real(path):
    data = (SHARED / path).read_bytes()
    return Tokenizer.from_str((gzip.decompress(data) if path.endswith(".gz") else data).decode())


STRIPPING = [AddedToken("<mask>", lstrip=True), AddedToken("<|end|>", rstrip=True), AddedToken("</tool>", rstrip=True)]
MADE = {
    "gpt2": lambda: byte_level(None),
    "gpt2-prefix-space": lambda: byte_level(None, prefix_space=True),
    "gpt2-split": lambda: byte_level(GPT2, ends=True),
    "llama3": lambda: byte_level(LLAMA3, ends=True, added=["<tool>", "bar.baz", AddedToken("é<x>", normalized=True)]),
    "qwen": lambda: byte_level(
        QWEN, normalizer=normalizers.NFC(), added=["<tool>", AddedToken("</tool>", special=True)]
    ),
    "qwen-stripping": lambda: byte_level(QWEN, normalizer=normalizers.NFC(), added=STRIPPING),
    "qwen3.5": lambda: byte_level(QWEN35, normalizer=normalizers.NFC()),
    "gpt4o": lambda: byte_level(GPT4O),
    "deepseek": lambda: byte_level(DEEPSEEK, partial=[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+"]),  # noqa: RUF001
    "nfkc-lower": lambda: byte_level(
        QWEN, normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "wordpiece": word_piece,
    "wordpiece-plain": lambda: word_piece(normalizers.BertNormalizer(lowercase=False), ["foo", AddedToken("a,b")]),
}
REAL = {
    "real-gpt2": "gpt2/tokenizer.json.gz",
    "real-qwen3": "qwen3/tokenizer.json.gz",
    "real-wordpiece": "llmd_test_model/tokenizer.json",
}
ASIDE = {
    "unigram": unigram,
    "unknown pattern": lambda: byte_level(r"\w+|\W+"),
    "spaces inside words": lambda: byte_level(QWEN, added=["foo bar"]),
    "asks its neighbours": lambda: byte_level(QWEN, added=[AddedToken("foo", single_word=True)]),
    "blanks behind a letter": lambda: byte_level(QWEN, added=[AddedToken("foo", rstrip=True)]),
    "replaces": lambda: byte_level(QWEN, normalizer=normalizers.Replace(" ", "_")),
    "strips": lambda: byte_level(QWEN, normalizer=normalizers.Strip()),
    "normalized to spaces": lambda: word_piece(added=[AddedToken("中", normalized=True)]),
}
CUTTING = [*MADE, *(name for name, path in REAL.items() if (SHARED / path).exists())]


@cache
def tokenizer_named(name):
    return MADE[name]() if name in MADE else ASIDE[name]() if name in ASIDE else real(REAL[name])


PIECES = st.one_of(
    st.sampled_from(
        [" ", "  ", "\n", "\r\n", "\n\n \n", "\t", "\u00a0", "\u3000", "\u2028", "\u180e", "\x1c", "\x85", "\x00"]
    ),
    st.sampled_from(
        ["a", "Hello", "naïve", "x_y", "don't", "'S", "'", "'ll", "\u017f", "İ", "K", "1", "12345", "٣", "²"]
    ),
    st.sampled_from(
        ["e\u0301", "\u0301", "\u0345\u0323", "か\u3099", "ᄒ", "ᅡ", "ᆫ", "한", "하", "\u037e", "\u2000", "\u093f"]
    ),
    st.sampled_from(
        ["👨\u200d👩\u200d👧", "🏳️\u200d🌈", "中文", "。", "\uff0c", "日本", "・", "ー", "鿿", "Привет", "\ufeff"]
    ),
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "<|im_", "|>", "<|", "<tool>", "</tool>", "<mask>", "<|end|>", "/", "//"]
    ),
    st.sampled_from(
        ["bar.baz", "bar", ".baz", "é<x>", "<x>", "a,b", "[CLS]", "[SEP]", "[", "]", ".", ",", '":"', "{", "-"]
    ),
    st.text(max_size=4),
)
TEXT = st.lists(PIECES, max_size=40).map("".join)


def truth(tokenizer, text, *, special):
    return tokenizer.encode(text, add_special_tokens=special).ids


@pytest.mark.parametrize("name", CUTTING)
@settings(deadline=None, max_examples=150)
@given(text=TEXT)
def test_every_place_to_cut_is_safe(name, text):
    tokenizer = tokenizer_named(name)
    rule = rule_of(tokenizer)
    assert isinstance(rule, Rule), rule
    whole = truth(tokenizer, text, special=False)
    for found in rule.cut.finditer(text):
        cut = found.start()
        if cut:
            parts = truth(tokenizer, text[:cut], special=False) + truth(tokenizer, text[cut:], special=False)
            assert parts == whole, (text[:cut], text[cut:])


@pytest.mark.parametrize("name", CUTTING)
@settings(deadline=None, max_examples=80)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), TEXT, st.booleans()), min_size=1, max_size=6),
    chunk=st.sampled_from([1, 5, 40]),
    size=st.sampled_from([2000, 1 << 20]),
)
def test_ids_are_those_of_the_whole_text(name, edits, chunk, size):
    tokenizer = tokenizer_named(name)
    store = PrefixStore(size, chunk=chunk)
    text = ""
    for at, length, more, special in edits:
        start = len(text) if at > 0.5 else int(at * 2 * len(text))
        text = text[:start] + more + text[start + int(length * 5) :]
        prefix = store.find_longest_prefix(text, "m", tokenizer=tokenizer)
        assert list(prefix.ids) == truth(tokenizer, text[: prefix.characters], special=False)
        got = store.encode(text, model="m", tokenizer=tokenizer, add_special_tokens=special)
        assert list(got) == truth(tokenizer, text, special=special)
        assert store.stats().bytes_held <= size
    assert store.stats().bytes_held == sum(entry.size() for entry in store._entries.values())


@pytest.mark.parametrize("name", ASIDE)
def test_what_is_not_understood_is_tokenized_whole(name):
    tokenizer = tokenizer_named(name)
    store = PrefixStore(chunk=1)
    for text in ("hello world foo bar", "hello world foo bar  foo more"):
        got = store.encode(text, model="m", tokenizer=tokenizer, add_special_tokens=True)
        assert list(got) == truth(tokenizer, text, special=True)
    assert store.stands_aside("m", tokenizer)
    assert store.stats().stood_aside == 2
    assert store.stats().bytes_held == 0
    assert store.find_longest_prefix("hello world", "m", tokenizer=tokenizer).characters == 0


def test_settings_that_differ_for_parts_are_seen_each_time():
    tokenizer = MADE["qwen"]()
    store = PrefixStore(chunk=1)
    text = "one two three <|im_start|>four five six"

    def same():
        got = store.encode(text, model="m", tokenizer=tokenizer, add_special_tokens=True)
        assert list(got) == truth(tokenizer, text, special=True)

    same()
    tokenizer.enable_truncation(3)
    same()
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=100)
    same()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    same()
    assert store.stats().stood_aside == 3


def test_a_dialogue_is_tokenized_once():
    tokenizer = tokenizer_named("qwen")
    store = PrefixStore(chunk=64)
    text, before = "", 0
    for turn in range(20):
        text += f"<|im_start|>user\n{CORPUS[turn % 4]} Turn {turn}, and so on.<|im_end|>\n"
        got = store.encode(text, model="m", tokenizer=tokenizer, add_special_tokens=False)
        assert list(got) == truth(tokenizer, text, special=False)
        spent = store.stats().characters_tokenized - before
        before += spent
        assert spent < 500
    assert store.stats().hits == 19


def test_models_are_never_mixed():
    one, two = tokenizer_named("gpt2"), tokenizer_named("wordpiece")
    store = PrefixStore(chunk=8)
    text = " ".join(CORPUS)
    for _ in range(2):
        for model, tokenizer in (("a", one), ("b", two), ("a", two)):
            got = store.encode(text, model=model, tokenizer=tokenizer, add_special_tokens=False)
            assert list(got) == truth(tokenizer, text, special=False)
    assert store.stats().misses == 3
    assert store.stats().hits == 3
    assert store.find_longest_prefix(text, "b", tokenizer=one).characters == 0


def test_a_hash_that_collides_gives_nobody_elses_ids(monkeypatch):
    monkeypatch.setattr("scorer.prefix_store.xxhash.xxh3_64_intdigest", lambda part, seed: len(part))
    tokenizer = tokenizer_named("gpt2")
    store = PrefixStore(chunk=4)
    for text in (
        "alpha beta gamma delta",
        "omega zeta1 gamma delta",
        "alpha beta gamma delta",
        "alphb beta gamma delta",
    ):
        got = store.encode(text, model="m", tokenizer=tokenizer, add_special_tokens=False)
        assert list(got) == truth(tokenizer, text, special=False)


def test_special_tokens_come_with_a_known_prefix():
    tokenizer = tokenizer_named("wordpiece")
    store = PrefixStore(chunk=4)
    text = "the quick brown fox jumps"
    store.encode(text, model="m", tokenizer=tokenizer, add_special_tokens=True)
    prefix = store.find_longest_prefix(text, "m", tokenizer=tokenizer, add_special_tokens=True)
    assert 0 < prefix.characters < len(text)
    assert list(prefix.ids) == truth(tokenizer, text[: prefix.characters], special=True)[:-1]


def test_digests_are_made_in_the_background_and_bounded():
    tokenizer = tokenizer_named("gpt2")
    text = " ".join(CORPUS)
    with PrefixStore(chunk=16, max_digests=2, max_digest_characters=2 * len(text)) as store:
        with store._rules_lock:  # the thread stops at the tokenizer's rules
            assert store.digest(text, "m", tokenizer=tokenizer)
            assert store.digest("\ud800 no text", "m", tokenizer=tokenizer)
            assert not store.digest("one too many", "m", tokenizer=tokenizer)
            with pytest.raises(TimeoutError, match="2 texts"):
                store.drain(0.01)
        store.drain(10)
        stats = store.stats()
        assert (stats.digests_waiting, stats.digests_dropped, stats.digests_failed) == (0, 1, 1)
        assert not store.digest(text * 3, "m", tokenizer=tokenizer)
        assert len(text) - store.find_longest_prefix(text, "m", tokenizer=tokenizer).characters < 64
        assert store.digest("the last of all words", "m", tokenizer=tokenizer)
    store.close()
    assert store.stats().digests_waiting == 0
    assert not store.digest("late", "m", tokenizer=tokenizer)


def test_bytes_held_are_bytes_of_memory():
    tokenizer = tokenizer_named("gpt2")
    rule_of(tokenizer)
    store = PrefixStore()
    store.encode("warm up " * 100, model="m", tokenizer=tokenizer, add_special_tokens=False)
    text = "".join(f"{n} words of é中 text. " for n in range(20000))
    before = store.stats().bytes_held
    tracemalloc.start()
    try:
        store.encode(text, model="m", tokenizer=tokenizer, add_special_tokens=False)
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert grown == pytest.approx(store.stats().bytes_held - before, rel=0.1)


def test_the_least_recently_used_goes_first():
    tokenizer = tokenizer_named("gpt2")
    store = PrefixStore(20_000, chunk=64)
    kept = "keep this text known, " * 40
    for n in range(200):
        for text in (kept, f"{n} is another text " * 20):
            store.encode(text, model="m", tokenizer=tokenizer, add_special_tokens=False)
    stats = store.stats()
    assert stats.bytes_held <= 20_000
    assert stats.chunks_evicted > 100
    assert len(kept) - store.find_longest_prefix(kept, "m", tokenizer=tokenizer).characters < 128
    numbers = {entry.number for entry in store._entries.values()} | {s.number for s in store._spaces.values()}
    assert all(entry.parent in numbers for entry in store._entries.values())
    store.clear()
    assert store.stats().bytes_held == store.stats().chunks == 0


def test_many_threads_get_the_same_ids():
    tokenizer = tokenizer_named("qwen")
    store = PrefixStore(30_000, chunk=32)
    texts = [" ".join(CORPUS[: 1 + n % 5]) + f" and {n}" for n in range(12)]
    expected = [truth(tokenizer, text, special=False) for text in texts]
    wrong = []

    def work(first):
        for n in range(60):
            which = (first + n) % len(texts)
            got = store.encode(texts[which], model="m", tokenizer=tokenizer, add_special_tokens=False)
            if list(got) != expected[which]:
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    stats = store.stats()
    assert stats.hits + stats.misses == 240
    assert stats.bytes_held == sum(entry.size() for entry in store._entries.values()) <= 30_000


def test_text_that_is_no_unicode_is_refused():
    for name in ("gpt2", "unigram"):
        with pytest.raises(InvalidRequest, match="character 1500"):
            PrefixStore().encode(
                "ab " * 500 + "\udc00", model="m", tokenizer=tokenizer_named(name), add_special_tokens=True
            )


@pytest.mark.parametrize("name", ["max_bytes", "chunk", "max_digests", "max_digest_characters"])
def test_bounds_are_at_least_one(name):
    with pytest.raises(InvalidRequest, match=name):
        PrefixStore(**{name: 0})
