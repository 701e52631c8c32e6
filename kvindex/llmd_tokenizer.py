"""llm-d's tokenization service, asked over gRPC: `tokenization.TokenizationService` of llm-d-kv-cache.

Read in its `services/uds_tokenizer` and `api/tokenizerpb` (up to 7be76e1, June 2026). It is vLLM's own rendering
without an engine, mostly as a sidecar on a unix socket. This module needs the packages of the extra ``grpc``.
"""

import threading
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias
from urllib.parse import quote, unquote, urlsplit

import grpc
from google.protobuf.message import DecodeError

from kvindex.errors import UserError
from kvindex.llmd_messages import as_json, as_llmd, items_of
from kvindex.rpc.schema import TOKENIZATION, Schema
from scorer import ChatBody, InvalidRequest, ModelSettings, NoTokenizer, Rendered, Tokenizers, Unavailable

MAX_MESSAGE_BYTES = 100 * 1024 * 1024
"""Of a question: what the service takes."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_IDS = 8 * 1024 * 1024
"""Four for each character of the longest text that is tokenized by default."""
MAX_MODELS = 1024
"""Models that are known to be loaded there."""
MAX_NAME = 256
"""Characters of a model's name that a request may have."""
MAX_PATH_BYTES = 107
"""What a unix socket's address holds on Linux."""

