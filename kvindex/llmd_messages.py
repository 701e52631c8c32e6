"""Chat messages as llm-d's tokenization service takes them, and the images that it finds there.

Its messages have a role, a content and tool calls, and no place for all else that vLLM hands to templates.
"""

from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any

import msgspec

from scorer import InvalidRequest, Unavailable

MAX_ITEMS = 1024
"""Images and the like in one prompt."""

# by the type of a part that vLLM takes for text, where it is
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
# by role, what reaches templates and would be lost
_LOST = {"assistant": ("reasoning", "reasoning_content"), "developer": ("tools",)}
_REMEDY = "llm-d's service has no place for it: have a vLLM asked (tokenizers.remote_url), or a tokenizer here"


def as_llmd(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give the fields of a `ChatMessage` for each message.

    Raises `InvalidRequest` for what is no message, and for what the service would leave out of its text. The ids of
    tool results are left out nevertheless: few templates write them, and all that is before them counts.
    """
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def as_json(field: str, value: Any) -> str:  # noqa: ANN401  (what a client sent)
    """Give a value as JSON text. Raises `InvalidRequest` with the field's name."""
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field}: expected Unicode text and values that JSON has: {error}") from error


def items_of(features: Any, length: int) -> list[tuple[str, int, int]]:  # noqa: ANN401  (a message)
    """Give the images of a prompt of `length` tokens: (identifier, first token, number of tokens).

    `features` is a `MultiModalFeatures`. Raises `Unavailable` for an answer that cannot be.
    """
    found: list[tuple[str, int, int]] = []
    for kind in sorted({*features.mm_hashes, *features.mm_placeholders}):
        names = features.mm_hashes[kind].values if kind in features.mm_hashes else []
        ranges = features.mm_placeholders[kind].ranges if kind in features.mm_placeholders else []
        if len(names) != len(ranges) or len(found) + len(names) > MAX_ITEMS:
            raise Unavailable(
                f"{len(names)} hashes for {len(ranges)} ranges of {short(kind)}: as many expected, at most {MAX_ITEMS}"
            )
        found += [(name, one.offset, one.length) for name, one in zip(names, ranges, strict=True)]
    for name, first, count in found:
        if not name or first < 0 or count < 1 or first + count > length:
            raise Unavailable(f"{short(name)} is said to be {count} tokens from {first} on, of {length}")
    return found


def _message(message: Mapping[str, Any], at: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{at}.role: expected text, got {short(role)}")
    for name in ("name", *_LOST.get(role, ())):
        if message.get(name):
            raise InvalidRequest(f"{at}.{name}: {_REMEDY}")
    made: dict[str, Any] = {"role": role}
    content = message.get("content")
    if isinstance(content, str):
        made["content"] = content
    elif isinstance(content, list):
        made["content_parts"] = [
            part for number, said in enumerate(content) if (part := _part(said, f"{at}.content[{number}]")) is not None
        ]
    elif content is not None:
        raise InvalidRequest(f"{at}.content: expected text or a list of parts, got {type(content).__name__}")
    if role == "assistant" and message.get("tool_calls"):
        made["tool_calls_json"] = as_json(f"{at}.tool_calls", message["tool_calls"])
    return made


def _part(part: Any, at: str) -> dict[str, Any] | None:  # noqa: ANN401
    """One part, or nothing where vLLM leaves it out."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise InvalidRequest(f"{at}: expected text or an object, got {type(part).__name__}")
    kind = part.get("type")
    if kind == "image_url":
        return _image(part, at)
    if not isinstance(kind, str) or kind not in _TEXTS:
        raise InvalidRequest(
            f"{at}: a part of type {short(kind)}; expected one of {', '.join(_TEXTS)}, image_url. How many tokens a "
            "sound or the like becomes is known to the engine: send token_ids and mm_items"
        )
    text = part.get(_TEXTS[kind])
    if text is None and kind in ("text", "refusal"):
        return None
    if not isinstance(text, str):
        raise InvalidRequest(f"{at}.{_TEXTS[kind]}: expected text, got {short(text)}")
    return {"type": "text", "text": text}


def _image(part: dict[str, Any], at: str) -> dict[str, Any]:
    said = part.get("image_url")
    url = said.get("url") if isinstance(said, dict) else said
    if not isinstance(url, str):
        raise InvalidRequest(f"{at}.image_url.url: expected text, got {short(url)}")
    if part.get("uuid") is not None:
        # the engine names the image by it
        raise InvalidRequest(f"{at}.uuid: {_REMEDY}, or send token_ids and mm_items")
    return {"type": "image_url", "image_url": {"url": url}}
