"""Text, messages and request bodies: the prompts that they become, and their scores."""

import asyncio
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from indexer import MemoryIndex, Prompt, Source, open_index
from scorer import (
    InvalidRequest,
    ModelSettings,
    NoTokenizer,
    PodMatch,
    PrefixScorer,
    PrefixStore,
    Prompts,
    Rendered,
    Renderer,
    TemplateFailed,
    Timings,
    Tokenizers,
    Unavailable,
)
from scorer.matches import sum_of_matches, sum_of_scores
from scorer.messages import normalised, normalised_tools

from .conftest import stored
from .models import CHATML, CONFIG, NEEDS_DATA, dialogues, make_folder, publish
from .test_prefix_store import CUTTING, REAL, TEXT, tokenizer_named

USER = [{"role": "user", "content": "the quick brown fox jumps over the lazy dogs"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


def same(made: Prompt, ids, **who) -> bool:
    """Whether a prompt has exactly these ids: each has a key of its own in blocks of one token."""
    want = Prompt(list(ids), who.pop("model", made.model), **who)
    return made.length == want.length and list(made.keys(1, made.length)) == list(want.keys(1, want.length))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All tokenizers of the tests of the prefix store, as models with a template."""
    made = tmp_path_factory.mktemp("models")
    for name in CUTTING:
        config = CONFIG | ({"bos_token": "[CLS]", "eos_token": "[SEP]"} if "wordpiece" in name else {})
        make_folder(made / name, tokenizer_named(name), config if name not in REAL else {"chat_template": CHATML})
    return made


@pytest.fixture(scope="module")
def prompts(folder):
    with Prompts(Tokenizers([folder]), store=PrefixStore(), renderer=Renderer(workers=1)) as made:
        yield made


@pytest.mark.parametrize("name", CUTTING)
@settings(deadline=None, max_examples=30)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), TEXT, st.booleans()), min_size=1, max_size=5),
    chunk=st.sampled_from([1, 5, 40]),
)
def test_texts_have_the_ids_of_a_whole_tokenization(prompts, name, edits, chunk):
    tokenizer = tokenizer_named(name)
    text = ""
    # the tokenizers are those of all examples: loading one takes longer than the example
    store = PrefixStore(1 << 16, chunk=chunk)
    with Prompts(prompts.tokenizers, store=store) as kept, Prompts(prompts.tokenizers) as plain:
        for at, length, more, special in edits:
            start = len(text) if at > 0.5 else int(at * 2 * len(text))
            text = text[:start] + more + text[start + int(length * 5) :]
            body = {"model": name, "prompt": text, "add_special_tokens": special}
            want = tokenizer.encode(text, add_special_tokens=special).ids
            assert same(kept.read(body)[0], want)
            assert same(plain.read(body)[0], want)


@pytest.mark.parametrize("name", CUTTING)
@settings(deadline=None, max_examples=15)
@given(contents=st.lists(TEXT, min_size=1, max_size=4))
def test_dialogues_have_the_ids_of_a_whole_tokenization(prompts, name, contents):
    messages, tokenizer = [], tokenizer_named(name)
    for number, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
        text = (
            "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
            + "<|im_start|>assistant\n"
        )
        want = tokenizer.encode(text, add_special_tokens=False).ids
        assert same(prompts.read({"model": name, "messages": messages})[0], want)


@NEEDS_DATA
def test_published_dialogues_have_the_ids_of_transformers(tmp_path):
    theirs = AutoTokenizer.from_pretrained(publish(tmp_path, "qwen3"))
    calls = dialogues("bfcl_func_doc/ticket_api")
    tools = [{"type": "function", "function": function} for function in calls]
    asked = [(row["messages"], row.get("tools")) for row in dialogues("tau2_retail_agent_sessions")]
    asked += [(row["messages"], None) for row in dialogues("swe_agent_trajectories")]
    asked += [(row["messages"], None) for row in dialogues("tau_bench_airline_gpt4o")]
    asked += [
        ([{"role": "user", "content": turn} for turn in row["turns"]], None) for row in dialogues("mt_bench_question")
    ]
    asked += [([*itertools.chain(*row["question"])], tools) for row in dialogues("bfcl_multi_turn_base_0-59")]
    tokenizers = Tokenizers([tmp_path])
    checked = 0
    with Prompts(tokenizers, store=PrefixStore()) as kept, Prompts(tokenizers) as plain:
        for messages, given_tools in asked:
            ends = [end for end in range(1, len(messages) + 1) if messages[end - 1]["role"] != "assistant"]
            for end in {*ends[:2], *ends[2::8], len(messages)}:
                body = {"model": "qwen3", "messages": messages[:end], "tools": given_tools, "temperature": 0.5}
                want = theirs.apply_chat_template(
                    normalised(messages[:end], parts=False),
                    tools=normalised_tools(given_tools),
                    add_generation_prompt=True,
                    return_dict=False,
                )
                assert same(kept.read(body)[0], want)
                assert same(plain.read(body)[0], want)
                checked += 1
    assert checked > 300


@NEEDS_DATA
@pytest.mark.parametrize("name", ["gpt2", "llmd_test_model", "qwen3"])
def test_published_texts_have_the_ids_of_transformers(tmp_path, name):
    theirs = AutoTokenizer.from_pretrained(publish(tmp_path, name))
    theirs.model_max_length = 1 << 30  # or it warns of each text that the model would not take
    texts = [row["turns"][0] for row in dialogues("mt_bench_question")]
    for row in dialogues("tau2_retail_agent_sessions") + dialogues("swe_agent_trajectories"):
        text = ""
        for message in row["messages"][:20]:
            text += str(message.get("content"))
            texts.append(text)
    tokenizers = Tokenizers([tmp_path])
    with Prompts(tokenizers, store=PrefixStore()) as kept, Prompts(tokenizers) as plain:
        for text in texts:
            want = theirs(text)["input_ids"]
            assert same(kept.read({"model": name, "prompt": text})[0], want)
            assert same(plain.read({"model": name, "prompt": text})[0], want)
        stats = kept.store.stats()
        assert stats.hits > len(texts) // 3
        assert stats.stood_aside == 0


def test_completions_have_special_tokens_and_chats_have_none(prompts):
    tokenizer = tokenizer_named("llama3")
    start = tokenizer.token_to_id("<|endoftext|>")
    text = "hello world"
    bare = tokenizer.encode(text, add_special_tokens=False).ids
    assert same(prompts.read({"model": "llama3", "prompt": text})[0], [start, *bare])
    assert same(prompts.read({"model": "llama3", "prompt": text, "add_special_tokens": False})[0], bare)
    rendered = tokenizer.encode(
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    ).ids
    body = {"model": "llama3", "messages": [{"role": "user", "content": text}]}
    assert same(prompts.read(body)[0], rendered)
    assert same(prompts.read(body | {"add_special_tokens": True})[0], [start, *rendered])


@pytest.mark.parametrize(
    ("prompt", "made"),
    [
        ([1, 2, 3], [[1, 2, 3]]),
        ([], [[]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("one", None),
        (["one", "two"], None),
    ],
)
def test_a_prompt_is_text_ids_or_a_list_of_them(prompts, prompt, made):
    tokenizer = tokenizer_named("gpt2")
    if made is None:
        made = [tokenizer.encode(text).ids for text in ([prompt] if isinstance(prompt, str) else prompt)]
    found = prompts.read({"model": "gpt2", "prompt": prompt})
    assert len(found) == len(made)
    assert all(same(each, ids) for each, ids in zip(found, made, strict=True))


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(7, 10)),
        ({"truncate_prompt_tokens": 0}, slice(0, 0)),
        ({"truncate_prompt_tokens": 10}, slice(0, 10)),
        ({"truncate_prompt_tokens": 99}, slice(0, 10)),
        ({"truncate_prompt_tokens": -1}, slice(0, 10)),
        ({"truncate_prompt_tokens": None}, slice(0, 10)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(0, 3)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, slice(7, 10)),
    ],
)
def test_the_last_tokens_are_kept(prompts, more, kept):
    ids = list(range(10))
    assert same(prompts.read({"model": "gpt2", "prompt": ids} | more)[0], ids[kept])
    words = tokenizer_named("llama3").encode(USER[0]["content"]).ids
    body = {"model": "llama3", "prompt": USER[0]["content"], "truncate_prompt_tokens": 4}
    # of a whole with its special tokens: the first of them is cut off
    assert same(prompts.read(body)[0], words[-4:])


def test_salt_adapter_and_items_are_those_of_the_body(folder):
    tokenizers = Tokenizers([folder], aliases={"served": "gpt2"}, loras={"poems": "gpt2"})
    with Prompts(tokenizers) as prompts:
        ids = list(range(8))
        who = {"cache_salt": "s", "mm_items": [["image", 2, 3]]}
        (made,) = prompts.read({"model": "served", "prompt": ids} | who)
        assert same(made, ids, model="gpt2", cache_salt="s", mm_items=[("image", 2, 3)])
        assert made.model == "gpt2"
        text = tokenizer_named("gpt2").encode("hi").ids
        for body in (
            {"model": "poems"},
            {"model": "gpt2", "lora_name": "poems"},
            {"model": "poems", "lora_name": "poems"},
        ):
            (made,) = prompts.read({"prompt": "hi"} | body)
            assert same(made, text, model="gpt2", lora_name="poems")
        with pytest.raises(InvalidRequest, match="lora_name"):
            prompts.read({"model": "poems", "prompt": "hi", "lora_name": "other"})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "model"),
        ({"model": 5, "prompt": "a"}, "model: "),
        ({"model": "gpt2"}, "token_ids, prompt or messages"),
        ({"model": "gpt2", "prompt": "a", "messages": USER}, "prompt and messages"),
        ({"model": "gpt2", "prompt": 5}, "prompt: "),
        ({"model": "gpt2", "prompt": {"a": 1}}, "prompt: "),
        ({"model": "gpt2", "prompt": ["a", 5]}, r"prompt\[1\]"),
        ({"model": "gpt2", "prompt": [[1], "a"]}, r"prompt\[1\]"),
        ({"model": "gpt2", "prompt": ["a"] * 5000}, "prompt: 5000 prompts"),
        ({"model": "gpt2", "prompt": [1, -1]}, "prompt: .*-1"),
        ({"model": "gpt2", "prompt": [[1], [2**32]]}, "prompt: "),
        ({"model": "gpt2", "prompt": [1, "a"]}, "prompt: "),
        ({"model": "gpt2", "token_ids": [[1]]}, "token_ids: "),
        ({"model": "gpt2", "token_ids": "a"}, "token_ids: "),
        ({"model": "gpt2", "prompt": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens: "),
        ({"model": "gpt2", "prompt": "a", "truncate_prompt_tokens": "3"}, "truncate_prompt_tokens: "),
        ({"model": "gpt2", "prompt": "a", "truncation_side": "top"}, "truncation_side: "),
        ({"model": "gpt2", "prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens: "),
        ({"model": "gpt2", "prompt": "a", "cache_salt": 5}, "cache_salt: "),
        ({"model": "gpt2", "prompt": "a", "mm_items": [["x", -1, 2]]}, "mm_items"),
        ({"model": "gpt2", "prompt": "a", "mm_items": [["x", 1]]}, "mm_items"),
        ({"model": "gpt2", "messages": "a"}, "messages: "),
        ({"model": "gpt2", "messages": []}, "messages: "),
        ({"model": "gpt2", "messages": ["a"]}, r"messages\[0\]|messages\[...\]"),
        ({"model": "gpt2", "messages": USER, "tools": [5]}, r"tools"),
        ({"model": "gpt2", "messages": USER, "documents": 5}, "documents"),
        ({"model": "gpt2", "messages": USER, "chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"model": "gpt2", "messages": USER, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"model": "gpt2", "messages": USER, "chat_template": "x"}, r"chat_template: .*trust_templates"),
        (
            {"model": "gpt2", "messages": USER, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_what_is_wrong_with_a_body_is_named(prompts, body, says):
    with pytest.raises(InvalidRequest, match=says):
        prompts.read(body)


def test_fields_that_decide_nothing_are_passed_over(prompts):
    more = {"temperature": "hot", "stream": 5, "n": None, "response_format": {"x": [1]}, "unknown": object()}
    (made,) = prompts.read({"model": "gpt2", "prompt": [1, 2]} | more)
    assert same(made, [1, 2])


def test_variables_reach_the_template_as_vllm_merges_them(tmp_path):
    template = "{{ messages[0].content }}|{{ a }}|{{ b }}|{{ reasoning_effort }}|{{ enable_thinking }}|{{ documents }}"
    make_folder(tmp_path / "m", tokenizer_named("qwen"), CONFIG | {"chat_template": template})
    (tmp_path / "given.jinja").write_text("given {{ a }}")
    models = {
        "m": ModelSettings(chat_template_kwargs={"a": 1, "b": 2}),
        "given": ModelSettings(tokenizer="m", chat_template=str(tmp_path / "given.jinja")),
    }

    def texts(prompts, **body):
        (made,) = prompts.read({"model": "m", "messages": [{"role": "user", "content": "x"}]} | body)
        return made

    def ids(text):
        return tokenizer_named("qwen").encode(text, add_special_tokens=False).ids

    with Prompts(Tokenizers([tmp_path], models=models), trust_templates=True) as prompts:
        assert same(texts(prompts), ids("x|1|2|||None"))
        assert same(texts(prompts, chat_template_kwargs={"a": 3, "b": None}), ids("x|3|2|||None"))
        assert same(texts(prompts, reasoning_effort="low"), ids("x|1|2|low|True|None"))
        assert same(texts(prompts, reasoning_effort="none"), ids("x|1|2|none|False|None"))
        kwargs = {"enable_thinking": False}
        assert same(texts(prompts, reasoning_effort="low", chat_template_kwargs=kwargs), ids("x|1|2|low|False|None"))
        assert same(texts(prompts, documents=[{"title": "t"}]), ids("x|1|2|||[{'title': 't'}]"))
        assert same(texts(prompts, model="given", chat_template_kwargs={"a": 5}), ids("given 5"))
        assert same(texts(prompts, chat_template="mine {{ b }}"), ids("mine 2"))


@pytest.mark.parametrize(("form", "text"), [("auto", "no"), ("string", "no"), ("openai", "yes")])
def test_the_form_of_contents_can_be_configured(tmp_path, form, text):
    template = "{% for m in messages %}{{ 'no' if m.content is string else 'yes' }}{% endfor %}"
    make_folder(tmp_path / "m", tokenizer_named("qwen"), CONFIG | {"chat_template": template})
    with Prompts(Tokenizers([tmp_path], models={"m": ModelSettings(content_format=form)})) as prompts:
        (made,) = prompts.read({"model": "m", "messages": USER})
    assert same(made, tokenizer_named("qwen").encode(text).ids)


HOSTILE = [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
    ("{{ 'a' * 10 ** 9 }}", "memory"),
    ("{% for a in range(99999) %}{{ 'a' * 10000 }}{% endfor %}", "characters"),
    ("{{ ().__class__.__bases__[0].__subclasses__() }}", "unsafe"),
    ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe|undefined"),
    ("{% include '/etc/passwd' %}", "loader"),
    ("{{ raise_exception('no') }}", "no"),
    ("{% if", "line 1"),
]


@pytest.mark.parametrize(("template", "says"), HOSTILE)
def test_a_hostile_template_is_one_clear_error(folder, template, says):
    # a file is as hostile as a request: this is the worse of the two
    renderer = Renderer(workers=1, max_seconds=0.3)
    with Prompts(Tokenizers([folder]), renderer=renderer, trust_templates=True) as prompts:
        with pytest.raises(TemplateFailed, match=says):
            prompts.read({"model": "gpt2", "messages": USER, "chat_template": template})
        assert prompts.read({"model": "gpt2", "messages": USER})


def test_hostile_texts_are_refused_before_they_cost_anything(prompts):
    for field, body in (
        ("prompt", {"prompt": "a" * 10_000_000}),
        ("prompt", {"prompt": ["a " * 3_000_000] * 2}),
        ("messages", {"messages": [{"role": "user", "content": "a" * 10_000_000}]}),
        ("prompt", {"prompt": "a\ud800"}),
        ("messages", {"messages": [{"role": "user", "content": "a\udfff"}]}),
    ):
        with pytest.raises(InvalidRequest, match=field):
            prompts.read({"model": "qwen"} | body)
    with Prompts(prompts.tokenizers) as plain, pytest.raises(InvalidRequest, match="character 1"):
        plain.read({"model": "qwen", "prompt": "a\ud800"})


def test_text_without_a_tokenizer_names_the_places(folder):
    with Prompts(Tokenizers([folder])) as prompts:
        for body in ({"prompt": "a"}, {"messages": USER}):
            with pytest.raises(NoTokenizer, match=str(folder / "never")):
                prompts.read({"model": "never"} | body)
    with pytest.raises(NoTokenizer, match=r"tokenizers\.folders"):
        PrefixScorer(open_index()).score_prompt("a", model="m")


def held_by(pods) -> MemoryIndex:
    """An index in which each pod holds blocks of four tokens."""
    index = open_index()
    for pod, ids in pods.items():
        source = Source(pod)
        index.register(source, model="gpt2")
        whole = ids[: len(ids) // 4 * 4]
        index.apply(source, [stored(range(1, len(whole) // 4 + 1), whole)])
    return index


@pytest.fixture
def fleet(prompts):
    text = USER[0]["content"]
    tokenizer = tokenizer_named("gpt2")
    chat = tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n").ids
    plain = tokenizer.encode(text).ids
    index = held_by({"chat": chat, "half": chat[: len(chat) // 2], "plain": plain})
    scorer = PrefixScorer(index, prompts=prompts)
    return scorer, text, len(chat) // 4, len(plain) // 4


def test_scores_of_text_and_messages(fleet):
    scorer, text, chat, plain = fleet
    assert scorer.score_prompt(text, model="gpt2") == {"plain": float(plain)}
    scores = scorer.score_chat(USER, model="gpt2")
    assert list(scores) == ["chat", "half"]
    assert scores["chat"] == chat
    assert scorer.score_chat(USER, model="gpt2", pods=["half"]) == {"half": scores["half"]}
    assert scorer.score_chat(USER, model="gpt2", cache_salt="s") == {}
    assert scorer.score_chat(USER, model="gpt2", truncate_prompt_tokens=8) == {}
    assert scorer.score_chat(USER, model="gpt2", tools=[TOOL], add_generation_prompt=False)["chat"] < chat
    body = {"model": "gpt2", "messages": USER, "stream": True}
    assert scorer.score_request(body) == scores
    assert [match.pod for match in scorer.match_request(body)] == ["chat", "half", "plain"]
    assert scorer.match_chat(USER, model="gpt2")[0].blocks == chat
    assert scorer.match_prompt(text, model="gpt2", pods=["plain"])[0].blocks == plain
    # what it gives can be told back as any prompt
    (prompt,) = scorer.prompts.read(body)
    assert scorer.routed("chat", prompt)


def test_async_twins_and_many(fleet):
    scorer, text, _, _ = fleet
    body = {"model": "gpt2", "messages": USER}
    one = {"model": "gpt2", "prompt": text}
    prompt = Prompt(tokenizer_named("gpt2").encode(text).ids, "gpt2")

    async def ask():
        return await asyncio.gather(
            scorer.ascore_prompt(text, model="gpt2"),
            scorer.ascore_chat(USER, model="gpt2"),
            scorer.ascore_request(body),
            scorer.amatch_prompt(text, model="gpt2"),
            scorer.amatch_chat(USER, model="gpt2"),
            scorer.amatch_request(body),
            scorer.ascore_many([body, one, prompt] * 4),
        )

    found = asyncio.run(ask())
    assert found[0] == scorer.score_prompt(text, model="gpt2")
    assert found[1] == found[2] == scorer.score_request(body)
    assert found[3] == scorer.match_prompt(text, model="gpt2")
    assert found[4] == found[5] == scorer.match_request(body)
    assert found[6] == [found[1], found[0], found[0]] * 4
    assert scorer.score_many([]) == []
    with pytest.raises(InvalidRequest, match=r"^\[1\]\.token_ids, prompt or messages"):
        scorer.score_many([body, {"model": "gpt2"}])
    with pytest.raises(NoTokenizer, match=r"^\[0\]: model 'x'"):
        scorer.score_many([one | {"model": "x"}])


def test_several_prompts_in_one_body_are_added_up(fleet):
    scorer, text, _, plain = fleet
    ids = tokenizer_named("gpt2").encode(text).ids
    assert scorer.score_request({"model": "gpt2", "prompt": [text, text]}) == {"plain": 2.0 * plain}
    matches = scorer.match_request({"model": "gpt2", "prompt": [ids, ids[:9]]})
    assert (matches[0].pod, matches[0].blocks, matches[0].tiers) == ("plain", plain + 2, {"gpu": plain + 2})


def test_a_sum_is_exact_where_all_of_it_is():
    one = PodMatch("a", 0, 1, 4, 3, 1.0, {"gpu": 1}, "exact", speculative_blocks=1, speculative_tokens=4)
    bad = PodMatch("a", 0, 2, 8, 8, 1.6, {"cpu": 2}, "degraded", "gap")
    other = PodMatch("b", 1, 3, 12, 11, 3.0, {"gpu": 3}, "exact")
    added = PodMatch("a", 0, 3, 12, 11, 2.6, {"gpu": 1, "cpu": 2}, "degraded", "gap", 1, 4)
    assert sum_of_matches([[one, other], [bad]]) == [other, added]
    assert sum_of_matches([[bad], [one]])[0].trust == "degraded"
    assert sum_of_scores([{"a": 1.0}, {"b": 2.0, "a": 0.5}]) == {"b": 2.0, "a": 1.5}


def test_stages_are_timed_when_asked_for(fleet):
    scorer, text, _, _ = fleet
    timings = Timings()
    assert scorer.score_chat(USER, model="gpt2", timings=timings) == scorer.score_chat(USER, model="gpt2")
    assert min(timings.render, timings.tokenize, timings.keys, timings.match) > 0
    plain = Timings()
    scorer.match_prompt(text, model="gpt2", timings=plain)
    assert plain.render == 0
    assert min(plain.tokenize, plain.keys, plain.match) > 0


def test_a_text_can_be_made_known_ahead(folder):
    text = "You are a very helpful assistant, and so on. " * 40
    with Prompts(Tokenizers([folder], aliases={"served": "gpt2"}), store=PrefixStore(chunk=64)) as prompts:
        assert prompts.digest(text, model="served")
        prompts.store.drain(10)
        before = prompts.store.stats().characters_reused
        (made,) = prompts.read({"model": "gpt2", "prompt": text + "What now?"})
        assert same(made, tokenizer_named("gpt2").encode(text + "What now?").ids)
        assert prompts.store.stats().characters_reused - before > len(text) - 128
        with pytest.raises(NoTokenizer):
            prompts.digest(text, model="never")
    with pytest.raises(Unavailable, match="closed"):
        prompts.each([{"model": "gpt2", "prompt": "a"}])
    with Prompts(prompts.tokenizers) as plain:
        assert not plain.digest(text, model="gpt2")


def test_more_questions_than_may_wait_are_refused(folder):
    free, begun = threading.Event(), threading.Event()

    def work():
        begun.set()
        free.wait(10)

    async def ask():
        with Prompts(Tokenizers([folder]), threads=1, max_waiting=2) as prompts:
            tasks = [asyncio.create_task(prompts.run(work)) for _ in range(3)]
            await asyncio.to_thread(begun.wait, 10)
            with pytest.raises(Unavailable, match="2 questions wait"):
                await prompts.run(work)
            free.set()
            await asyncio.gather(*tasks)
            await prompts.run(work)
        with pytest.raises(Unavailable, match="closed"):
            await prompts.run(work)

    asyncio.run(ask())


class Far:
    """Somebody who tokenizes elsewhere."""

    def __init__(self):
        self.asked = []

    def text(self, text, *, model, add_special_tokens):
        self.asked.append((model, text, add_special_tokens))
        return [1, 2, 3]

    def chat(self, chat, *, model, add_special_tokens):
        self.asked.append((model, chat.messages, add_special_tokens))
        return Rendered([4, 5])


def test_a_remote_tokenizer_is_asked_where_there_is_none_here(folder, tmp_path):
    make_folder(tmp_path / "bare", tokenizer_named("gpt2"), {})
    far = Far()
    with Prompts(Tokenizers([folder, tmp_path], aliases={"served": "far"}), remote=far) as prompts:
        assert same(prompts.read({"model": "served", "prompt": "a"})[0], [1, 2, 3], model="far")
        assert same(prompts.read({"model": "far", "messages": USER})[0], [4, 5])
        # a tokenizer without a template is of no use for messages
        assert same(prompts.read({"model": "bare", "messages": USER})[0], [4, 5])
        assert same(prompts.read({"model": "bare", "prompt": "one"})[0], tokenizer_named("gpt2").encode("one").ids)
        prompts.read({"model": "gpt2", "messages": USER})
    assert far.asked == [("served", "a", True), ("far", USER, False), ("bare", USER, False)]


@pytest.mark.parametrize("name", ["threads", "max_waiting", "max_chars"])
def test_bounds_are_at_least_one(name):
    with pytest.raises(InvalidRequest, match=name):
        Prompts(**{name: 0})


def test_one_question_does_not_wait_for_a_whole_batch(monkeypatch):
    order, begun, go_on = [], threading.Event(), threading.Event()

    def read(_, body, timings=None):
        begun.set()
        assert go_on.wait(20)
        order.append("batch")
        return [Prompt([], "m")]

    monkeypatch.setattr(Prompts, "read", read)
    with Prompts(threads=1) as prompts, ThreadPoolExecutor(1) as apart:
        batch = apart.submit(prompts.each, [{}] * 20)
        assert begun.wait(20)

        async def one():
            asked = asyncio.ensure_future(prompts.run(order.append, "one"))
            await asyncio.sleep(0)  # it is in line now
            go_on.set()
            await asked

        asyncio.run(one())
        assert len(batch.result()) == 20
    assert order.index("one") <= 2
