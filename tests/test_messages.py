"""Messages and tools as vLLM hands them to chat templates (read in its `renderers/chat_utils/`)."""

import pytest

from scorer import InvalidRequest
from scorer.messages import normalised, normalised_tools


def text(value):
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("content", "joined", "in_parts"),
    [
        ("hello", "hello", [text("hello")]),
        (None, "", []),
        ("", "", [text("")]),
        ([], "", []),
        ([text("a"), text("b")], "a\nb", [text("a"), text("b")]),
        ([text("a"), text(""), "b"], "a\nb", [text("a"), text(""), text("b")]),
        ([{"type": "input_text", "text": "a"}], "a", [text("a")]),
        ([{"type": "refusal", "refusal": "no"}, text("a")], "no\na", [text("no"), text("a")]),
        ([{"type": "thinking", "thinking": "hm"}], "hm", [text("hm")]),
        ([{"type": "text", "text": None}, text("a")], "a", [text("a")]),
        ([{"type": "tool_reference", "name": "f"}], "f", [{"type": "tool_reference", "name": "f"}]),
    ],
)
def test_contents(content, joined, in_parts):
    message = {"role": "user", "content": content}
    assert normalised([message], parts=False) == [{"role": "user", "content": joined}]
    assert normalised([message], parts=True) == [{"role": "user", "content": in_parts}]


def test_a_message_without_content_has_an_empty_one():
    assert normalised([{"role": "assistant"}], parts=False) == [{"role": "assistant", "content": ""}]


BILL = "x-anthropic-billing-header: cc=1; cch=ab12;"


@pytest.mark.parametrize(
    ("role", "content", "kept"),
    [
        ("system", f"{BILL}\nBe kind.\nAlways.", "Be kind.\nAlways."),
        ("system", BILL, ""),
        ("system", [text(BILL), text("Be kind.")], "Be kind."),
        ("system", [text(f"{BILL}\nBe"), f"{BILL}\nkind", text("x")], "Be\nkind\nx"),
        ("system", f"a\n{BILL}\nb", f"a\n{BILL}\nb"),
        ("user", f"{BILL}\na", f"{BILL}\na"),
    ],
)
def test_a_line_that_changes_all_the_time_is_left_out(role, content, kept):
    assert normalised([{"role": role, "content": content}], parts=False)[0]["content"] == kept


def test_tool_results_are_text_for_every_template():
    result = {"role": "tool", "content": [text("a"), text("b")], "tool_call_id": "1", "name": "f", "other": 2}
    made = {"role": "tool", "content": "a\nb", "tool_call_id": "1", "name": "f"}
    assert normalised([result], parts=True) == normalised([result], parts=False) == [made]
    mixed = {"role": "tool", "content": [text("a"), {"type": "tool_reference", "name": "f"}]}
    assert normalised([mixed], parts=True)[0]["content"] == mixed["content"]


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ('{"a": 1, "b": [null]}', {"a": 1, "b": [None]}),
        ({"a": 1}, {"a": 1}),
        (None, {}),
        ("", {}),
        ("{", {}),
        ("[1]", {}),
        (5, {}),
        ("[" * 100_000, {}),
    ],
)
def test_arguments_are_an_object(said, given):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": said}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    (made,) = normalised([message], parts=False)
    assert made["tool_calls"] == [{"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}]
    # the caller's own messages stay as they are
    assert call["function"]["arguments"] == said


@pytest.mark.parametrize("calls", [None, []])
def test_no_tool_calls_leave_no_key(calls):
    assert "tool_calls" not in normalised([{"role": "assistant", "tool_calls": calls}], parts=False)[0]


def test_only_what_vllm_keeps_is_kept():
    message = {"role": "user", "content": "a", "tool_calls": [1], "reasoning": "b", "name": 5, "extra": 1}
    assert normalised([message], parts=False) == [{"role": "user", "content": "a"}]
    developer = {"role": "developer", "content": "a", "tools": [1]}
    assert normalised([developer], parts=False) == [developer]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"reasoning": "a"}, "a"),
        ({"reasoning_content": "b"}, "b"),
        ({"reasoning": "a", "reasoning_content": "b"}, "a"),
        ({"reasoning": None, "reasoning_content": "b"}, "b"),
    ],
)
def test_reasoning_has_both_names(given, kept):
    (made,) = normalised([{"role": "assistant", "content": "x", **given}], parts=False)
    assert (made["reasoning"], made["reasoning_content"]) == (kept, kept)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (["a"], r"messages\[0\]: expected an object"),
        ([{"content": "a"}], r"messages\[0\]\.role"),
        ([{"role": "user", "content": "a"}, {"role": 5}], r"messages\[1\]\.role"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": {"type": "text"}}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [5]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], r"messages\[0\]\.content\[0\]\.text"),
        ([{"role": "user", "content": ["a", {"type": "image_url", "image_url": {}}]}], r"content\[1\].*mm_items"),
        ([{"role": "user", "content": [{"type": ["x" * 500]}]}], r"content\[0\]"),
        ([{"role": "assistant", "tool_calls": "a"}], r"messages\[0\]\.tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": 1}]}], r"messages\[0\]\.tool_calls\[0\]"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom", "function": {}}]}], r"tool_calls\[0\]"),
    ],
)
def test_what_is_no_message_is_named(messages, says):
    with pytest.raises(InvalidRequest, match=says) as error:
        normalised(messages, parts=False)
    assert len(str(error.value)) < 400


def test_tools_have_the_keys_of_vllms_types_in_their_order():
    assert normalised_tools(None) is None
    assert normalised_tools([]) == []
    (made,) = normalised_tools([{"function": {"parameters": {"b": 1, "a": 2}, "name": "f", "more": 1}, "x": 1}])
    assert list(made.items()) == [
        ("type", "function"),
        ("function", {"name": "f", "description": None, "parameters": {"b": 1, "a": 2}}),
    ]
    assert list(made["function"]) == ["name", "description", "parameters"]
    (made,) = normalised_tools([{"function": {"strict": True, "name": "f"}, "defer_loading": True}])
    assert list(made["function"].items())[3:] == [("strict", True), ("defer_loading", True)]
    assert made["defer_loading"] is True


@pytest.mark.parametrize(
    ("tools", "says"),
    [("a", "tools:"), ([1], r"tools\[0\]"), ([{"function": {"name": 1}}], r"tools\[0\].function.name")],
)
def test_what_is_no_tool_is_named(tools, says):
    with pytest.raises(InvalidRequest, match=says):
        normalised_tools(tools)
