"""The tokenizer of a running vLLM, asked over HTTP: `POST /tokenize` (its `entrypoints/serve/tokenize/protocol.py`)."""

import time
from typing import Any, NoReturn

import httpx
import msgspec

from scorer import ChatBody, InvalidRequest, NoTokenizer, Rendered, Unavailable, normalised

MAX_ANSWER_BYTES = 64 * 1024 * 1024


class _Tokens(msgspec.Struct):
    tokens: list[int]


class VllmTokenizer:
    """Tokenizes, and renders chat messages, as the vLLM at `url` does. Safe to use from many threads.

    Nothing is kept: each text goes there and comes back, within `timeout_s`.
    """

    def __init__(self, url: str, *, api_key: str = "", timeout_s: float = 10.0) -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout_s)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def text(self, text: str, *, model: str, add_special_tokens: bool) -> list[int]:
        """Give the token ids of a text."""
        return self._ask({"model": model, "prompt": text, "add_special_tokens": add_special_tokens})

    def chat(self, chat: ChatBody, *, model: str, add_special_tokens: bool) -> Rendered:
        """Give the token ids of messages. Raises `InvalidRequest` for images: an answer does not say where they lie."""
        normalised(chat.messages, parts=True)
        asked = {
            "model": model,
            "messages": chat.messages,
            "tools": chat.tools,
            "add_generation_prompt": chat.generates(),
            "continue_final_message": chat.continue_final_message,
            "chat_template": chat.chat_template,
            # it has no other fields for documents and reasoning effort
            "chat_template_kwargs": chat.variables() or None,
            "add_special_tokens": add_special_tokens,
        }
        return Rendered(self._ask({name: value for name, value in asked.items() if value is not None}))

    def _ask(self, question: dict[str, Any]) -> list[int]:
        try:
            content = msgspec.json.encode(question)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"prompt: expected Unicode text and values that JSON has: {error}") from error
        until = time.monotonic() + self._timeout_s
        answer = bytearray()
        headers = {"Content-Type": "application/json"}
        try:
            with self._client.stream("POST", f"{self._url}/tokenize", content=content, headers=headers) as response:
                for part in response.iter_bytes():
                    answer += part
                    if len(answer) > MAX_ANSWER_BYTES or time.monotonic() > until:
                        raise Unavailable(f"{self._url}: an answer that is too long, or takes too long")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"{self._url}: no tokens: {str(error) or type(error).__name__}") from error
        if response.status_code != httpx.codes.OK:
            _refuse(self._url, str(question["model"]), response.status_code, bytes(answer))
        try:
            return msgspec.json.decode(answer, type=_Tokens).tokens
        except msgspec.DecodeError as error:
            raise Unavailable(f"{self._url}: an answer without tokens: {error}") from error


def _refuse(url: str, model: str, status: int, answer: bytes) -> NoReturn:
    said = answer[:300].decode(errors="replace")
    if status == httpx.codes.NOT_FOUND:
        raise NoTokenizer(f"model {model!r}: {url}/tokenize does not know it: {said}")
    if status in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
        raise InvalidRequest(f"{url}/tokenize refuses it: {said}")
    raise Unavailable(f"{url}/tokenize: status {status}: {said}")
