"""Chat templates: found as transformers finds them, and rendered byte for byte as it renders them."""

import json

import pytest
from transformers import AutoTokenizer

from scorer import InvalidRequest, NoTokenizer, TemplateFailed
from scorer.messages import normalised, normalised_tools
from scorer.render_worker import wants_parts
from scorer.rendering import Renderer
from scorer.templates import Templates, find_templates, render_chat, special_tokens

from .models import CHATML, CONFIG, DATA, NEEDS_DATA, make_folder
from .test_prefix_store import tokenizer_named

EVERYTHING = (
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}\n"
    "{%- for m in messages %}\n{{ loop.index }} {{ m | tojson }} {{ m['content'] }}\n{% endfor %}"
    "{{ tools | tojson }} {{ documents | tojson }} {{ add_generation_prompt }} {{ enable_thinking }} "
    "{% if documents is none %}no documents{% endif %}{{ dict(a=1) }}{{ dict.fromkeys(['a', 'b'], 0) }}"
)
TRIMMING = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}\n{% endfor %}"
IN_PARTS = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}\n{% endfor %}"
)
DIALOGUE = [
    {"role": "system", "content": [{"type": "text", "text": "Be <kind> & short."}, "é\u2028中"]},
    {"role": "user", "content": " What's the\n weather? "},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Zürich", "n": 1.0}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
    {"role": "assistant", "content": "Sunny.  \n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<d>", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def renderer():
    made = Renderer(workers=1, max_seconds=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("models") / "m", tokenizer_named("qwen"))
    return AutoTokenizer.from_pretrained(folder), special_tokens(folder)


@pytest.mark.parametrize("template", [CHATML, EVERYTHING, TRIMMING, IN_PARTS])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False, "documents": [{"title": "a", "text": "b"}]}])
@pytest.mark.parametrize("tools", [None, [], TOOLS])
@pytest.mark.parametrize("ending", ["prompt", "nothing", "continue"])
@pytest.mark.parametrize("length", [2, 4, 5])
def test_the_text_is_that_of_transformers(renderer, theirs, template, variables, tools, ending, length):
    tokenizer, special = theirs
    parts = wants_parts(template)
    assert parts == (template is IN_PARTS)
    ends = {"add_generation_prompt": ending == "prompt", "continue_final_message": ending == "continue"}
    want = tokenizer.apply_chat_template(
        normalised(DIALOGUE[:length], parts=parts),
        tools=normalised_tools(tools),
        chat_template=template,
        tokenize=False,
        **ends,
        **variables,
    )
    got = render_chat(
        renderer, template, DIALOGUE[:length], parts=None, variables=special | variables, tools=tools, **ends
    )
    assert got == want


@NEEDS_DATA
@pytest.mark.parametrize("name", ["llama-3-instruct", "chatml", "qwen2.5-instruct"])
@pytest.mark.parametrize("ending", ["prompt", "continue"])
def test_published_templates(renderer, theirs, name, ending):
    tokenizer, special = theirs
    template = (DATA / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    messages = [DIALOGUE[0], DIALOGUE[1], DIALOGUE[4], DIALOGUE[1], DIALOGUE[4]]
    ends = {"add_generation_prompt": ending == "prompt", "continue_final_message": ending == "continue"}
    want = tokenizer.apply_chat_template(
        normalised(messages, parts=False), chat_template=template, tokenize=False, **ends
    )
    assert render_chat(renderer, template, messages, parts=None, variables=special, tools=None, **ends) == want


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.role }}{{ m.content | length }}{% endfor %}", "drops the last message"),
        ("{{ messages | length }}", "knows no content"),
    ],
)
def test_a_message_that_is_not_there_cannot_be_continued(renderer, theirs, template, says):
    ends = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(ValueError, match="continue_final_message"):
        theirs[0].apply_chat_template(DIALOGUE[1:2], chat_template=template, tokenize=False, **ends)
    with pytest.raises(TemplateFailed, match=says):
        render_chat(renderer, template, DIALOGUE[1:2], parts=None, variables={}, tools=None, **ends)


