"""The bodies of questions over HTTP: read once, strictly, in the form that they have."""

from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from indexer import InvalidQuestion, Prompt, token_ids_of_json
from scorer import (
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
MOST_QUESTIONS = 1_024
"""Questions of one batch."""

Pods: TypeAlias = (
    Annotated[list[Name], Meta(max_length=16_384, description="Ask for these pods only, by any of their names")] | None
)


class ScoreTokens(TokenBody, kw_only=True, forbid_unknown_fields=True):
    """Which pods hold how much of these tokens?"""

    pods: Pods = None
    timings: bool = False
    """Whether the answer says the seconds of each stage."""


class ScoreText(Body, kw_only=True):
    """The same for text: the body of ``/v1/completions`` or ``/v1/chat/completions`` as it is.

    Fields that do not decide which blocks fit are passed over.
    """

    pods: Pods = None
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


class Reader(Generic[OfTokens, OfText]):
    """Reads bodies of one kind."""

    def __init__(self, tokens: type[OfTokens], text: type[OfText]) -> None:
        self._strict = msgspec.json.Decoder(tokens)
        self._text = text
        self._known = ", ".join(sorted(field.name for field in msgspec.structs.fields(tokens)))

    def read(self, body: bytes | msgspec.Raw) -> OfTokens | OfText:
        """Read one. Raises `InvalidRequest`, which names the field."""
        try:
            return self._read(body)
        except InvalidRequest as error:
            if "got `float`" not in str(error):
                raise
        return self._read(msgspec.json.encode(_with_whole(msgspec.json.decode(body))))

    def _read(self, body: bytes | msgspec.Raw) -> OfTokens | OfText:
        wrong: msgspec.ValidationError | None = None
        try:
            question = self._strict.decode(body)
            if question.token_ids != _NULL:
                return question
        except msgspec.ValidationError as error:  # of the other form, or of neither
            wrong = error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _no_json(error) from error
        try:
            whole = msgspec.json.decode(body)
            if wrong is None or (isinstance(whole, dict) and whole.get("token_ids") is None):
                if isinstance(prompt := whole.get("prompt"), list):
                    whole["prompt"] = _with_whole(prompt)
                return msgspec.convert(whole, self._text)
        except msgspec.ValidationError as error:
            raise InvalidRequest(field_of(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # in a field that nobody reads
            raise _no_json(error) from error
        raise InvalidRequest(self._said(wrong)) from wrong

    def _said(self, error: msgspec.ValidationError) -> str:
        said = str(error)
        if said.startswith("Object contains unknown field `"):
            name = said.split("`")[1]
            return f"{name[:80]}: unknown field beside token_ids; known are {self._known}"
        return field_of(error)


def read_batch(body: bytes) -> list[ScoreTokens | ScoreText]:
    """Read the questions of a batch. Raises `InvalidRequest`, which names question and field."""
    try:
        batch = _BATCH.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(field_of(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _no_json(error) from error
    asked = []
    for number, question in enumerate(batch.questions):
        try:
            asked.append(SCORE.read(question))
        except InvalidRequest as error:
            raise numbered(error, number, "questions") from error
    return asked


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
        prompt = prompt_of(question, scorer)
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
SCORE = Reader(ScoreTokens, ScoreText)
ROUTED = Reader(RoutedTokens, RoutedText)
OBSERVE = Reader(ObserveTokens, ObserveText)
