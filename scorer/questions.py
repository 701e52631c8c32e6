"""Scores for text, chat messages and OpenAI request bodies: what a scorer answers beside token ids."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import msgspec

from indexer import ImageItem, Prompt
from scorer.errors import InvalidRequest
from scorer.prompts import Prompts, Timings
from scorer.requests import Request

M = TypeVar("M")
A = TypeVar("A")

Message = Mapping[str, Any]


class PromptOptions(TypedDict, total=False):
    """What decides, beside a prompt itself, which cached blocks fit it."""

    lora_name: str | int | None
    cache_salt: str | None
    mm_items: Sequence[ImageItem]
    add_special_tokens: bool
    truncate_prompt_tokens: int | None


class ChatOptions(PromptOptions, total=False):
    """The same for messages, with all that a chat template is given; as in the body of ``/v1/chat/completions``."""

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    reasoning_effort: str | None


class Questions(ABC, Generic[M]):
    """Answers questions about text through the answers about prompts; `M` is one match.

    `score_...` give the score of each pod, `match_...` what each rank of each pod holds. All of them take `timings`, to
    be filled with the seconds that each stage took; block keys are then made ahead, which a short match would not
    need. All raise `InvalidRequest`, which names the field, and where the text has to be tokenized `NoTokenizer` and
    `Unavailable`.
    """

    prompts: Prompts

    @abstractmethod
    def _matches(self, prompt: Prompt, pods: Collection[str] | None) -> list[M]: ...

    @abstractmethod
    def _scores(self, prompt: Prompt, pods: Collection[str] | None) -> dict[str, float]: ...

    @abstractmethod
    def block_size(self, model: str) -> int:
        """Give the block size that answers for this model are counted in."""

    def score_prompt(
        self,
        text: str,
        *,
        model: str,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        **options: Unpack[PromptOptions],
    ) -> dict[str, float]:
        """Give the scores for a text, as the prompt of ``/v1/completions``."""
        return self.score_request({**options, "model": model, "prompt": text}, pods=pods, timings=timings)

    def match_prompt(
        self,
        text: str,
        *,
        model: str,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        **options: Unpack[PromptOptions],
    ) -> list[M]:
        """Give the matches for a text, as the prompt of ``/v1/completions``."""
        return self.match_request({**options, "model": model, "prompt": text}, pods=pods, timings=timings)

    def score_chat(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        **options: Unpack[ChatOptions],
    ) -> dict[str, float]:
        """Give the scores for messages, as in the body of ``/v1/chat/completions``."""
        return self.score_request({**options, "model": model, "messages": messages}, pods=pods, timings=timings)

    def match_chat(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[M]:
        """Give the matches for messages, as in the body of ``/v1/chat/completions``."""
        return self.match_request({**options, "model": model, "messages": messages}, pods=pods, timings=timings)

    def score_request(
        self, body: Mapping[str, Any], *, pods: Collection[str] | None = None, timings: Timings | None = None
    ) -> dict[str, float]:
        """Give the scores for an OpenAI completions or chat body as it is, see `docs/prompts.md`.

        Several prompts in one body are one question: their scores are added up.
        """
        prompts = self.prompts.read(body, timings)
        answers = [self._ask(prompt, pods, timings, self._scores) for prompt in prompts]
        return answers[0] if len(answers) == 1 else _sum_of_scores(answers)

    def match_request(
        self, body: Mapping[str, Any], *, pods: Collection[str] | None = None, timings: Timings | None = None
    ) -> list[M]:
        """Give the matches for an OpenAI completions or chat body as it is, added up over its prompts."""
        return self.match_all(self.prompts.read(body, timings), pods=pods, timings=timings)

    def match_all(
        self, prompts: Sequence[Prompt], *, pods: Collection[str] | None = None, timings: Timings | None = None
    ) -> list[M]:
        """Give the matches for prompts of one request, added up."""
        answers = [self._ask(prompt, pods, timings, self._matches) for prompt in prompts]
        return answers[0] if len(answers) == 1 else _sum_of_matches(answers)

    def score_many(
        self, questions: Sequence[Mapping[str, Any] | Prompt], *, pods: Collection[str] | None = None
    ) -> list[dict[str, float]]:
        """Give the scores for many questions, bodies or prompts; some are tokenized at the same time.

        Errors begin with the number of the question.
        """
        bodies = [question for question in questions if not isinstance(question, Prompt)]
        made = iter(self.prompts.each(bodies))
        asked = [[question] if isinstance(question, Prompt) else next(made) for question in questions]
        return [_sum_of_scores([self._scores(prompt, pods) for prompt in prompts]) for prompts in asked]

    async def ascore_prompt(
        self,
        text: str,
        *,
        model: str,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        **options: Unpack[PromptOptions],
    ) -> dict[str, float]:
        """Do what `score_prompt` does, without blocking the event loop."""
        return await self.ascore_request({**options, "model": model, "prompt": text}, pods=pods, timings=timings)

    async def amatch_prompt(
        self,
        text: str,
        *,
        model: str,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        **options: Unpack[PromptOptions],
    ) -> list[M]:
        """Do what `match_prompt` does, without blocking the event loop."""
        return await self.amatch_request({**options, "model": model, "prompt": text}, pods=pods, timings=timings)

    async def ascore_chat(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        **options: Unpack[ChatOptions],
    ) -> dict[str, float]:
        """Do what `score_chat` does, without blocking the event loop."""
        return await self.ascore_request({**options, "model": model, "messages": messages}, pods=pods, timings=timings)

    async def amatch_chat(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[M]:
        """Do what `match_chat` does, without blocking the event loop."""
        return await self.amatch_request({**options, "model": model, "messages": messages}, pods=pods, timings=timings)

    async def ascore_request(
        self, body: Mapping[str, Any], *, pods: Collection[str] | None = None, timings: Timings | None = None
    ) -> dict[str, float]:
        """Do what `score_request` does, without blocking the event loop."""
        return await self.prompts.run(self.score_request, body, pods=pods, timings=timings)

    async def amatch_request(
        self, body: Mapping[str, Any], *, pods: Collection[str] | None = None, timings: Timings | None = None
    ) -> list[M]:
        """Do what `match_request` does, without blocking the event loop."""
        return await self.prompts.run(self.match_request, body, pods=pods, timings=timings)

    async def ascore_many(
        self, questions: Sequence[Mapping[str, Any] | Prompt], *, pods: Collection[str] | None = None
    ) -> list[dict[str, float]]:
        """Do what `score_many` does, without blocking the event loop."""
        import asyncio

        # not on the threads of the prompts, which it waits for
        return await asyncio.to_thread(self.score_many, questions, pods=pods)

    def _ask(
        self,
        prompt: Prompt,
        pods: Collection[str] | None,
        timings: Timings | None,
        ask: Callable[[Prompt, Collection[str] | None], A],
    ) -> A:
        if timings is None:
            return ask(prompt, pods)
        begin = time.perf_counter()
        prompt.prepare(self.block_size(prompt.model))
        prepared = time.perf_counter()
        answer = ask(prompt, pods)
        timings.keys += prepared - begin
        timings.match += time.perf_counter() - prepared
        return answer


def _sum_of_scores(answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for answer in answers:
        for pod, score in answer.items():
            total[pod] = total.get(pod, 0.0) + score
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
