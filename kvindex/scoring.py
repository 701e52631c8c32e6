"""`POST /v1/score`: which pods hold how much of a prompt, given as token ids, text, messages or an OpenAI body."""

import asyncio
from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from litestar.status_codes import HTTP_200_OK, HTTP_400_BAD_REQUEST, HTTP_422_UNPROCESSABLE_ENTITY

from indexer import Prompt
from kvevents import discovery
from kvindex.answers import AnswerMetrics
from kvindex.checks import Checks
from scorer import InvalidRequest, NoTokenizer, PodMatch, PrefixScorer, ScorerError, Timings, Unavailable, scores_of


class ScoreRequest(msgspec.Struct):
    """One question: which pods hold how much of this prompt?

    With `prompt` or `messages` it may be the body of `/v1/completions` or `/v1/chat/completions` as it is; fields that
    do not decide which blocks fit are passed over. With `token_ids` unknown fields are refused.
    """

    model: str
    token_ids: list[int] | None = None
    prompt: str | list[Any] | None = None
    messages: list[dict[str, Any]] | None = None
    pods: list[str] | None = None
    lora_name: str | None = None
    cache_salt: str | None = None
    mm_items: list[tuple[str, int, int]] = []
    timings: bool = False


class ScoreAnswer(msgspec.Struct, omit_defaults=True):
    """The scores of the pods that hold at least the first block, and all that is known besides."""

    scores: dict[str, float]
    matches: list[PodMatch]
    block_size: int
    prompt_tokens: int
    best: str | None
    timings: Timings | None = None
    """Seconds by stage, where the question asked for them."""


_NAMES = msgspec.json.Decoder(dict[str, msgspec.Raw])


def score_route(
    scorer: PrefixScorer,
    followed: discovery.Follower,
    checks: Checks,
    answers: AnswerMetrics,
    *,
    max_tokens: int,
    max_body_bytes: int,
) -> HTTPRouteHandler:
    """Make the route."""

    @post("/v1/score", status_code=HTTP_200_OK, request_max_body_size=max_body_bytes)
    async def score(request: Request[Any, Any, Any], data: JSONBody[ScoreRequest]) -> Response[ScoreAnswer]:
        """Say which pods hold how much of a prompt."""
        timings = Timings()
        model, adapter = scorer.prompts.tokenizers.resolve(data.model)
        pods = None if data.pods is None else followed.resolve(data.pods)
        checks.asked.note(model, pods)
        try:
            with answers.question("http") as question:
                if data.token_ids is not None:
                    refuse_unknown(ScoreRequest, await request.body())
                    _check_length("token_ids", len(data.token_ids), max_tokens)
                if data.token_ids is not None and not data.timings and adapter is None:
                    length = len(data.token_ids)
                    matches = await question.run(
                        scorer.match,
                        data.token_ids,
                        model=model,
                        pods=pods,
                        lora_name=data.lora_name,
                        cache_salt=data.cache_salt,
                        mm_items=data.mm_items,
                    )
                else:
                    prompts = await read_prompts(scorer, await request.body(), timings, max_tokens=max_tokens)
                    length = sum(prompt.length for prompt in prompts)
                    asked = timings if data.timings else None
                    matches = await question.run(scorer.match_all, prompts, pods=pods, timings=asked)
                size = await asyncio.to_thread(scorer.block_size, model)
                question.found(matches, tokens=length, block_size=size)
        except ScorerError as error:
            raise refusal(error) from error
        answers.tokenized(timings)
        scores = scores_of(matches)
        best = next(iter(scores), None)
        told = timings if data.timings else None
        return Response(ScoreAnswer(scores, matches, size, length, best, told))

    return score


def refusal(error: ScorerError) -> HTTPException:
    """Give the answer for a question that cannot be answered."""
    if isinstance(error, NoTokenizer):
        return HTTPException(status_code=HTTP_422_UNPROCESSABLE_ENTITY, detail=str(error))
    if isinstance(error, Unavailable):
        return HTTPException(status_code=503, detail=str(error), headers={"Retry-After": "1"})
    return HTTPException(status_code=HTTP_400_BAD_REQUEST, detail=str(error))


async def read_prompts(
    scorer: PrefixScorer, body: bytes, timings: Timings | None = None, *, max_tokens: int
) -> list[Prompt]:
    """Give the prompts of a body, made off the event loop. Raises `ScorerError`."""
    field, prompts = await scorer.prompts.run(_read, scorer, body, timings)
    _check_length(field, sum(prompt.length for prompt in prompts), max_tokens)
    return prompts


def refuse_unknown(kind: type[msgspec.Struct], body: bytes) -> None:
    """Refuse what a body has beside token ids and their like: a name spelt wrong must not change an answer unseen."""
    known = {field.name for field in msgspec.structs.fields(kind)} - {"prompt", "messages"}
    if unknown := sorted(_NAMES.decode(body).keys() - known):
        raise InvalidRequest(f"{unknown[0][:80]}: unknown field beside token_ids; known are {', '.join(sorted(known))}")


def _read(scorer: PrefixScorer, body: bytes, timings: Timings | None) -> tuple[str, list[Prompt]]:
    """The field that has the prompts, and the prompts."""
    try:
        whole = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # in a field that was passed over when it was read first
        raise InvalidRequest(f"body: {error}") from error
    prompts = scorer.prompts.read(whole, timings)
    return next(name for name in ("token_ids", "prompt", "messages") if whole.get(name) is not None), prompts


def _check_length(field: str, length: int, max_tokens: int) -> None:
    if length > max_tokens:
        raise InvalidRequest(f"{field}: {length} tokens, at most {max_tokens} are answered")
