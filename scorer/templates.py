"""Chat templates: where they are found, what they are given, and the text that they make."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec

from scorer.errors import InvalidRequest, NoTokenizer, TemplateFailed
from scorer.messages import Message, normalised, normalised_tools
from scorer.rendering import Renderer

MAX_TEMPLATE_BYTES = 1024 * 1024
MAX_CONFIG_BYTES = 64 * 1024 * 1024

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What `apply_chat_template` takes for itself, or fills in: as variables they would mean something else to an engine.
_NOT_VARIABLES = {"chat_template", "tokenize", "conversation", "messages", "padding", "truncation", "max_length"} | {
    "tokenizer_kwargs",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
}
# As in transformers (utils/chat_template_utils.py), so that templates that look for odd things see the same.
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")

Variables: TypeAlias = dict[str, Any]


class Templates(NamedTuple):
    """The chat templates of one model."""

    named: dict[str, str]
    """By name; ``default`` is the one that most models have."""
    processor: str | None
    """The one of ``chat_template.json``, which engines prefer where a request has no tools."""
    looked: tuple[str, ...]
    """Where they were looked for."""

    def choose(self, *, tools: bool) -> str:
        """Give the template that an engine takes. Raises `NoTokenizer` where there is none."""
        if self.processor is not None and not tools:
            return self.processor
        names = ("tool_use", "default") if tools else ("default",)
        for name in names:
            if name in self.named:
                return self.named[name]
        if self.processor is not None:
            return self.processor
        found = f" (only {', '.join(sorted(self.named))})" if self.named else ""
        raise NoTokenizer(f"no chat template{found}; looked at {', '.join(self.looked)}")


def find_templates(folder: Path, given: str = "") -> Templates:
    """Find the chat templates in a model's folder, or take the one in a file that is `given`.

    As transformers does: ``chat_template.jinja`` (and ``additional_chat_templates/NAME.jinja``) before
    ``tokenizer_config.json``, which has one text or a list of named ones. Raises `NoTokenizer` for files that cannot be
    used.
    """
    if given:
        return Templates({"default": _read(Path(given), MAX_TEMPLATE_BYTES)}, None, (given,))
    single, config, legacy = (
        folder / name for name in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
    )
    named: dict[str, str] = {}
    if single.is_file():
        named["default"] = _read(single, MAX_TEMPLATE_BYTES)
    more = folder / "additional_chat_templates"
    if more.is_dir():
        for path in sorted(more.glob("*.jinja")):
            named[path.stem] = _read(path, MAX_TEMPLATE_BYTES)
    if not named:
        named = _named(read_json(config).get("chat_template"), config)
    processor = _named(read_json(legacy).get("chat_template"), legacy).get("default")
    return Templates(named, processor, (str(single), str(config), str(legacy)))


def special_tokens(folder: Path) -> dict[str, str]:
    """Give a model's special tokens by the names under which templates know them."""
    config = tokenizer_config(folder)
    found = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Give what a folder says of its tokenizer beside ``tokenizer.json``, as transformers reads it."""
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    # older folders have the special tokens in a file of their own, which then goes first
    return config | read_json(folder / "special_tokens_map.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with one object; nothing where there is no file. Raises `NoTokenizer` for anything else."""
    if not path.is_file():
        return {}
    try:
        found = msgspec.json.decode(_read(path, MAX_CONFIG_BYTES))
    except (msgspec.DecodeError, RecursionError) as error:
        raise NoTokenizer(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise NoTokenizer(f"{path}: expected an object, got {type(found).__name__}")
    return found


def render_chat(
    renderer: Renderer,
    template: str,
    messages: Sequence[Message],
    *,
    parts: bool | None,
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> str:
    """Give the text of some messages: what vLLM hands its tokenizer, byte for byte.

    `parts` says how contents reach the template, None to decide it by the template. `variables` are those that the
    template gets beside messages and tools, special tokens among them.

    Raises `TemplateFailed` for what the template refuses, `InvalidRequest` for messages that are none.
    """
    for name in variables:
        if name in _NOT_VARIABLES:
            raise InvalidRequest(f"chat_template_kwargs.{name}: not a variable of templates")
    if not messages:
        raise InvalidRequest("messages: expected at least one")
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest("continue_final_message: not together with add_generation_prompt, set that to false")
    if parts is None:
        parts = renderer.wants_parts(template)
    chat = [_named_reasoning(message) for message in normalised(messages, parts=parts)]
    final = _open(chat[-1], template) if continue_final_message else ""
    given = {"tools": normalised_tools(tools), "documents": None} | dict(variables)
    text = renderer.render(template, given | {"messages": chat, "add_generation_prompt": add_generation_prompt})
    return _cut(text, final) if continue_final_message else text


def _named_reasoning(message: Variables) -> Variables:
    """Give reasoning under all names for it, as transformers does."""
    said = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if said is None else {"thinking": said, **message, "reasoning_content": said}


def _open(message: Variables, template: str) -> str:
    """Mark the end of the last message's text, and give the text."""
    content = message["content"]
    if "content" not in template:
        raise TemplateFailed("continue_final_message: the chat template knows no content")
    if isinstance(content, str):
        message["content"] = content + _TAG
        return content
    for part in reversed(content):
        if "text" in part:
            text: str = part["text"]
            part["text"] = text + _TAG
            return text
    raise InvalidRequest("continue_final_message: the last message has no text to continue")


def _cut(text: str, final: str) -> str:
    tag = _TAG.strip()
    if final.strip() not in text or tag not in text:
        raise TemplateFailed("continue_final_message: the chat template drops the last message, or a part of it")
    end = text.rindex(tag)
    kept = text[:end]
    # a template that strips its messages took the tag's blank too, and what stood before the tag would be stripped
    return kept if text.startswith(_TAG, end) else kept.rstrip()


def _named(found: Any, path: Path) -> dict[str, str]:  # noqa: ANN401  (whatever the file has)
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    entries = found if isinstance(found, list) else []
    named = {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
    if not named or len(named) != len(entries):
        raise NoTokenizer(f"{path}: chat_template: expected a text, or a list of objects with name and template")
    return named


def _read(path: Path, limit: int) -> str:
    try:
        size = path.stat().st_size
        if size > limit:
            raise NoTokenizer(f"{path}: {size} bytes, at most {limit} are read")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NoTokenizer(f"{path}: {error}") from error
