"""`POST /v1/score` and `/v1/score_batch`: which pods hold how much of a prompt, or of many."""

import asyncio
import time
from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler
from litestar.status_codes import HTTP_200_OK

from indexer import Prompt
from kvevents import discovery
from kvindex.answers import AnswerMetrics, stages_of
from kvindex.checks import Checks
from kvindex.questions import (
    SCORE,
    ScoreText,
    ScoreTokens,
    check_length,
    field_with_prompt,
    prompt_of,
    prompts_of,
    read_batch,
)
from kvindex.tracing import note_stages
from scorer import Body, InvalidRequest, PodMatch, PrefixScorer, ScorerError, Timings, numbered, scores_of


class ScoreAnswer(msgspec.Struct, omit_defaults=True):
    """The scores of the pods that hold at least the first block, and all that is known besides."""

    scores: dict[str, float]
    matches: list[PodMatch]
    block_size: int
    prompt_tokens: int
    best: str | None
    timings: Timings | None = None
    """Seconds by stage, where the question asked for them."""


class BatchAnswer(msgspec.Struct):
    """The answers to a batch of questions, in order."""

    answers: list[ScoreAnswer]


_ENCODER = msgspec.json.Encoder()


class Scoring:
    """Answers questions that came over HTTP, and counts them."""

    def __init__(
        self,
        scorer: PrefixScorer,
        followed: discovery.Follower,
        checks: Checks,
        answers: AnswerMetrics,
        *,
        max_tokens: int,
    ) -> None:
        self._scorer = scorer
        self._followed = followed
        self._asked = checks.asked
        self._answers = answers
        self._max_tokens = max_tokens

    async def score(self, body: bytes) -> tuple[bytes, str]:
        """Answer one question; give the answer and what `Server-Timing` says of it. Raises `ScorerError`."""
        begun = time.perf_counter()
        timings = Timings()
        with self._answers.question("http") as counted:
            question = await SCORE.aread(body, max_tokens=self._max_tokens)
            pods = self._pods_of(question)
            prompts = await prompts_of(question, self._scorer, timings, max_tokens=self._max_tokens)
            made = time.perf_counter()
            asked = timings if question.timings else None
            if asked is None and len(prompts) == 1 and self._scorer.answers_at_once(prompts[0]):
                answer = self._answer(question, prompts, pods, None)
            else:
                answer = await counted.to_thread(self._answer, question, prompts, pods, asked)
        self._answers.tokenized(timings)
        matched = time.perf_counter()
        encoded = _ENCODER.encode(answer)
        stages = stages_of(begun, made, matched, timings)
        note_stages(begun, stages)
        return encoded, server_timing(stages)

    async def score_batch(self, body: bytes) -> tuple[bytes, str]:
        """Answer a batch of questions, all or none. Raises `ScorerError`, which names the question."""
        begun = time.perf_counter()
        with self._answers.failures("http"):
            questions = await asyncio.to_thread(read_batch, body, max_tokens=self._max_tokens)
            read = time.perf_counter()
            answers, seconds = await asyncio.to_thread(self._answer_all, questions)
        for each in seconds:
            self._answers.answered("http", each)
        matched = time.perf_counter()
        encoded = _ENCODER.encode({"answers": answers})
        stages = {"read": read - begun, "match": matched - read, "encode": time.perf_counter() - matched}
        note_stages(begun, stages)
        return encoded, server_timing(stages)

    def _answer_all(self, questions: list[ScoreTokens | ScoreText]) -> tuple[list[msgspec.Raw], list[float]]:
        """Give the answers as JSON, and how long each took."""
        each = self._prompts_of_all(questions)
        answers, seconds = [], []
        for question, prompts in zip(questions, each, strict=True):
            begun = time.perf_counter()
            timings = Timings() if question.timings else None
            pods = self._pods_of(question)
            # one by one: nothing else gets on while all of them together are encoded
            answers.append(msgspec.Raw(_ENCODER.encode(self._answer(question, prompts, pods, timings))))
            seconds.append(time.perf_counter() - begun)
        return answers, seconds

    def _prompts_of_all(self, questions: list[ScoreTokens | ScoreText]) -> list[list[Prompt]]:
        asked: list[Prompt | Body] = []
        for number, question in enumerate(questions):
            try:
                asked.append(question if isinstance(question, Body) else prompt_of(question, self._scorer))
            except InvalidRequest as error:
                raise numbered(error, number, "questions") from error
        try:
            made = self._scorer.prompts.each(asked)
        except ScorerError as error:
            raise type(error)(f"questions{error}") from error
        for number, (question, prompts) in enumerate(zip(questions, made, strict=True)):
            field = f"questions[{number}].{field_with_prompt(question)}"
            check_length(field, sum(prompt.length for prompt in prompts), self._max_tokens)
        return made

    def _pods_of(self, question: ScoreTokens | ScoreText) -> list[str] | None:
        pods = None if question.pods is None else self._followed.resolve(question.pods)
        self._asked.note(self._scorer.prompts.tokenizers.resolve(question.model)[0], pods)
        return pods

    def _answer(
        self,
        question: ScoreTokens | ScoreText,
        prompts: list[Prompt],
        pods: list[str] | None,
        timings: Timings | None,
    ) -> ScoreAnswer:
        """May wait for the index."""
        matches = self._answers.timed(
            self._scorer.match_all, prompts, pods=pods, timings=timings, holders_only=question.holders_only
        )
        tokens, size = sum(prompt.length for prompt in prompts), self._scorer.block_size(prompts[0].model)
        self._answers.found(matches, tokens=tokens, block_size=size)
        scores = scores_of(matches)
        return ScoreAnswer(scores, matches, size, tokens, next(iter(scores), None), timings)


def server_timing(stages: dict[str, float]) -> str:
    """Give the value of the header `Server-Timing` for some stages in seconds (https://www.w3.org/TR/server-timing/)."""
    return ", ".join(f"{stage};dur={1000 * seconds:.3f}" for stage, seconds in stages.items() if seconds > 0)


def score_routes(scoring: Scoring, *, max_body_bytes: int) -> list[HTTPRouteHandler]:
    """Make the routes."""

    @post("/v1/score", status_code=HTTP_200_OK, request_max_body_size=max_body_bytes)
    async def score(request: Request[Any, Any, Any]) -> Response[bytes]:
        """Say which pods hold how much of a prompt."""
        return _response(*await scoring.score(await request.body()))

    @post("/v1/score_batch", status_code=HTTP_200_OK, request_max_body_size=max_body_bytes)
    async def score_batch(request: Request[Any, Any, Any]) -> Response[bytes]:
        """Say which pods hold how much of each of many prompts."""
        return _response(*await scoring.score_batch(await request.body()))

    return [score, score_batch]


def _response(answer: bytes, timing: str) -> Response[bytes]:
    return Response(answer, media_type="application/json", headers={"Server-Timing": timing})
