"""OpenAI request bodies, read as vLLM reads them as far as they decide which cached blocks fit.

Fields that decide nothing of that (``temperature``, ``stream``, ...) are passed over, whatever they hold. Fields of our
own, beside the ones of the API: ``token_ids``, ``lora_name``, ``mm_items``.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from scorer.errors import InvalidRequest

MAX_PROMPTS = 4096
"""Prompts in one request."""


class Identity(msgspec.Struct, frozen=True):
    """What a prompt belongs to."""

    model: str
    """As the request names it: also an alias, or a LoRA adapter."""
    lora_name: str | int | None = None
    cache_salt: str | None = None
    mm_items: list[tuple[str, int, int]] = []
    """(identifier, first token, number of tokens) of each image or the like."""


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


class _Body(msgspec.Struct):
    model: str
    prompt: Any = None
    token_ids: Any = None
    messages: list[dict[str, Any]] | None = None
    lora_name: str | int | None = None
    cache_salt: str | None = None
    mm_items: list[tuple[str, int, int]] = []
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None


def read_request(body: Mapping[str, Any]) -> Request:
    """Read the body of ``/v1/completions`` or ``/v1/chat/completions``. Raises `InvalidRequest`, which names the field.

    ``truncate_prompt_tokens`` of -1 means the model's length to vLLM, which is not known here: the prompt is left as it
    is, as one that fits would be there.
    """
    try:
        read = msgspec.convert(body, _Body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(field_of(error)) from error
    given = [name for name in ("token_ids", "prompt", "messages") if getattr(read, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidRequest(f"token_ids, prompt or messages: expected one of them, got {found}")
    identity = Identity(read.model, read.lora_name, read.cache_salt, read.mm_items)
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
        prompts=[] if chat is not None else _prompts(getattr(read, given[0]), given[0]),
        chat=chat,
        add_special_tokens=read.add_special_tokens,
        truncate_prompt_tokens=read.truncate_prompt_tokens,
        truncation_side=read.truncation_side or "left",
    )


def field_of(error: msgspec.ValidationError) -> str:
    """Give what was wrong with a body, the field first."""
    what, _, where = str(error).partition(" - at `$")
    return f"{where.rstrip('`').lstrip('.') or 'body'}: {what}"


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
