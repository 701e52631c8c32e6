"""The bodies of questions over HTTP: read once, strictly, in the form that they have."""

import asyncio
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from indexer import InvalidQuestion, Prompt, token_ids_of_json
from scorer import (
    MAX_PROMPTS,
    Body,
    InvalidRequest,
    Name,
    PrefixScorer,
    Timings,
    TokenBody,
    check_items,
    field_of,
    numbered,
)

_NULL = msgspec.Raw(b"null")
_SHORT_BYTES = 65_536
"""Of a row of token ids: what the event loop reads itself, in a tenth of a millisecond or so."""
MOST_QUESTIONS = 1_024
"""Questions of one batch."""
MOST_VALUES = 262_144
"""Values of one body beside token ids: more would hold up everything else for longer than a probe should wait."""

Pods: TypeAlias = (
    Annotated[list[Name], Meta(max_length=16_384, description="Ask for these pods only, by any of their names")] | None
)


class ScoreTokens(TokenBody, kw_only=True, forbid_unknown_fields=True):
    """Which pods hold how much of these tokens?"""

    pods: Pods = None
    holders_only: bool = False
    """Whether pods that hold nothing are left out of the matches: less to send where there are many."""
    timings: bool = False
    """Whether the answer says the seconds of each stage."""


class ScoreText(Body, kw_only=True):
    """The same for text: the body of ``/v1/completions`` or ``/v1/chat/completions`` as it is.

    Fields that do not decide which blocks fit are passed over.
    """

    pods: Pods = None
    holders_only: bool = False
    timings: bool = False


_Rank: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Tokens: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class RoutedTokens(TokenBody, kw_only=True, forbid_unknown_fields=True):
    """A prompt, as tokens, is sent to this pod now."""

    pod: Name
    rank: _Rank | None = None


class RoutedText(Body, kw_only=True):
    """The same for text: an OpenAI body as it is, and the pod."""

    pod: Name
    rank: _Rank | None = None


class ObserveTokens(RoutedTokens, kw_only=True, forbid_unknown_fields=True):
    """The pod reused so many tokens of the prompt."""

    cached_tokens: _Tokens


class ObserveText(RoutedText, kw_only=True):
    """The same for text: an OpenAI body as it is, the pod and the number."""

    cached_tokens: _Tokens


class ScoreBatch(msgspec.Struct, forbid_unknown_fields=True):
    """Many questions at once."""

    questions: Annotated[list[msgspec.Raw], Meta(max_length=MOST_QUESTIONS)]
    """Each is what `/v1/score` takes."""


OfTokens = TypeVar("OfTokens", bound=TokenBody)
OfText = TypeVar("OfText", bound=Body)
Question: TypeAlias = TokenBody | Body


class _Form(msgspec.Struct):
    """What tells the forms apart; all else is passed over."""

    token_ids: msgspec.Raw = _NULL
    prompt: msgspec.Raw = _NULL


class _Objects(msgspec.Struct):
    """A batch whose questions are counted, and no more."""

    questions: Annotated[list[_Form], Meta(max_length=MOST_QUESTIONS)]


