"""OpenAI request bodies, read as vLLM reads them as far as they decide which cached blocks fit.

Fields that decide nothing of that (``temperature``, ``stream``, ...) are passed over, whatever they hold. Fields of our
own, beside the ones of the API: ``token_ids``, ``lora_name``, ``mm_items``.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from indexer import ImageItem
from scorer.errors import InvalidRequest

MAX_TOKEN_ID = 2**32 - 1
MAX_PROMPTS = 4096
"""Prompts in one request."""

# what the schema says of fields whose types are found out where they are read
_TOKEN = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
_TOKENS = {"type": "array", "items": _TOKEN}
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        *({"type": "array", "items": item, "maxItems": MAX_PROMPTS} for item in ({"type": "string"}, _TOKENS)),
        _TOKENS,
        {"type": "null"},
    ]
}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CALL = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": {"type": "object"}},
    "required": ["function"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string"},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]},
        "tool_calls": {"anyOf": [{"type": "array", "items": _CALL}, {"type": "null"}]},
    },
    "required": ["role"],
}
_TOOL = {
    "type": "object",
    "properties": {
        "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
    "required": ["function"],
}


Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=512)]
"""What models, pods and adapters are called."""

Adapter: TypeAlias = Annotated[str, Meta(max_length=512)] | Annotated[int, Meta(ge=0, le=2**63 - 1)] | None
"""A LoRA adapter by name, or by number where an old engine sends no name."""

Salt: TypeAlias = Annotated[str, Meta(max_length=4096)] | None

_Place: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]
Items: TypeAlias = Annotated[
    list[tuple[Annotated[str, Meta(max_length=512)], _Place, _Place]],
    Meta(max_length=1024, description="(identifier, first token, number of tokens) of each image or the like"),
]


class Identity(msgspec.Struct, frozen=True):
    """What a prompt belongs to."""

    model: str
    """As the request names it: also an alias, or a LoRA adapter."""
    lora_name: str | int | None = None
    cache_salt: str | None = None
    mm_items: Items = []


class ChatBody(msgspec.Struct, frozen=True):
    """The messages of a request, and all that decides what text they become."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    def variables(self) -> dict[str, Any]:
        """Give the variables that templates get beside messages and tools."""
        found = dict(self.chat_template_kwargs or {})
        # fields of the request go before these
        found.pop("add_generation_prompt", None)
        found.pop("continue_final_message", None)
        if self.documents is not None:
            found["documents"] = self.documents
        if self.reasoning_effort is not None:
            found.setdefault("enable_thinking", self.reasoning_effort != "none")
            found["reasoning_effort"] = self.reasoning_effort
        return {name: value for name, value in found.items() if value not in (None, "auto")}

    def generates(self) -> bool:
        """Say whether the text ends with the beginning of an answer."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class Request(msgspec.Struct, frozen=True):
    """One question: prompts as they are, or messages."""

    identity: Identity
    field: str
    """The one that has the prompt."""
    prompts: "list[str | list[int]]" = []
    chat: ChatBody | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"

    def special(self, *, default: bool) -> bool:
        """Say whether the tokenizer adds its special tokens."""
        return default if self.add_special_tokens is None else self.add_special_tokens


class TokenBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A prompt as token ids. Unknown fields are refused: a name spelt wrong must not change an answer unseen."""

    model: Name
    token_ids: Annotated[msgspec.Raw, Meta(extra_json_schema=_TOKENS)]
    """As JSON: most of the body, and read by itself (`indexer.token_ids_of_json`)."""
    lora_name: Adapter = None
    cache_salt: Salt = None
    mm_items: Items = []


class Body(msgspec.Struct):
    """The body of ``/v1/completions`` or ``/v1/chat/completions`` as far as it decides which cached blocks fit."""

    model: Name
    prompt: Annotated[Any, Meta(extra_json_schema=_PROMPT)] = None
    token_ids: Annotated[Any, Meta(extra_json_schema=_TOKENS)] = None
    messages: list[Annotated[dict[str, Any], Meta(extra_json_schema=_MESSAGE)]] | None = None
    lora_name: Adapter = None
    cache_salt: Salt = None
    mm_items: Items = []
    tools: list[Annotated[dict[str, Any], Meta(extra_json_schema=_TOOL)]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None


def read_request(body: Mapping[str, Any] | Body) -> Request:
    """Read the body of ``/v1/completions`` or ``/v1/chat/completions``. Raises `InvalidRequest`, which names the field.

    ``truncate_prompt_tokens`` of -1 means the model's length to vLLM, which is not known here: the prompt is left as it
    is, as one that fits would be there.
    """
    try:
        read = body if isinstance(body, Body) else msgspec.convert(body, Body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(field_of(error)) from error
    given = [name for name in ("token_ids", "prompt", "messages") if getattr(read, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidRequest(f"token_ids, prompt or messages: expected one of them, got {found}")
    identity = Identity(read.model, read.lora_name, read.cache_salt, read.mm_items)
    prompts = [] if read.messages is not None else _prompts(getattr(read, given[0]), given[0])
    if read.mm_items and len(prompts) > 1:
        raise InvalidRequest(f"mm_items: given for {len(prompts)} prompts, but their places are those of one")
    chat = None
    if read.messages is not None:
        chat = ChatBody(
            messages=read.messages,
            tools=read.tools,
            documents=read.documents,
            add_generation_prompt=read.add_generation_prompt,
            continue_final_message=bool(read.continue_final_message),
            chat_template=read.chat_template,
            chat_template_kwargs=read.chat_template_kwargs,
            reasoning_effort=read.reasoning_effort,
        )
    return Request(
        identity,
        given[0],
        prompts=prompts,
        chat=chat,
        add_special_tokens=read.add_special_tokens,
        truncate_prompt_tokens=read.truncate_prompt_tokens,
        truncation_side=read.truncation_side or "left",
    )


def field_of(error: msgspec.ValidationError) -> str:
    """Give what was wrong with a body, the field first."""
    what, _, where = str(error).partition(" - at `$")
    return f"{where.rstrip('`').lstrip('.') or 'body'}: {what}"


def check_items(items: Sequence[ImageItem], length: int) -> None:
    """Raise `InvalidRequest` where the items of a prompt of `length` tokens lie over one another.

    No engine makes such a prompt, and its keys would take time with items times tokens.
    """
    covered = sum(min(first + tokens, length) - first for _, first, tokens in items if first < length)
    if covered > length:
        raise InvalidRequest(f"mm_items: {len(items)} items cover {covered} tokens of {length}; they may not overlap")


def _prompts(value: Any, field: str) -> "list[str | list[int]]":  # noqa: ANN401  (what a client sent)
    """A text, token ids, or a list of either. That ids are ids is found out where they become keys."""
    if isinstance(value, str) and field == "prompt":
        return [value]
    if not isinstance(value, list):
        raise InvalidRequest(f"{field}: expected text, token ids or a list of them, got {type(value).__name__}")
    # a list of lists is so by its first entry, all entries of each kind are looked at
    first = value[0] if value else 0
    if not isinstance(first, str | list) or field == "token_ids":
        return [value]
    for number, entry in enumerate(value):
        if not isinstance(entry, type(first)):
            raise InvalidRequest(f"{field}[{number}]: expected the same as before, got {type(entry).__name__}")
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"{field}: {len(value)} prompts, at most {MAX_PROMPTS} are answered")
    return value
