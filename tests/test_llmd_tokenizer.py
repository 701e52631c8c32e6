"""llm-d's tokenization service as a remote tokenizer, and every way in which it may fail."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from urllib.parse import quote

import grpc
import pytest
from transformers import AutoTokenizer

from kvindex import llmd_tokenizer
from kvindex.config import TokenizersConfig
from kvindex.llmd_tokenizer import LlmdTokenizer
from kvindex.tokenizing import open_prompts
from scorer import InvalidRequest, ModelSettings, NoTokenizer, Prompts, Tokenizers, Unavailable

from .conftest import until
from .grpc_service import field, varint
from .llmd_service import Service, answered, texts
from .models import make_folder
from .test_prefix_store import tokenizer_named
from .test_prompts import TOOL, USER, same

INITIALIZE, RENDER = "InitializeTokenizer", "RenderCompletion"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% endfor %}<|end|>{% endfor %}"
    "{% if tools %}{{ tools | length }}{% endif %}{% if documents %}{{ documents[0].a }}{% endif %}{{ a }}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    make_folder(folder / "m", tokenizer_named("llama3"), config)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "m")


@pytest.fixture
def address(tmp_path):
    return f"unix://{tmp_path}/tokenizer-uds.socket"


@pytest.fixture
def service(tokenizer, address):
    with Service(tokenizer, address) as made:
        yield made


@pytest.fixture
def far(service, address):
    made = LlmdTokenizer(address, timeout_s=20)
    yield made
    made.close()


IMAGE = {"type": "image_url", "image_url": {"url": "http://a/b.png", "detail": "low"}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hello wörld 中"},
        {"prompt": ""},
        {"prompt": "hello", "add_special_tokens": False},
        {"messages": USER},
        {"messages": USER, "add_generation_prompt": False, "tools": [TOOL]},
        {"messages": [*USER, {"role": "assistant", "content": "so"}], "continue_final_message": True},
        {"messages": USER, "chat_template_kwargs": {"a": 1}, "documents": [{"a": "b"}], "reasoning_effort": "low"},
        {"messages": [{"role": "system"}, {"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": None}, {"type": "text", "text": "a"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": None, "refusal": None},
                {"role": "tool", "content": "1", "tool_call_id": "c"},
            ]
        },
    ],
)
def test_the_ids_are_those_of_a_tokenizer_here(service, far, folder, body):
    with Prompts(Tokenizers([folder])) as here, Prompts(remote=far) as there:
        (made,), (want,) = there.read({"model": "m"} | body), here.read({"model": "m"} | body)
    assert made.length == want.length
    assert made.keys(1, made.length) == want.keys(1, want.length)
    # once loaded, as llm-d's client has it: no thinking, an answer to come
    assert service.asked[0] == (INITIALIZE, {1: "m", 3: 1})
    assert len(service.asked) == 2


def test_over_tcp_and_any_path(tokenizer, tmp_path):
    with Service(tokenizer, "127.0.0.1:0") as service:
        for url in (f"grpc://127.0.0.1:{service.port}", f"grpc://localhost:{service.port}/"):
            far = LlmdTokenizer(url)
            assert list(far.text("one", model="m", add_special_tokens=True)) == tokenizer.encode("one")
            far.close()
    path = tmp_path / "a b%20ü?.sock"
    with Service(tokenizer, f"unix://{quote(str(path))}"):
        assert path.exists()
        for url in (f"unix://{quote(str(path))}", f"grpc+unix://{path}".replace("%", "%25").replace("?", "%3F")):
            far = LlmdTokenizer(url)
            assert list(far.text("one", model="m", add_special_tokens=True)) == tokenizer.encode("one")
            far.close()


def test_a_model_is_loaded_once_for_all_threads(service, far):
    with ThreadPoolExecutor(16) as threads:
        ask = lambda number: far.text(f"{number}", model="m", add_special_tokens=True)  # noqa: E731
        found = list(threads.map(ask, range(200)))
    assert [list(ids) for ids in found] == [service.tokenizer.encode(f"{number}") for number in range(200)]
    assert service.calls(INITIALIZE) == 1
    assert service.calls(RENDER) == 200


def test_the_service_is_asked_for_a_models_own_name(service, address, tmp_path):
    service.models = ("org/m", "/models/other")
    config = TokenizersConfig(
        remote_url=address,
        aliases={"served": "org/m"},
        loras={"adapter": "org/m"},
        models={
            "org/n": ModelSettings(tokenizer="/models/other", chat_template_kwargs={"a": "x", "b": 1}),
            "org/m": ModelSettings(),
        },
    )
    with ExitStack() as running:
        prompts = open_prompts(config, running)
        for model in ("served", "adapter", "org/m"):
            assert prompts.read({"model": model, "prompt": "one"})
        body = {"model": "org/n", "messages": USER, "chat_template_kwargs": {"a": "y"}}
        assert same(
            prompts.read({"model": "org/n", "prompt": "one"})[0], service.tokenizer.encode("one"), model="org/n"
        )
        prompts.read(body)
    asked = [read for name, read in service.asked if name != INITIALIZE]
    assert [read[1] for read in asked] == ["org/m"] * 3 + ["/models/other"] * 2
    assert json.loads(asked[-1][7]) == {"a": "y", "b": 1}
    assert service.calls(INITIALIZE) == 2


def test_paths_are_asked_for_only_where_the_configuration_names_them(service, address):
    service.models = ("/srv/m",)
    config = TokenizersConfig(remote_url=address, aliases={"served": "/srv/m"}, models={"/srv/m": ModelSettings()})
    with ExitStack() as running:
        prompts = open_prompts(config, running)
        for model in ("served", "/srv/m"):
            assert prompts.read({"model": model, "prompt": "one"})
        service.asked.clear()
        for model in ("/etc", "..", "./m", "a/../b", "s3://a/b", "a/", "x" * 512):
            with pytest.raises(NoTokenizer, match=r"tokenizers\.models") as error:
                prompts.read({"model": model, "prompt": "one"})
            assert len(str(error.value)) < 700
    assert service.asked == []


def test_a_question_that_the_service_would_not_take_is_refused_here(service, far, monkeypatch):
    monkeypatch.setattr(llmd_tokenizer, "MAX_MESSAGE_BYTES", 1_000)
    with Prompts(remote=far) as prompts:
        for body in ({"prompt": "a" * 1_000}, {"messages": [{"role": "user", "content": "a" * 1_000}]}):
            with pytest.raises(InvalidRequest, match=r"prompt or messages: 10\d\d bytes, .* takes 1000"):
                prompts.read({"model": "m"} | body)
        assert prompts.read({"model": "m", "prompt": "a" * 900})
    assert service.calls(RENDER) == 1


def test_what_engines_were_told_and_the_service_cannot_be_is_said(address, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    for settings in (ModelSettings(chat_template=str(template)), ModelSettings(content_format="openai")):
        with ExitStack() as running:
            prompts = open_prompts(TokenizersConfig(remote_url=address, models={"m": settings}), running)
            with pytest.raises(NoTokenizer, match=r"'m'.*chat_template.*tokenizers\.folders"):
                prompts.read({"model": "m", "messages": USER})


def test_a_template_of_the_request_is_handed_on(service, far):
    with Prompts(remote=far, trust_templates=True) as prompts:
        (made,) = prompts.read({"model": "m", "messages": USER, "chat_template": "{{ messages[0].role }}"})
    assert same(made, service.tokenizer.encode("user", add_special_tokens=False))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": USER, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]\.role"),
        ({"messages": [*USER, {"role": "user", "content": 5}]}, r"messages\[1\]\.content"),
        ({"messages": [{"role": "user", "content": [5]}]}, r"messages\[0\]\.content\[0\]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, r"content\[0\]\.text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio.*mm_items"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, r"image_url\.url"),
        ({"messages": [{"role": "user", "content": [IMAGE | {"uuid": "u"}]}]}, r"content\[0\]\.uuid.*mm_items"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, r"messages\[0\]\.name.*remote_url"),
        ({"messages": [{"role": "assistant", "content": "a", "reasoning": "b"}]}, r"messages\[0\]\.reasoning"),
        ({"messages": [{"role": "developer", "content": "a", "tools": [TOOL]}]}, r"messages\[0\]\.tools"),
        ({"messages": [{"role": "assistant", "tool_calls": ["\ud800"]}]}, r"messages\[0\]\.tool_calls.*Unicode"),
        ({"messages": USER, "tools": [{"a": "\ud800"}]}, "tools.*Unicode"),
        ({"messages": USER, "chat_template_kwargs": {"a": object()}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "Unicode"),
        ({"prompt": "a\ud800"}, "Unicode"),
    ],
)
def test_what_cannot_be_told_right_is_refused_here(service, far, body, says):
    with Prompts(remote=far) as prompts, pytest.raises(InvalidRequest, match=says):
        prompts.read({"model": "m"} | body)
    assert service.asked == []


@pytest.mark.parametrize(
    ("fails", "kind", "says"),
    [
        ({INITIALIZE: field(2, "no such model " + "x" * 10_000)}, NoTokenizer, "'m': .*no such model"),
        ({INITIALIZE: (grpc.StatusCode.INTERNAL, "boom")}, NoTokenizer, "'m': .*boom"),
        ({INITIALIZE: (grpc.StatusCode.UNAVAILABLE, "boom")}, Unavailable, "boom"),
        ({INITIALIZE: b""}, Unavailable, "is it llm-d's"),
        ({RENDER: (grpc.StatusCode.INTERNAL, "Render failed: bad" + "x" * 5_000)}, InvalidRequest, "failed: bad"),
        ({RENDER: (grpc.StatusCode.INVALID_ARGUMENT, "bad")}, InvalidRequest, "RenderCompletion: .*bad"),
        ({RENDER: (grpc.StatusCode.FAILED_PRECONDITION, "none here")}, NoTokenizer, "'m': .*none here"),
        ({RENDER: (grpc.StatusCode.NOT_FOUND, "none here")}, NoTokenizer, "'m': .*none here"),
        ({RENDER: (grpc.StatusCode.UNIMPLEMENTED, "what?")}, Unavailable, "llm-d-kv-cache"),
        ({RENDER: (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")}, Unavailable, "full"),
        ({RENDER: (grpc.StatusCode.UNAUTHENTICATED, "who?")}, Unavailable, "UNAUTHENTICATED: who"),
        ({RENDER: (grpc.StatusCode.UNAVAILABLE, "gone")}, Unavailable, "see whether it runs: gone"),
        ({RENDER: field(4, "cannot")}, InvalidRequest, "cannot"),
        ({RENDER: b""}, Unavailable, "neither success nor why"),
        ({RENDER: field(2, [1, 2])}, Unavailable, "neither success nor why"),
        ({RENDER: b"\xff" * 40}, Unavailable, "40 bytes that are no RenderCompletionResponse"),
        ({RENDER: field(3, 1) + field(4, b"\xff")}, Unavailable, "no RenderCompletionResponse"),
        ({RENDER: answered([1, 2**32], 2, 3)}, Unavailable, "token id 4294967296"),
        ({RENDER: answered([2**64 - 1, 1], 2, 3)}, Unavailable, "token id 18446744073709551615"),
        ({RENDER: answered([1] * 1_001, 2, 3)}, Unavailable, "1001 token ids, at most 1000"),
        ({RENDER: field(1, "x" * 100_000)}, Unavailable, "too long"),
    ],
)
def test_each_failure_is_one_clear_error(service, address, fails, kind, says, monkeypatch):
    monkeypatch.setattr(llmd_tokenizer, "MAX_IDS", 1_000)
    monkeypatch.setattr(llmd_tokenizer, "MAX_ANSWER_BYTES", 50_000)
    service.fails = fails
    far = LlmdTokenizer(address, timeout_s=20)
    with Prompts(remote=far) as prompts:
        with pytest.raises(kind, match=says) as error:
            prompts.read({"model": "m", "prompt": "a"})
        assert type(error.value) is kind or kind is InvalidRequest
        assert address in str(error.value)
        assert len(str(error.value)) < 700
        service.fails = {}
        assert prompts.read({"model": "m", "prompt": "a"})
    far.close()


def features(hashes, ranges):
    """MultiModalFeatures: mm_hashes=1 {kind: {values=1}}, mm_placeholders=2 {kind: {ranges=1 {offset=1, length=2}}}."""
    data = b""
    for kind, names in hashes.items():
        data += field(1, field(1, kind) + field(2, b"".join(field(1, name) for name in names)))
    for kind, places in ranges.items():
        made = (field(1, field(1, first) + field(2, count)) for first, count in places)
        data += field(2, field(1, kind) + field(2, b"".join(made)))
    return field(3, data)


CHAT = "RenderChatCompletion"
IDS = list(range(64))


def test_images_are_those_that_the_service_finds(service, far):
    found = features({"image": ["a", "b"], "audio": ["c"]}, {"image": [(40, 10), (1, 20)], "audio": [(21, 3)]})
    service.fails = {CHAT: answered(IDS, 2, 4) + found}
    content = [{"type": "text", "text": "look:"}, IMAGE, {"type": "image_url", "image_url": "data:x"}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    with Prompts(remote=far) as prompts:
        (made,) = prompts.read(body)
        assert same(made, IDS, model="m", mm_items=[("b", 1, 20), ("c", 21, 3), ("a", 40, 10)])
        assert not same(made, IDS, model="m")
        # who sends items of his own means them
        (own,) = prompts.read(body | {"mm_items": [("z", 0, 4)]})
        assert same(own, IDS, model="m", mm_items=[("z", 0, 4)])
        with pytest.raises(InvalidRequest, match="truncate_prompt_tokens: 5, but there are images"):
            prompts.read(body | {"truncate_prompt_tokens": 5})
        assert prompts.read(body | {"truncate_prompt_tokens": 64})
    (message,) = service.asked[1][1][2]
    said = [texts(part, 3) for part in texts(message, 3)[3]]
    assert said == [
        {1: "text", 2: "look:", 3: []},
        {1: "image_url", 3: [field(1, "http://a/b.png")]},
        {1: "image_url", 3: [field(1, "data:x")]},
    ]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (features({"image": ["a", "b"]}, {"image": [(1, 2)]}), "2 hashes for 1 ranges"),
        (features({"image": ["a"]}, {"audio": [(1, 2)]}), "0 hashes for 1 ranges of 'audio'"),
        (features({"image": ["a"]}, {"image": [(60, 5)]}), "'a' is said to be 5 tokens from 60 on, of 64"),
        (features({"image": ["a"]}, {"image": [(2**64 - 1, 5)]}), "'a' is said to be 5 tokens from -1 on"),
        (features({"image": ["a"]}, {"image": [(1, 0)]}), "'a' is said to be 0 tokens"),
        (features({"image": [""]}, {"image": [(1, 1)]}), "'' is said"),
        (features({"image": ["a"] * 1_025}, {"image": [(1, 1)] * 1_025}), "at most 1024"),
        (field(3, b"\x0a\xff"), "no RenderChatCompletionResponse"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_that_cannot_be_are_not_believed(service, far, address, found, says):
    service.fails = {CHAT: answered(IDS, 2, 4) + found}
    with Prompts(remote=far) as prompts, pytest.raises(Unavailable, match=says) as error:
        prompts.read({"model": "m", "messages": USER})
    assert address in str(error.value)


def test_ids_at_the_edge_are_taken_and_fields_nobody_knows_passed_over(service, far):
    unpacked = b"".join(varint(2 << 3) + varint(number) for number in (0, 2**32 - 1))
    service.fails = {RENDER: unpacked + field(99, "new") + field(3, 1)}
    assert list(far.text("a", model="m", add_special_tokens=True)) == [0, 2**32 - 1]


def test_a_model_that_the_service_does_not_know(service, address):
    with ExitStack() as running:
        prompts = open_prompts(TokenizersConfig(remote_url=address, aliases={"served": "n"}), running)
        for _ in range(2):
            with pytest.raises(NoTokenizer, match=r"'served' \(asked for as 'n'\): .*renderer for model: n"):
                prompts.read({"model": "served", "prompt": "a"})
    assert service.calls(INITIALIZE) == 2
    assert service.calls(RENDER) == 0


def test_a_model_that_was_forgotten_is_loaded_again(service, far):
    ask = lambda: far.text("a", model="m", add_special_tokens=True)  # noqa: E731
    want = ask()
    service.loaded.clear()
    assert ask() == want
    assert [name for name, _ in service.asked] == [INITIALIZE, RENDER, RENDER, INITIALIZE, RENDER]
    # one that cannot be loaded any more
    service.models = ()
    service.loaded.clear()
    service.asked.clear()
    for _ in range(2):
        with pytest.raises(NoTokenizer):
            ask()
    assert [name for name, _ in service.asked] == [RENDER, INITIALIZE, INITIALIZE]
    service.models = ("m",)
    assert ask() == want


def test_a_refusal_is_not_asked_for_ever(service, far):
    service.fails = {RENDER: (grpc.StatusCode.INTERNAL, "Render failed")}
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="Render failed"):
            far.text("a", model="m", add_special_tokens=True)
    assert [name for name, _ in service.asked] == [INITIALIZE, RENDER, RENDER, INITIALIZE, RENDER]


@pytest.mark.parametrize("unix", [True, False])
def test_a_service_that_is_started_again_is_found_again(tokenizer, address, unix):
    place = address if unix else "127.0.0.1:0"
    with Service(tokenizer, place) as first:
        url = address if unix else f"grpc://127.0.0.1:{first.port}"
        far = LlmdTokenizer(url, timeout_s=20)
        want = far.text("a", model="m", add_special_tokens=True)
    with pytest.raises(Unavailable, match=f"{re.escape(url)}.*see whether it runs"):
        far.text("a", model="m", add_special_tokens=True)
    with Service(tokenizer, place if unix else f"127.0.0.1:{first.port}") as second:

        def found():
            try:
                return far.text("a", model="m", add_special_tokens=True)
            except Unavailable:
                return None

        assert until(found) == want
        assert [name for name, _ in second.asked] == [INITIALIZE, RENDER]
    far.close()


def test_one_that_does_not_answer_is_waited_for_a_while(service, address):
    go_on = threading.Event()

    def wait():
        go_on.wait(60)

    for slow, said in ((INITIALIZE, "until it is loaded"), (RENDER, "remote_timeout_s")):
        far = LlmdTokenizer(address, timeout_s=0.3)
        service.fails = {slow: wait}
        with pytest.raises(Unavailable, match=f"{slow}: nothing within 0.3 s.*{said}"):
            far.text("a", model="m", add_special_tokens=True)
        far.close()
    go_on.set()


def test_while_one_model_is_loaded_others_wait_and_known_ones_do_not(service, address):
    service.models = ("m", "n")
    far = LlmdTokenizer(address, timeout_s=60)
    want = far.text("a", model="m", add_special_tokens=True)
    begun, go_on = threading.Event(), threading.Event()

    def wait():
        begun.set()
        go_on.wait(60)

    service.fails = {INITIALIZE: wait}
    with ThreadPoolExecutor(2) as threads:
        loading = threads.submit(far.text, "a", model="n", add_special_tokens=True)
        assert begun.wait(30)
        assert far.text("a", model="m", add_special_tokens=True) == want
        far._timeout_s = 0.2
        with pytest.raises(Unavailable, match="loading another"):
            far.text("a", model="o", add_special_tokens=True)
        assert service.calls(INITIALIZE) == 2
        go_on.set()
        assert loading.result() == want
    far.close()


def test_closing_ends_what_is_under_way(service, address):
    begun, go_on = threading.Event(), threading.Event()

    def wait():
        begun.set()
        go_on.wait(60)

    service.fails = {RENDER: wait}
    far = LlmdTokenizer(address, timeout_s=60)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(far.text, "a", model="m", add_special_tokens=True)
        assert begun.wait(30)
        far.close()
        with pytest.raises(Unavailable):
            asked.result(30)
        go_on.set()
    far.close()
    with pytest.raises(Unavailable, match="closed"):
        far.text("a", model="m", add_special_tokens=True)
