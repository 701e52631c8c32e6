"""Where tokenizers are found, and that names of requests lead nowhere else."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from scorer import ModelSettings, NoTokenizer, Prompts, Tokenizers
from scorer import tokenizers as module
from scorer.places import folder_of

from .models import CONFIG, make_folder
from .test_prefix_store import MADE, tokenizer_named


def cached(folder, model, *revisions, main=None):
    cache = folder / ("models--" + model.replace("/", "--"))
    for revision in revisions:
        make_folder(cache / "snapshots" / revision, tokenizer_named("qwen"))
    if main is not None:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(main)
    return cache / "snapshots"


def test_each_layout_is_found(tmp_path):
    plain, hub, home = tmp_path / "plain", tmp_path / "hub", tmp_path / "home"
    make_folder(plain / "gpt2", tokenizer_named("gpt2"))
    make_folder(plain / "Qwen" / "Qwen3-8B", tokenizer_named("qwen"))
    snapshots = cached(hub, "org/name", "aaa", "bbb", main="bbb\n")
    alone = cached(home / "hub", "org/alone", "ccc")
    folders = [plain, hub, home]
    assert folder_of("gpt2", folders) == plain / "gpt2"
    assert folder_of("Qwen/Qwen3-8B", folders) == plain / "Qwen" / "Qwen3-8B"
    assert folder_of("org/name", folders) == snapshots / "bbb"
    assert folder_of("org/alone", folders) == alone / "ccc"
    make_folder(plain / "org" / "name", tokenizer_named("gpt2"))
    assert folder_of("org/name", folders) == plain / "org" / "name"


def test_an_error_names_the_places_looked_at(tmp_path):
    cached(tmp_path, "org/two", "aaa", "bbb")
    with pytest.raises(NoTokenizer) as none:
        Tokenizers([tmp_path]).get("org/two")
    assert f"{tmp_path}/org/two/tokenizer.json" in str(none.value)
    assert f"{tmp_path}/models--org--two/snapshots/*/tokenizer.json" in str(none.value)
    with pytest.raises(NoTokenizer, match=r"tokenizers\.folders"):
        Tokenizers().get("org/two")


HOSTILE = [
    "../secret",
    "a/../../secret",
    "/etc",
    "//etc",
    "..",
    ".",
    "",
    "a//b",
    "a/./b",
    "a\x00b",
    "a\\..\\b",
    "a\n",
    "x" * 300,
    "é" * 200,
    "a/" * 100 + "b",
    "\ud800",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_do_not_lead_out_of_the_folders(tmp_path, name):
    make_folder(tmp_path / "secret", tokenizer_named("qwen"))
    make_folder(tmp_path / "open" / "a", tokenizer_named("qwen"))
    with pytest.raises(NoTokenizer):
        Tokenizers([tmp_path / "open"]).get(name)


@given(st.text(alphabet="./\\ab\x00-", max_size=12))
def test_any_name_leads_into_the_folders_or_nowhere(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp() / "names"
    if not root.exists():
        for place in ("tokenizer.json", "open/a/tokenizer.json", "open/tokenizer.json", "b/tokenizer.json"):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).write_text("{}")
    try:
        found = folder_of(name, [root / "open"])
    except NoTokenizer:
        return
    assert found.resolve().is_relative_to((root / "open").resolve())
    assert found.resolve() != (root / "open").resolve()


@pytest.mark.parametrize("main", ["../../secret", "/etc", "a/b", "", "x" * 5000, "é"])
def test_a_revision_does_not_lead_out_either(tmp_path, main):
    cached(tmp_path, "org/name", "aaa", main=main)
    make_folder(tmp_path / "secret", tokenizer_named("qwen"))
    with pytest.raises(NoTokenizer):
        folder_of("org/name", [tmp_path])


def test_names_and_settings(tmp_path):
    elsewhere = make_folder(tmp_path / "elsewhere", tokenizer_named("gpt2"))
    make_folder(tmp_path / "in" / "base", tokenizer_named("qwen"))
    tokenizers = Tokenizers(
        [tmp_path / "in"],
        models={
            "there": ModelSettings(tokenizer=str(elsewhere)),
            "same": ModelSettings(tokenizer="base"),
            "out": ModelSettings(tokenizer="../out"),
        },
        aliases={"served": "base", "tuned": "adapter"},
        loras={"adapter": "base", "second": "served"},
    )
    assert tokenizers.resolve("base") == ("base", None)
    assert tokenizers.resolve("served") == ("base", None)
    assert tokenizers.resolve("adapter") == ("base", "adapter")
    assert tokenizers.resolve("tuned") == ("base", "adapter")
    assert tokenizers.resolve("second") == ("base", "second")
    assert tokenizers.get("there").folder == elsewhere
    assert tokenizers.get("same").folder == tokenizers.get("base").folder
    with pytest.raises(NoTokenizer):
        tokenizers.get("out")


def test_a_tokenizer_is_loaded_once(tmp_path, monkeypatch):
    make_folder(tmp_path / "m", tokenizer_named("qwen"))
    loads = []
    load = module._tokenizer_in
    monkeypatch.setattr(module, "_tokenizer_in", lambda folder: loads.append(folder) or load(folder))
    tokenizers = Tokenizers([tmp_path])
    found = []
    threads = [threading.Thread(target=lambda: found.append(tokenizers.get("m"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert all(each is found[0] for each in found)


def test_files_that_cannot_be_loaded_are_named_and_not_tried_all_the_time(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "tokenizer.json"
    file.write_text("{}")
    tokenizers = Tokenizers([tmp_path])
    with pytest.raises(NoTokenizer, match=str(file)):
        tokenizers.get("m")
    tokenizer_named("qwen").save(str(file))
    with pytest.raises(NoTokenizer, match=str(file)):
        tokenizers.get("m")
    monkeypatch.setattr(module, "RETRY_S", 0)
    assert tokenizers.get("m").model == "m"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[", "tokenizer_config"),
        ("[]", "expected an object"),
        ('{"chat_template": 5}', "chat_template"),
        ('{"chat_template": [{"name": "a"}]}', "chat_template"),
        ('{"added_tokens_decoder": {"5000": {"content": "<new>"}}}', "<new>"),
        ("[" * 100_000, "tokenizer_config"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path, config, says):
    folder = make_folder(tmp_path / "m", tokenizer_named("qwen"), None)
    (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises(NoTokenizer, match=says):
        Tokenizers([tmp_path]).get("m")


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    make_folder(tmp_path / "m", tokenizer_named("qwen"))
    monkeypatch.setattr(module, "MAX_TOKENIZER_BYTES", 1000)
    with pytest.raises(NoTokenizer, match="at most 1000"):
        Tokenizers([tmp_path]).get("m")
    make_folder(tmp_path / "t", tokenizer_named("qwen"), chat_template__jinja="x" * (1 << 21))
    monkeypatch.undo()
    with pytest.raises(NoTokenizer, match=r"chat_template\.jinja"):
        Tokenizers([tmp_path]).get("t")


def test_added_tokens_of_the_configuration_are_those_of_transformers(tmp_path):
    tokenizer = MADE["qwen"]()
    size = tokenizer.get_vocab_size()
    more = {
        str(size + 1): {"content": "<b>", "special": True},
        str(size): {"content": "<a>", "lstrip": True, "normalized": True},
        str(tokenizer.token_to_id("<|im_end|>")): {"content": "<|im_end|>", "special": True},
    }
    folder = make_folder(tmp_path / "m", tokenizer, CONFIG | {"added_tokens_decoder": more})
    theirs = AutoTokenizer.from_pretrained(folder)
    with Prompts(Tokenizers([tmp_path])) as prompts:
        for text in ("one <a>two<b> <|im_end|>", " <b><a>"):
            (made,) = prompts.read({"model": "m", "prompt": text})
            (want,) = prompts.read({"model": "m", "prompt": theirs(text)["input_ids"]})
            assert made.keys(1, made.length) == want.keys(1, want.length)
            assert size in theirs(text)["input_ids"]


def test_truncation_and_padding_of_the_description_are_not_the_engines(tmp_path):
    tokenizer = Tokenizer.from_str(tokenizer_named("qwen").to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    make_folder(tmp_path / "m", tokenizer)
    with Prompts(Tokenizers([tmp_path])) as prompts:
        (made,) = prompts.read({"model": "m", "prompt": "one two three four"})
    assert made.length == len(tokenizer_named("qwen").encode("one two three four").ids)


LEGACY = json.dumps({"pad_token": "<pad>", "bos_token": "fox"})


@pytest.mark.parametrize("more", [{}, {"added_tokens_decoder": {}}])
def test_special_tokens_are_those_of_transformers(tmp_path, more):
    config = CONFIG | {"unk_token": None, "sep_token": "lazy", "additional_special_tokens": ["quick", "<new>"]} | more
    folder = make_folder(tmp_path / "m", tokenizer_named("qwen"), config, special_tokens_map__json=LEGACY)
    theirs = AutoTokenizer.from_pretrained(folder)
    named = {name: str(token) for name, token in theirs.special_tokens_map.items()}
    assert Tokenizers([tmp_path]).get("m").special == named
    text = "The quick brown fox, quicker and foxier than <pad> lazy <new> dogs"
    with Prompts(Tokenizers([tmp_path])) as prompts:
        (made,) = prompts.read({"model": "m", "prompt": text})
        (want,) = prompts.read({"model": "m", "prompt": theirs(text)["input_ids"]})
    assert made.keys(1, made.length) == want.keys(1, want.length)
