"""From what clients send to prompts: text and chat messages, through templates and tokenizers."""

import asyncio
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, Protocol, Self, TypeAlias, TypeVar

import msgspec

from indexer import InvalidQuestion, Prompt
from scorer.errors import InvalidRequest, NoTokenizer, ScorerError, Unavailable, numbered
from scorer.prefix_store import PrefixStore, check_text
from scorer.rendering import Renderer
from scorer.requests import Body, ChatBody, Request, check_items, read_request
from scorer.templates import render_chat
from scorer.tokenizers import LoadedModel, Tokenizers

P = ParamSpec("P")
T = TypeVar("T")
Ids: TypeAlias = "list[int] | array[int]"


class Timings(msgspec.Struct):
    """Seconds spent on each stage of a question, added up over its prompts."""

    render: float = 0.0
    """Messages to text."""
    tokenize: float = 0.0
    """Text to token ids. With a remote tokenizer messages are rendered there, and it is all in here."""
    keys: float = 0.0
    """Token ids to block keys."""
    match: float = 0.0
    """Block keys to what each pod holds."""


class Rendered(NamedTuple):
    """Messages as tokens."""

    ids: Ids
    mm_items: Sequence[tuple[str, int, int]] = ()
    """(identifier, first token, number of tokens) of each image or the like that is among the messages."""


class RemoteTokenizer(Protocol):
    """Somebody else who tokenizes, asked where there is no tokenizer here. May be called from many threads.

    Both raise `NoTokenizer` for a model that he does not know, `InvalidRequest` for what he refuses, `Unavailable`
    where he does not answer.
    """

    def text(self, text: str, *, model: str, add_special_tokens: bool) -> Ids:
        """Give the token ids of a text."""

    def chat(self, chat: ChatBody, *, model: str, add_special_tokens: bool) -> Rendered:
        """Give the token ids of messages, and the images there."""


