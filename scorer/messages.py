"""Chat messages and tools as a client sends them, turned into what vLLM gives its chat templates.

Read in vLLM's `renderers/chat_utils/` and `entrypoints/openai/chat_completion/protocol.py`, whose results this repeats:
a template that sees one key more may write other text.
"""

import json
from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any, TypeAlias

from scorer.errors import InvalidRequest

Message: TypeAlias = Mapping[str, Any]

_BILL = "x-anthropic-billing-header"
# by the type of a part, where its text is
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}


def normalised(messages: Sequence[Message], *, parts: bool) -> list[dict[str, Any]]:
    """Give the messages as chat templates take them: contents as text, or in `parts`.

    Raises `InvalidRequest` for what is no message, and for images and the like: how many tokens they become is known to
    the engine only.
    """
    return [_message(message, f"messages[{number}]", parts=parts) for number, message in enumerate(messages)]


def normalised_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Give the tools with the keys, and in the order, in which vLLM's own types have them."""
    if tools is None:
        return None
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise InvalidRequest(f"tools: expected a list, got {type(tools).__name__}")
    return [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]


def _message(message: Message, at: str, *, parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{at}: expected an object, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{at}.role: expected text, got {short(role)}")
    said = message.get("content")
    content = _content(_without_bill(said) if role == "system" else said, f"{at}.content", parts=parts)
    # tool results are joined for templates that want parts too, unless there is more than text
    if role == "tool" and isinstance(content, list) and all(part["type"] == "text" for part in content):
        content = "\n".join(part["text"] for part in content)
    made: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant":
        calls = _tool_calls(message.get("tool_calls"), f"{at}.tool_calls")
        if calls:
            made["tool_calls"] = calls
        reasoning = message.get("reasoning")
        if reasoning is None:
            reasoning = message.get("reasoning_content")
        if reasoning is not None:
            made["reasoning"] = made["reasoning_content"] = reasoning
    elif role == "tool" and message.get("tool_call_id") is not None:
        made["tool_call_id"] = message["tool_call_id"]
    elif role == "developer" and message.get("tools") is not None:
        made["tools"] = message["tools"]
    if isinstance(message.get("name"), str):
        made["name"] = message["name"]
    return made


def _content(content: Any, at: str, *, parts: bool) -> str | list[dict[str, Any]]:  # noqa: ANN401  (what a client sent)
    if content is None:
        return [] if parts else ""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if parts else content
    if not isinstance(content, Sequence):
        raise InvalidRequest(f"{at}: expected text or a list of parts, got {type(content).__name__}")
    found = [_part(part, f"{at}[{number}]") for number, part in enumerate(content)]
    if parts:
        return [part for part in found if part is not None]
    texts = (part.get("text", part.get("name", "")) for part in found if part is not None)
    # empty texts go without a line of their own
    return "\n".join(filter(None, texts))


def _without_bill(content: Any) -> Any:  # noqa: ANN401
    """A system message without the line that Claude Code changes in every request, as newer engines drop it.

    For one that keeps it nothing is lost: what follows that line is never found in its cache again.
    """
    if isinstance(content, str):
        return content.partition("\n")[2] if content.startswith(_BILL) else content
    if not isinstance(content, list):
        return content
    kept = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        if isinstance(text, str) and text.startswith(_BILL):
            rest = text.partition("\n")[2]
            if rest:
                kept.append(rest if isinstance(part, str) else {**part, "text": rest})
        else:
            kept.append(part)
    return kept


def _part(part: Any, at: str) -> dict[str, Any] | None:  # noqa: ANN401
    """One part as text, or nothing where it has none."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{at}: expected text or an object, got {type(part).__name__}")
    kind = part.get("type")
    if kind == "tool_reference" and isinstance(part.get("name"), str):
        return {"type": kind, "name": part["name"]}
    if not isinstance(kind, str) or kind not in _TEXTS:
        raise InvalidRequest(
            f"{at}: a part of type {short(kind)}; expected one of {', '.join(_TEXTS)}. How many tokens an image or "
            "sound becomes is known to the engine: send token_ids and mm_items"
        )
    text = part.get(_TEXTS[kind])
    if text is None and kind in ("text", "refusal"):
        return None
    if not isinstance(text, str):
        raise InvalidRequest(f"{at}.{_TEXTS[kind]}: expected text, got {short(text)}")
    return {"type": "text", "text": text}


def _tool_calls(calls: Any, at: str) -> list[dict[str, Any]]:  # noqa: ANN401
    if calls is None:
        return []
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise InvalidRequest(f"{at}: expected a list, got {type(calls).__name__}")
    made = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            raise InvalidRequest(f"{at}[{number}]: expected an object of type function with a function in it")
        made.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}})
    return made


def _arguments(said: Any) -> dict[str, Any]:  # noqa: ANN401
    """Arguments as an object. The engine takes what is none for an empty one, so that the dialogue can go on."""
    if isinstance(said, str) and said:
        try:
            said = json.loads(said)
        except (ValueError, RecursionError):
            return {}
    return said if isinstance(said, dict) else {}


def _tool(tool: Any, at: str) -> dict[str, Any]:  # noqa: ANN401
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{at}: expected an object with a function in it")
    if not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{at}.function.name: expected text, got {short(function.get('name'))}")
    made = {name: function.get(name) for name in ("name", "description", "parameters")}
    deferred = tool.get("defer_loading")
    later = {"strict": function.get("strict"), "defer_loading": function.get("defer_loading", deferred)}
    made |= {name: value for name, value in later.items() if value is not None}
    whole = {"type": "function", "function": made}
    return whole if deferred is None else whole | {"defer_loading": deferred}
