"""Tokenizers of models, each loaded once from the folder that has it."""

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from tokenizers import AddedToken, Tokenizer

from scorer.errors import NoTokenizer
from scorer.places import folder_of
from scorer.templates import SPECIAL_TOKENS, Templates, find_templates, special_tokens, tokenizer_config

MAX_TOKENIZER_BYTES = 512 * 1024 * 1024
MAX_MODELS = 64
"""Tokenizers that are kept; the least recently used goes first. One takes up to some 100 MB."""
RETRY_S = 30.0
"""How long files that could not be loaded are not tried again."""

ContentFormat = Literal["auto", "string", "openai"]


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine was told about one model, where it is not what its files say."""

    tokenizer: str = ""
    """A folder, or another model's name to look for: vLLM's ``--tokenizer``."""
    chat_template: str = ""
    """A file: vLLM's ``--chat-template``."""
    content_format: ContentFormat = "auto"
    """Whether messages reach the template as text or in parts: vLLM's ``--chat-template-content-format``."""
    chat_template_kwargs: dict[str, Any] = {}
    """Vars for the template where a request has none: vLLM's ``--default-chat-template-kwargs``."""


class LoadedModel(NamedTuple):
    """What turns text into tokens for one model."""

    model: str
    folder: Path
    tokenizer: Tokenizer
    special: dict[str, str]
    """Its named special tokens (``bos_token``, ...), as chat templates know them."""
    templates: Templates
    settings: ModelSettings


class Tokenizers:
    """Finds and keeps tokenizers. Safe to use from many threads.

    `folders` are looked through in order (`scorer.places`). `models` has what engines were told otherwise. `aliases`
    has other names of models, `loras` the names of LoRA adapters, each with the model meant; an alias may be an
    adapter's.

    Files are read once: who changes them starts anew.
    """

    def __init__(
        self,
        folders: Sequence[Path | str] = (),
        *,
        models: Mapping[str, ModelSettings] | None = None,
        aliases: Mapping[str, str] | None = None,
        loras: Mapping[str, str] | None = None,
    ) -> None:
        self._folders = [Path(folder) for folder in folders]
        self._models = dict(models or {})
        self._aliases = dict(aliases or {})
        self._loras = dict(loras or {})
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._failed: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def __repr__(self) -> str:
        return f"Tokenizers({[str(folder) for folder in self._folders]}, {len(self._loaded)} loaded)"

    def resolve(self, name: str) -> tuple[str, str | None]:
        """Give the model and the LoRA adapter that requests mean by a name."""
        name = self._aliases.get(name, name)
        base = self._loras.get(name)
        if base is None:
            return name, None
        return self._aliases.get(base, base), name

    def get(self, model: str) -> LoadedModel:
        """Give the tokenizer of a model, which may take a second the first time.

        Raises `NoTokenizer` where there is none that can be used.
        """
        with self._lock:
            found = self._loaded.get(model)
            if found is not None:
                self._loaded.move_to_end(model)
                return found
        with self._loading:
            with self._lock:
                found = self._loaded.get(model)
                if found is not None:
                    return found
            found = self._load(model)
            with self._lock:
                self._loaded[model] = found
                if len(self._loaded) > MAX_MODELS:
                    self._loaded.popitem(last=False)
            return found

    def _load(self, model: str) -> LoadedModel:
        settings = self._models.get(model, ModelSettings())
        named = settings.tokenizer
        # a configured folder is no name of a request: it may be anywhere
        folder = Path(named) if named and Path(named).is_dir() else folder_of(named or model, self._folders)
        key = str(folder)
        at, why = self._failed.get(key, (0.0, ""))
        if why and time.monotonic() < at + RETRY_S:
            raise NoTokenizer(why)
        try:
            tokenizer = _tokenizer_in(folder)
            templates = find_templates(folder, settings.chat_template)
            loaded = LoadedModel(model, folder, tokenizer, special_tokens(folder), templates, settings)
        except NoTokenizer as error:
            why = f"model {model!r}: {error}"
            self._failed[key] = time.monotonic(), why
            raise NoTokenizer(why) from error
        self._failed.pop(key, None)
        return loaded


def _tokenizer_in(folder: Path) -> Tokenizer:
    """Load what transformers loads: the description, and added tokens that only the configuration names."""
    path = folder / "tokenizer.json"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise NoTokenizer(f"{path}: {error.strerror}") from error
    if size > MAX_TOKENIZER_BYTES:
        raise NoTokenizer(f"{path}: {size} bytes, at most {MAX_TOKENIZER_BYTES} are read")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise NoTokenizer(f"{path}: not a tokenizer that this version of `tokenizers` reads: {error}") from error
    # a description may say how its texts are cut to size or filled up, but engines do neither
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = tokenizer_config(folder)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for number, token in sorted(_decoder(config.get("added_tokens_decoder")).items()):
        if token.content in known:
            continue
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise NoTokenizer(
                f"{folder / 'tokenizer_config.json'}: added token {token.content!r} is {number} there, "
                f"but {tokenizer.token_to_id(token.content)} by tokenizer.json"
            )
        known.add(token.content)
    # one that is only a word of the vocabulary becomes a token that texts are parted at
    named = [config.get(name) for name in SPECIAL_TOKENS]
    for name in ("extra_special_tokens", "additional_special_tokens"):
        more = config.get(name)
        named += more if isinstance(more, list) else []
    special = [token for token in map(_special, named) if token is not None]
    tokenizer.add_tokens([token for token in special if token.content not in known])
    return tokenizer


def _decoder(named: Any) -> dict[int, AddedToken]:  # noqa: ANN401  (whatever the file has)
    found = {}
    for number, token in named.items() if isinstance(named, dict) else ():
        if number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
            found[int(number)] = _added(token, special=bool(token.get("special", False)))
    return found


def _special(token: Any) -> AddedToken | None:  # noqa: ANN401
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if isinstance(token, dict) and isinstance(token.get("content"), str):
        return _added(token, special=True)
    return None


def _added(token: dict[str, Any], *, special: bool) -> AddedToken:
    flags = {name: bool(token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
    return AddedToken(token["content"], special=special, **flags)