@pytest.mark.parametrize(
    ("messages", "more", "says"),
    [
        ([], {}, "messages"),
        (DIALOGUE, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (DIALOGUE, {"variables": {"tokenize": True}}, r"chat_template_kwargs\.tokenize"),
        (DIALOGUE, {"variables": {"x": object()}}, "JSON"),
        ([{"role": "user", "content": []}], {"continue_final_message": True, "parts": True}, "no text to continue"),
    ],
)
def test_what_cannot_be_rendered_is_named(renderer, messages, more, says):
    asked = {"parts": False, "variables": {}, "tools": None, "add_generation_prompt": False}
    with pytest.raises(InvalidRequest, match=says):
        render_chat(renderer, CHATML, messages, **(asked | {"continue_final_message": False} | more))


PLACES = {
    "in the configuration": ({"chat_template": "C"}, {}),
    "a list": ({"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}, {}),
    "a list without tools": ({"chat_template": [{"name": "default", "template": "D"}]}, {}),
    "a file": ({}, {"chat_template__jinja": "F\r\n"}),
    "a file goes first": ({"chat_template": "C"}, {"chat_template__jinja": "F"}),
    "more files": (
        {"chat_template": "C"},
        {"chat_template__jinja": "F", "additional_chat_templates/tool_use__jinja": "A"},
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_templates_are_found_where_transformers_finds_them(tmp_path, name):
    config, files = PLACES[name]
    plain = {key: value for key, value in CONFIG.items() if key != "chat_template"}
    (tmp_path / "m" / "additional_chat_templates").mkdir(parents=True)
    folder = tmp_path / "m"
    tokenizer_named("qwen").save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(plain | config))
    for file, content in files.items():
        (folder / file.replace("__", ".")).write_bytes(content.encode())
    if not any("/" in file for file in files):
        (folder / "additional_chat_templates").rmdir()
    tokenizer, found = AutoTokenizer.from_pretrained(folder), find_templates(folder)
    assert found.choose(tools=False) == tokenizer.get_chat_template(None, None)
    assert found.choose(tools=True) == tokenizer.get_chat_template(None, TOOLS)


def test_a_processors_template_is_for_requests_without_tools(tmp_path):
    legacy = json.dumps({"chat_template": "P"})
    folder = make_folder(tmp_path / "m", tokenizer_named("qwen"), chat_template__json=legacy)
    found = find_templates(folder)
    assert (found.choose(tools=False), found.choose(tools=True)) == ("P", CHATML)
    alone = make_folder(tmp_path / "alone", tokenizer_named("qwen"), None, chat_template__json=legacy)
    assert find_templates(alone).choose(tools=True) == "P"


def test_a_template_that_is_given_goes_before_all(tmp_path):
    folder = make_folder(tmp_path / "m", tokenizer_named("qwen"), chat_template__json='{"chat_template": "P"}')
    (tmp_path / "given.jinja").write_text("G")
    found = find_templates(folder, str(tmp_path / "given.jinja"))
    assert (found.choose(tools=False), found.choose(tools=True)) == ("G", "G")
    with pytest.raises(NoTokenizer, match=r"nowhere\.jinja"):
        find_templates(folder, str(tmp_path / "nowhere.jinja"))


def test_no_template_names_the_places_and_what_is_there(tmp_path):
    folder = make_folder(tmp_path / "m", tokenizer_named("qwen"), {})
    with pytest.raises(NoTokenizer, match=r"chat_template\.jinja, .*tokenizer_config\.json, .*chat_template\.json"):
        find_templates(folder).choose(tools=False)
    with pytest.raises(NoTokenizer, match="only rag"):
        Templates({"rag": "x"}, None, ("here",)).choose(tools=True)


LOOP = "{% for message in messages %}BODY{% endfor %}"


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (CHATML, False),
        (LOOP.replace("BODY", "{{ message.content }}"), False),
        (LOOP.replace("BODY", "{% for c in message.content %}{{ c.text }}{% endfor %}"), True),
        (LOOP.replace("BODY", "{% for c in message['content'] %}{{ c.text }}{% endfor %}"), True),
        (LOOP.replace("BODY", "{% for c in message.content | list %}{% endfor %}"), True),
        (LOOP.replace("BODY", "{% for c in message['content'][1:] %}{% endfor %}"), True),
        (LOOP.replace("BODY", "{% for c in message.tool_calls %}{% endfor %}"), False),
        (LOOP.replace("BODY", "{% for c in message[key] %}{% endfor %}"), False),
        # what loops over the messages under another name, or over some of them
        ("{% set rest = messages[1:] %}{% for m in rest %}{% for c in m.content %}{% endfor %}{% endfor %}", True),
        (
            "{% set a = messages %}{% set b = a[1:] %}{% for m in b %}{% for c in m.content %}{% endfor %}{% endfor %}",
            True,
        ),
        ("{% for m in messages | reject('x') %}{% for c in m['content'] %}{% endfor %}{% endfor %}", True),
        ("{% for m in others %}{% for c in m.content %}{% endfor %}{% endfor %}", False),
        # a macro over something called content, as GLM's and Llama 4's templates have it
        ("{% macro say(content) %}{% for c in content %}{% endfor %}{% endmacro %}", True),
        (LOOP.replace("BODY", "{% set content = message.content %}{% for c in content %}{% endfor %}"), True),
        # other names for it are not seen by vLLM
        (LOOP.replace("BODY", "{% set said = message.content %}{% for c in said %}{% endfor %}"), False),
        # and where there is more than a name it gives up
        ("{% for a, b in messages %}{% for c in a.content %}{% endfor %}{% endfor %}", False),
        (LOOP.replace("BODY", "{% for a, b in message.content %}{% endfor %}"), False),
        ("{% set ns = namespace() %}{% set ns.m = messages %}" + LOOP.replace("BODY", "{{ message.content }}"), False),
    ],
)
def test_whether_contents_reach_a_template_in_parts(renderer, template, parts):
    assert wants_parts(template) is parts
    assert renderer.wants_parts(template) is parts