class Prompts:
    """Makes prompts of text, messages and OpenAI request bodies, as the engine would see them.

    `store` keeps the ids of known beginnings; None: every text is tokenized whole. At most `threads` questions are
    worked on by the `async` methods of a scorer, `max_waiting` more wait. Texts have at most `max_chars` characters.
    With `trust_templates` requests may bring their own chat template, as with vLLM's
    ``--trust-request-chat-template``.

    `close` ends its threads and processes, those of `store` and `renderer` too. All methods may be called from any
    thread.
    """

    def __init__(
        self,
        tokenizers: Tokenizers | None = None,
        *,
        store: PrefixStore | None = None,
        renderer: Renderer | None = None,
        remote: RemoteTokenizer | None = None,
        threads: int = 2,
        max_waiting: int = 256,
        max_chars: int = 2 * 1024 * 1024,
        trust_templates: bool = False,
    ) -> None:
        for name, value in (("threads", threads), ("max_waiting", max_waiting), ("max_chars", max_chars)):
            if value < 1:
                raise InvalidRequest(f"{name}: {value} given, expected at least 1")
        self.tokenizers = tokenizers or Tokenizers()
        self.store = store
        self._renderer = renderer or Renderer(workers=threads)
        self._remote = remote
        self._max_chars = max_chars
        self._trust_templates = trust_templates
        self._at_once = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="prompts")
        self._free = threading.BoundedSemaphore(threads + max_waiting)
        self._max_waiting = max_waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Prompts({self.tokenizers!r})"

    def close(self) -> None:
        """Finish what was begun, drop what waits, end the processes."""
        self._threads.shutdown(cancel_futures=True)
        self._renderer.close()
        if self.store is not None:
            self.store.close()

    def identity(self, model: str, lora_name: str | int | None = None) -> tuple[str, str | int | None]:
        """Give the model and the adapter that are meant: a model's name may be an alias or, as with vLLM, an adapter's.

        Raises `InvalidRequest` where two adapters are named.
        """
        base, adapter = self.tokenizers.resolve(model)
        if adapter is None:
            return base, lora_name
        if lora_name not in (None, adapter):
            raise InvalidRequest(f"lora_name: {lora_name!r}, but model {model!r} is the adapter {adapter!r}")
        return base, adapter

    def read(self, body: Mapping[str, Any] | Body, timings: Timings | None = None) -> list[Prompt]:
        """Give the prompts of an OpenAI completions or chat body as it is (`scorer.requests`).

        Raises `InvalidRequest`, `NoTokenizer` or `Unavailable`.
        """
        return self._made(read_request(body), timings if timings is not None else Timings())

    def digest(self, text: str, *, model: str) -> bool:
        """Make a text known in the background, for prompts that will begin with it; say whether it will be.

        False where too much waits already, or no store is kept. Raises `NoTokenizer`, also with a remote one.
        """
        if self.store is None:
            return False
        loaded = self.tokenizers.get(self.tokenizers.resolve(model)[0])
        return self.store.digest(text, loaded.model, tokenizer=loaded.tokenizer)

    def each(self, questions: Sequence[Mapping[str, Any] | Body | Prompt]) -> list[list[Prompt]]:
        """Give the prompts of many bodies, some made at the same time; what is a prompt already stays as it is.

        Errors begin with the number of the question.
        """

        def one(number: int) -> list[Prompt]:
            question = questions[number]
            try:
                return [question] if isinstance(question, Prompt) else self.read(question)
            except ScorerError as error:
                raise numbered(error, number) from error

        if all(isinstance(question, Prompt) for question in questions):
            return [one(number) for number in range(len(questions))]
        made: list[list[Prompt]] = []
        begun: deque[Future[list[Prompt]]] = deque()
        try:
            for number in range(len(questions)):
                # no more than all threads at a time: who asks for one meanwhile does not wait for all of these
                if len(begun) == self._at_once:
                    made.append(begun.popleft().result())
                begun.append(self._submit(one, number))
            while begun:
                made.append(begun.popleft().result())
        finally:
            for future in begun:
                future.cancel()
        return made

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do some work on the threads, off the event loop. Raises `Unavailable` where too much waits."""
        if not self._free.acquire(blocking=False):
            raise Unavailable(f"{self._max_waiting} questions wait to be tokenized; ask again later")
        try:
            future = self._submit(work, *args, **kwargs)
        except Unavailable:
            self._free.release()
            raise
        # what is given up by its caller holds its place until it is done
        future.add_done_callback(lambda _: self._free.release())
        return await asyncio.wrap_future(future)

    def _submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        try:
            return self._threads.submit(work, *args, **kwargs)
        except RuntimeError as error:
            raise Unavailable("the prompts are closed") from error

    def _made(self, request: Request, timings: Timings) -> list[Prompt]:
        who = request.identity
        model, lora = self.identity(who.model, who.lora_name)
        if request.chat is not None:
            rendered = self._chat(request.chat, request, model, timings)
            return [_prompt(rendered.ids, model, lora, request, rendered.mm_items)]
        self._check_length(sum(len(text) for text in request.prompts if isinstance(text, str)), request.field)
        found = [
            self._text(text, request, model, timings) if isinstance(text, str) else text for text in request.prompts
        ]
        return [_prompt(ids, model, lora, request) for ids in found]

    def _text(self, text: str, request: Request, model: str, timings: Timings) -> Ids:
        special = request.special(default=True)
        there = self._tokenizer(model)
        begin = time.perf_counter()
        if isinstance(there, LoadedModel):
            ids: Ids = self._encode(text, there, special=special)
        else:
            ids = there.text(text, model=request.identity.model, add_special_tokens=special)
        timings.tokenize += time.perf_counter() - begin
        return ids

    def _chat(self, chat: ChatBody, request: Request, model: str, timings: Timings) -> Rendered:
        if chat.chat_template is not None and not self._trust_templates:
            raise InvalidRequest("chat_template: requests may not bring their own here (tokenizers.trust_templates)")
        special = request.special(default=False)
        there = self._tokenizer(model)
        template = chat.chat_template or ""
        if isinstance(there, LoadedModel) and not template:
            try:
                template = there.templates.choose(tools=chat.tools is not None)
            except NoTokenizer as error:
                if self._remote is None:
                    raise NoTokenizer(f"model {model!r}: {error}") from error
                there = self._remote
        begin = time.perf_counter()
        if not isinstance(there, LoadedModel):
            far = there.chat(chat, model=request.identity.model, add_special_tokens=special)
            timings.tokenize += time.perf_counter() - begin
            return far
        text = self._render(chat, template, there)
        rendered = time.perf_counter()
        timings.render += rendered - begin
        self._check_length(len(text), "messages")
        try:
            ids = self._encode(text, there, special=special)
        except InvalidRequest as error:
            raise InvalidRequest(f"messages: as rendered: {error}") from error
        timings.tokenize += time.perf_counter() - rendered
        return Rendered(ids)

    def _render(self, chat: ChatBody, template: str, loaded: LoadedModel) -> str:
        settings = loaded.settings
        form = settings.content_format
        return render_chat(
            self._renderer,
            template,
            chat.messages,
            parts=None if form == "auto" else form == "openai",
            variables=loaded.special | settings.chat_template_kwargs | chat.variables(),
            tools=chat.tools,
            add_generation_prompt=chat.generates(),
            continue_final_message=chat.continue_final_message,
        )

    def _encode(self, text: str, loaded: LoadedModel, *, special: bool) -> "array[int]":
        tokenizer = loaded.tokenizer
        if self.store is not None:
            return self.store.encode(text, model=loaded.model, tokenizer=tokenizer, add_special_tokens=special)
        check_text(text)
        return array("I", tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def _tokenizer(self, model: str) -> LoadedModel | RemoteTokenizer:
        try:
            return self.tokenizers.get(model)
        except NoTokenizer:
            if self._remote is None:
                raise
            return self._remote

    def _check_length(self, length: int, field: str) -> None:
        if length > self._max_chars:
            raise InvalidRequest(f"{field}: {length} characters, at most {self._max_chars} are tokenized")


def _prompt(
    ids: Ids,
    model: str,
    lora_name: str | int | None,
    request: Request,
    mm_items: Sequence[tuple[str, int, int]] = (),
) -> Prompt:
    most = request.truncate_prompt_tokens
    if most is not None and 0 <= most < len(ids):
        if mm_items:
            raise InvalidRequest(f"truncate_prompt_tokens: {most}, but there are images among {len(ids)} tokens")
        ids = ids[:most] if request.truncation_side == "right" else ids[len(ids) - most :]
    who = request.identity
    check_items(who.mm_items, len(ids))
    try:
        return Prompt(ids, model, lora_name=lora_name, cache_salt=who.cache_salt, mm_items=who.mm_items or mm_items)
    except InvalidQuestion as error:
        raise InvalidRequest(str(error).replace("token_ids", request.field, 1)) from error