class Reader(Generic[OfTokens, OfText]):
    """Reads bodies of one kind."""

    def __init__(self, tokens: type[OfTokens], text: type[OfText]) -> None:
        self._strict = msgspec.json.Decoder(tokens)
        self._loose = msgspec.json.Decoder(text)
        self._known = ", ".join(sorted(field.name for field in msgspec.structs.fields(tokens)))

    def read(self, body: bytes | msgspec.Raw, *, max_tokens: int) -> OfTokens | OfText:
        """Read one, at most so many tokens where it has ids. Raises `InvalidRequest`, which names the field."""
        try:
            _check_values(body, max_tokens)
            try:
                return self._read(body)
            except msgspec.ValidationError as error:
                if "got `float`" not in str(error):
                    raise
            return self._read(_with_whole_fields(body))
        except msgspec.ValidationError as error:
            raise InvalidRequest(self._said(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _no_json(error) from error

    async def aread(self, body: bytes, *, max_tokens: int) -> OfTokens | OfText:
        """Do what `read` does; a long body is read in a thread, so that the event loop goes on."""
        if len(body) <= 2 * MOST_VALUES:
            return self.read(body, max_tokens=max_tokens)
        return await asyncio.to_thread(self.read, body, max_tokens=max_tokens)

    def _read(self, body: bytes | msgspec.Raw) -> OfTokens | OfText:
        wrong: msgspec.ValidationError | None = None
        try:
            question = self._strict.decode(body)
            if question.token_ids != _NULL:
                return question
        except msgspec.ValidationError as error:  # of the other form, or of neither
            wrong = error
        form = _FORM.decode(body)
        if wrong is not None and form.token_ids != _NULL:
            raise wrong
        text = self._loose.decode(body)
        bytes(body).decode()  # also where nobody reads it, JSON is UTF-8
        if isinstance(text.prompt, list) and text.prompt and not isinstance(text.prompt[0], str):
            said = bytes(form.prompt)
            if b"true" in said or b"false" in said:  # to Python they are numbers
                _refuse_booleans(text.prompt, "$.prompt")
            if any(sign in said for sign in (b".", b"e", b"E")):
                text.prompt = _with_whole(text.prompt)
        return text

    def _said(self, error: msgspec.ValidationError) -> str:
        said = str(error)
        if said.startswith("Object contains unknown field `"):
            name = said.split("`")[1]
            return f"{name[:80]}: unknown field beside token_ids; known are {self._known}"
        return field_of(error)


def _refuse_booleans(row: list[Any], at: str) -> None:
    """Raise `ValidationError`, with the place, where there is one among the token ids of a prompt or of several."""
    for number, value in enumerate(row):
        if isinstance(value, bool):
            raise msgspec.ValidationError(f"Expected `int`, got `bool` - at `{at}[{number}]`")
        if isinstance(value, list):
            _refuse_booleans(value, f"{at}[{number}]")


def read_batch(body: bytes, *, max_tokens: int) -> list[ScoreTokens | ScoreText]:
    """Read the questions of a batch. Raises `InvalidRequest`, which names question and field."""
    try:
        if len(body) > 2 * MOST_VALUES:
            _check_most(body, b"[{")
            _OBJECTS.decode(body)
        batch = _BATCH.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(field_of(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_json(error) from error
    asked, prompts = [], 0
    for number, question in enumerate(batch.questions):
        try:
            asked.append(SCORE.read(question, max_tokens=max_tokens))
            prompts = _prompts_up_to(asked[-1], prompts)
        except InvalidRequest as error:
            raise numbered(error, number, "questions") from error
    return asked


def _prompts_up_to(question: Question, before: int) -> int:
    """Give how many prompts a batch has with this question. Raises `InvalidRequest`."""
    said = question.prompt if isinstance(question, Body) else None
    count = before + (len(said) if isinstance(said, list) and said and isinstance(said[0], str | list) else 1)
    if count > MAX_PROMPTS:
        raise InvalidRequest(f"prompt: {count} prompts up to here, at most {MAX_PROMPTS} are answered")
    return count


def prompt_of(question: TokenBody, scorer: PrefixScorer) -> Prompt:
    """Give the prompt of a question with token ids. Raises `InvalidRequest`."""
    model, lora = scorer.prompts.identity(question.model, question.lora_name)
    salt, items = question.cache_salt, question.mm_items
    try:
        ids = token_ids_of_json(question.token_ids)
        prompt = Prompt(ids, model, lora_name=lora, cache_salt=salt, mm_items=items)
    except InvalidQuestion as error:
        raise InvalidRequest(str(error)) from error
    if items:
        check_items(items, prompt.length)
    return prompt


async def prompts_of(
    question: Question, scorer: PrefixScorer, timings: Timings | None = None, *, max_tokens: int
) -> list[Prompt]:
    """Give the prompts of a question; text becomes tokens off the event loop. Raises `ScorerError`."""
    if isinstance(question, TokenBody):
        if memoryview(question.token_ids).nbytes <= _SHORT_BYTES:
            prompt = prompt_of(question, scorer)
        else:
            prompt = await asyncio.to_thread(prompt_of, question, scorer)
        check_length("token_ids", prompt.length, max_tokens)
        return [prompt]
    prompts = await scorer.prompts.run(scorer.prompts.read, question, timings)
    check_length(field_with_prompt(question), sum(prompt.length for prompt in prompts), max_tokens)
    return prompts


def field_with_prompt(question: Question) -> str:
    """Give the name of the field that has the prompt."""
    if isinstance(question, TokenBody):
        return "token_ids"
    return "messages" if question.messages is not None else "prompt"


def check_length(field: str, length: int, max_tokens: int) -> None:
    """Raise `InvalidRequest` for more tokens than are answered."""
    if length > max_tokens:
        raise InvalidRequest(f"{field}: {length} tokens, at most {max_tokens} are answered")


def _check_values(body: bytes | msgspec.Raw, max_tokens: int) -> None:
    """Raise `InvalidRequest` for a body that would become too many objects, before it does.

    Nothing else gets on meanwhile, and an object takes many times the bytes of its text. Rows of token ids are cheap.
    """
    if memoryview(body).nbytes <= 2 * MOST_VALUES:
        return
    form, rows = _FORM.decode(body), 0
    for field, row in (("token_ids", bytes(form.token_ids)), ("prompt", bytes(form.prompt))):
        if row.startswith(b"[") and row.count(b"[") == 1 and b"{" not in row and b'"' not in row:
            commas = row.count(b",")
            check_length(field, commas + 1, max_tokens)
            rows += commas
    _check_most(bytes(body), b",[{", but=rows)


def _check_most(text: bytes, signs: bytes, *, but: int = 0) -> None:
    """Raise `InvalidRequest` where JSON has more of some signs outside of its strings than bodies may have values."""
    most = MOST_VALUES + but
    found = sum(text.count(sign) for sign in signs)
    if found > most:
        bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
        if bare.count(b'"') <= 4 * most:  # each value has one string or none, and one before it that names it, or none
            bare = b"".join(bare.split(b'"')[::2])
            found = sum(bare.count(sign) for sign in signs)
    if found > most:
        raise InvalidRequest(f"body: {found - but} values, at most {MOST_VALUES} are read beside token ids")


def _with_whole_fields(body: bytes | msgspec.Raw) -> bytes:
    """The same body with whole numbers that are written as 1.0 as such, in all fields that want whole numbers."""
    fields = _FIELDS.decode(body)
    for name in _WHOLE & fields.keys():
        said = bytes(fields[name])
        if len(said) <= 2 * MOST_VALUES:
            fields[name] = msgspec.Raw(msgspec.json.encode(_with_whole(msgspec.json.decode(said))))
    return msgspec.json.encode(fields)


def _with_whole(value: Any) -> Any:  # noqa: ANN401  (what a client sent)
    """The same with whole numbers that are written as 1.0 as such: to JSON they are the same."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [_with_whole(item) for item in value]
        case dict():
            return {name: _with_whole(item) for name, item in value.items()}
    return value


def _no_json(error: Exception) -> InvalidRequest:
    return InvalidRequest(f"body: {'nested too deeply' if isinstance(error, RecursionError) else error}")


_BATCH = msgspec.json.Decoder(ScoreBatch)
_OBJECTS = msgspec.json.Decoder(_Objects)
_FORM = msgspec.json.Decoder(_Form)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_WHOLE = {"cached_tokens", "lora_name", "mm_items", "rank", "truncate_prompt_tokens"}
SCORE = Reader(ScoreTokens, ScoreText)
ROUTED = Reader(RoutedTokens, RoutedText)
OBSERVE = Reader(ObserveTokens, ObserveText)
