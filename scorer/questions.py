"""Scores for text, chat messages and OpenAI request bodies: what a scorer answers beside token ids."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

from indexer import ImageItem, Prompt
from scorer.matches import PodMatch, sum_of_matches, sum_of_scores
from scorer.messages import Message
from scorer.prompts import Prompts, Timings

A = TypeVar("A")


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


class Questions(ABC):
    """Answers questions about text through the answers about prompts.

    `score_...` give the score of each pod, `match_...` what each rank of each pod holds, with `holders_only` of those
    that hold something. All of them take `timings`, to be filled with the seconds that each stage took; block keys are
    then made ahead, which a short match would not need. All raise `InvalidRequest`, which names the field, and where
    the text has to be tokenized `NoTokenizer` and `Unavailable`.
    """

    prompts: Prompts

    @abstractmethod
    def match(
        self, token_ids: Prompt, *, pods: Collection[str] | None = None, holders_only: bool = False
    ) -> list[PodMatch]:
        """Say what each rank of each pod holds of a prompt, highest score first."""

    @abstractmethod
    def score(self, token_ids: Prompt, *, pods: Collection[str] | None = None) -> dict[str, float]:
        """Give the score of each pod that holds at least the first block."""

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
        holders_only: bool = False,
        **options: Unpack[PromptOptions],
    ) -> list[PodMatch]:
        """Give the matches for a text, as the prompt of ``/v1/completions``."""
        return self.match_request(
            {**options, "model": model, "prompt": text}, pods=pods, timings=timings, holders_only=holders_only
        )

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
        holders_only: bool = False,
        **options: Unpack[ChatOptions],
    ) -> list[PodMatch]:
        """Give the matches for messages, as in the body of ``/v1/chat/completions``."""
        return self.match_request(
            {**options, "model": model, "messages": messages}, pods=pods, timings=timings, holders_only=holders_only
        )

    def score_request(
        self, body: Mapping[str, Any], *, pods: Collection[str] | None = None, timings: Timings | None = None
    ) -> dict[str, float]:
        """Give the scores for an OpenAI completions or chat body as it is, see `docs/prompts.md`.

        Several prompts in one body are one question: their scores are added up.
        """
        prompts = self.prompts.read(body, timings)
        return sum_of_scores(
            [self._timed(prompt, timings, lambda each: self.score(each, pods=pods)) for prompt in prompts]
        )

    def match_request(
        self,
        body: Mapping[str, Any],
        *,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        holders_only: bool = False,
    ) -> list[PodMatch]:
        """Give the matches for an OpenAI completions or chat body as it is, added up over its prompts."""
        return self.match_all(self.prompts.read(body, timings), pods=pods, timings=timings, holders_only=holders_only)

    def match_all(
        self,
        prompts: Sequence[Prompt],
        *,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        holders_only: bool = False,
    ) -> list[PodMatch]:
        """Give the matches for prompts of one request, added up."""
        # one by one: the matches of all of them at once would be as many as pods times prompts
        return sum_of_matches(
            self._timed(prompt, timings, lambda each: self.match(each, pods=pods, holders_only=holders_only))
            for prompt in prompts
        )

    def score_many(
        self, questions: Sequence[Mapping[str, Any] | Prompt], *, pods: Collection[str] | None = None
    ) -> list[dict[str, float]]:
        """Give the scores for many questions, bodies or prompts; some are tokenized at the same time.

        Errors begin with the number of the question.
        """
        made = self.prompts.each(questions)
        return [sum_of_scores([self.score(prompt, pods=pods) for prompt in prompts]) for prompts in made]

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
        holders_only: bool = False,
        **options: Unpack[PromptOptions],
    ) -> list[PodMatch]:
        """Do what `match_prompt` does, without blocking the event loop."""
        return await self.amatch_request(
            {**options, "model": model, "prompt": text}, pods=pods, timings=timings, holders_only=holders_only
        )

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
        holders_only: bool = False,
        **options: Unpack[ChatOptions],
    ) -> list[PodMatch]:
        """Do what `match_chat` does, without blocking the event loop."""
        return await self.amatch_request(
            {**options, "model": model, "messages": messages}, pods=pods, timings=timings, holders_only=holders_only
        )

    async def ascore_request(
        self, body: Mapping[str, Any], *, pods: Collection[str] | None = None, timings: Timings | None = None
    ) -> dict[str, float]:
        """Do what `score_request` does, without blocking the event loop."""
        return await self.prompts.run(self.score_request, body, pods=pods, timings=timings)

    async def amatch_request(
        self,
        body: Mapping[str, Any],
        *,
        pods: Collection[str] | None = None,
        timings: Timings | None = None,
        holders_only: bool = False,
    ) -> list[PodMatch]:
        """Do what `match_request` does, without blocking the event loop."""
        return await self.prompts.run(self.match_request, body, pods=pods, timings=timings, holders_only=holders_only)

    async def ascore_many(
        self, questions: Sequence[Mapping[str, Any] | Prompt], *, pods: Collection[str] | None = None
    ) -> list[dict[str, float]]:
        """Do what `score_many` does, without blocking the event loop."""
        # not on the threads of the prompts, which it waits for
        return await asyncio.to_thread(self.score_many, questions, pods=pods)

    def _timed(self, prompt: Prompt, timings: Timings | None, ask: Callable[[Prompt], A]) -> A:
        if timings is None:
            return ask(prompt)
        begin = time.perf_counter()
        prompt.prepare(self.block_size(prompt.model))
        prepared = time.perf_counter()
        answer = ask(prompt)
        timings.keys += prepared - begin
        timings.match += time.perf_counter() - prepared
        return answer