_OPTIONS = (
    # one that was started again is found within a second, not two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # as llm-d's own client: the service refuses those that ask more often
    ("grpc.keepalive_time_ms", 600_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # a connection of our own, which ends when it is closed
    ("grpc.use_local_subchannel_pool", 1),
)

_MOST_SAID = 300

_Ids: TypeAlias = "array[int]"


class _Failed(InvalidRequest):
    """The service says INTERNAL, which it does for whatever it refuses, also for a model that it has not loaded."""


class LlmdTokenizer:
    """Tokenizes, and renders chat messages, as llm-d's service at `url` does. Safe to use from many threads.

    `url` is ``grpc://host:port``, ``unix:///path`` or ``grpc+unix:///path``. A model is loaded there before its first
    question, and again when the service has been started anew; one at a time, since it may be downloaded first. All
    that a question takes is within `timeout_s`.

    The service knows models by the names of their files: `tokenizers` says which model a name means, and `models` what
    engines were told about it.

    Raises `UserError` for a URL that is none.
    """

    def __init__(
        self,
        url: str,
        *,
        tokenizers: Tokenizers | None = None,
        models: Mapping[str, ModelSettings] | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._tokenizers = tokenizers or Tokenizers()
        self._models = dict(models or {})
        self._loaded: set[str] = set()
        self._loading = threading.Lock()
        self._methods = Schema(TOKENIZATION).methods
        answers = ("grpc.max_receive_message_length", MAX_ANSWER_BYTES)
        self._channel = grpc.insecure_channel(_target(url), options=[*_OPTIONS, answers])
        self._calls = {
            name: self._channel.unary_unary(f"/{method.service}/{name}") for name, method in self._methods.items()
        }

    def close(self) -> None:
        """Close the connection. Questions under way raise `Unavailable`."""
        self._channel.close()

    def text(self, text: str, *, model: str, add_special_tokens: bool) -> _Ids:
        """Give the token ids of a text."""
        there, _ = self._settings(model)
        if add_special_tokens:
            return self._ids(self._ask("RenderCompletion", {"model_name": there, "prompt": text}, model).token_ids)
        # the other one cannot be told to leave them out; this one would leave them out by itself where a text has one
        asked = {"model_name": there, "input": text, "add_special_tokens": False}
        return self._ids(self._ask("Tokenize", asked, model).input_ids)

    def chat(self, chat: ChatBody, *, model: str, add_special_tokens: bool) -> Rendered:
        """Give the token ids of messages, and the images there by the names that engines have for them."""
        there, settings = self._settings(model)
        if add_special_tokens:
            raise InvalidRequest(f"add_special_tokens: {self._url} cannot be asked for them in chats; leave it out")
        if chat.chat_template is None and (settings.chat_template or settings.content_format != "auto"):
            raise NoTokenizer(
                f"model {model!r}: {self._url} cannot be told its chat_template and content_format; put its tokenizer "
                "into one of tokenizers.folders"
            )
        variables = settings.chat_template_kwargs | chat.variables()
        asked = {
            "model_name": there,
            "messages": as_llmd(chat.messages),
            "tools_json": as_json("tools", chat.tools) if chat.tools else None,
            "chat_template": chat.chat_template,
            "add_generation_prompt": chat.generates(),
            "continue_final_message": chat.continue_final_message,
            # it has no fields for documents and reasoning effort
            "chat_template_kwargs": as_json("chat_template_kwargs", variables) if variables else None,
        }
        answer = self._ask("RenderChatCompletion", asked, model)
        ids = self._ids(answer.token_ids)
        try:
            return Rendered(ids, items_of(answer.features, len(ids)))
        except Unavailable as error:
            raise Unavailable(f"{self._url}: images: {error}") from error

    def _settings(self, model: str) -> tuple[str, ModelSettings]:
        base = self._tokenizers.resolve(model)[0]
        settings = self._models.get(base)
        if settings is not None:
            return settings.tokenizer or base, settings
        # it takes names for paths on its side, from whoever asks us
        if len(base) > MAX_NAME or {"", ".", ".."} & set(base.split("/")):
            raise NoTokenizer(
                f"model {model[:MAX_NAME]!r}: {self._url} is asked for NAME or ORGANISATION/NAME, and for paths that "
                "tokenizers.models names"
            )
        return base, ModelSettings()

    def _ask(self, name: str, asked: dict[str, Any], model: str) -> Any:  # noqa: ANN401  (a message)
        until = time.monotonic() + self._timeout_s
        try:
            question = self._methods[name].request(**asked).SerializeToString()
        except (TypeError, ValueError) as error:  # UnicodeEncodeError, and messages over 2 GiB
            raise InvalidRequest(f"prompt, messages or model: expected Unicode text: {error}") from error
        if len(question) > MAX_MESSAGE_BYTES:
            raise InvalidRequest(f"prompt or messages: {len(question)} bytes, {self._url} takes {MAX_MESSAGE_BYTES}")
        there = asked["model_name"]
        new = there not in self._loaded
        if new:
            self._load(model, there, until)
        try:
            return self._answer(name, question, model, until)
        except _Failed:
            if new:
                raise
        # it may have been started again since, and have forgotten the model
        self._load(model, there, until, again=True)
        return self._answer(name, question, model, until)

    def _load(self, model: str, there: str, until: float, *, again: bool = False) -> None:
        """Have a model loaded. Raises `NoTokenizer` where the service cannot, `Unavailable` where it takes too long."""
        if not self._loading.acquire(timeout=max(0.0, until - time.monotonic())):
            raise Unavailable(f"{self._url}: it is loading another model; ask again later")
        try:
            if there in self._loaded and not again:
                return
            # the two settings are for a call that is not made
            method = self._methods["InitializeTokenizer"]
            question = method.request(model_name=there, add_generation_prompt=True).SerializeToString()
            try:
                self._answer("InitializeTokenizer", question, model, until)
            except InvalidRequest as error:
                self._loaded.discard(there)
                named = "" if there == model else f" (asked for as {there!r})"
                raise NoTokenizer(f"model {model!r}{named}: {error}; see its log") from error
            if len(self._loaded) >= MAX_MODELS:
                self._loaded.clear()
            self._loaded.add(there)
        finally:
            self._loading.release()

    def _ids(self, ids: Sequence[int]) -> _Ids:
        if len(ids) > MAX_IDS:
            raise Unavailable(f"{self._url}: an answer of {len(ids)} token ids, at most {MAX_IDS} are read")
        try:
            return array("I", ids)
        except OverflowError as error:
            raise Unavailable(f"{self._url}: token id {max(ids)}, expected at most {2**32 - 1}") from error

    def _answer(self, name: str, question: bytes, model: str, until: float) -> Any:  # noqa: ANN401  (a message)
        try:
            data = self._calls[name](question, timeout=max(0.0, until - time.monotonic()))
        except ValueError as error:  # a channel that is closed
            raise Unavailable(f"{self._url}: closed") from error
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                self._loaded.clear()
            self._refuse(error.code(), f"{self._url} {name}", error.details() or "", model)
        try:
            answer = self._methods[name].response.FromString(data)
        except (DecodeError, RecursionError) as error:
            raise Unavailable(f"{self._url}: {len(data)} bytes that are no {name}Response; is it llm-d's?") from error
        if not answer.success:
            said = answer.error_message[:_MOST_SAID]
            if not said:
                raise Unavailable(f"{self._url}: an answer to {name} that says neither success nor why; is it llm-d's?")
            raise InvalidRequest(f"{self._url} refuses {name}: {said}")
        return answer

    def _refuse(self, code: Any, place: str, details: str, model: str) -> NoReturn:  # noqa: ANN401
        status, said = grpc.StatusCode, details[:_MOST_SAID]
        if code is status.INTERNAL:
            raise _Failed(f"{place}: it refuses this, or fails: {said}")
        if code in (status.INVALID_ARGUMENT, status.OUT_OF_RANGE):
            raise InvalidRequest(f"{place}: it refuses this: {said}")
        if code in (status.NOT_FOUND, status.FAILED_PRECONDITION):
            raise NoTokenizer(f"model {model!r}: {place}: {said}")
        remedy = {
            status.DEADLINE_EXCEEDED: f"nothing within {self._timeout_s:g} s (tokenizers.remote_timeout_s); "
            "the first question of a model waits until it is loaded",
            status.UNIMPLEMENTED: f"it has no such call: take one of llm-d-kv-cache from June 2026 on: {said}",
            status.RESOURCE_EXHAUSTED: f"an answer that is too long, or too many questions: {said}",
            status.UNAVAILABLE: f"nobody answers, see whether it runs: {said}",
        }
        raise Unavailable(f"{place}: {remedy.get(code, f'{code.name}: {said}')}")


def _target(url: str) -> str:
    """Give what gRPC calls the place. Raises `UserError`."""
    wrong = f"tokenizers.remote_url: {url!r}: expected grpc://host:port or unix:///path"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"{wrong}: {error}") from error
    if parts.query or parts.fragment or parts.username is not None:
        raise UserError(wrong)
    if parts.scheme == "grpc":
        if not parts.hostname or port is None or parts.path not in ("", "/"):
            raise UserError(wrong)
        return f"dns:///{parts.netloc}"
    if parts.scheme not in ("unix", "grpc+unix") or parts.netloc or not parts.path.startswith("/"):
        raise UserError(wrong)
    path = unquote(parts.path)
    length = len(path.encode())
    if length > MAX_PATH_BYTES:
        raise UserError(f"tokenizers.remote_url: {url!r}: a path of {length} bytes, at most {MAX_PATH_BYTES} are used")
    return f"unix://{quote(path)}"
