"""Questions as they reach the service, whoever carries them: bounded, counted, timed and answered."""

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Histogram

from indexer import ImageItem, IndexUnavailable
from kvevents import discovery
from kvindex.stats import Asked
from scorer import InvalidRequest, NoTokenizer, PodMatch, PrefixScorer, ScorerError, scores_of

Carrier: TypeAlias = Literal["http", "grpc"]

MOST_PODS = 16_384
MOST_ITEMS = 1_024
_CHARACTERS_A_TOKEN = 8
"""More than any text has on average, so that what is refused for its length is over the bound in tokens, too."""

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)


class Answer(NamedTuple):
    """What a question is answered with."""

    matches: list[PodMatch]
    scores: dict[str, float]
    block_size: int

    @property
    def best(self) -> str | None:
        """The pod with the highest score, None where no pod holds a block."""
        return next(iter(self.scores), None)


class TextScorer(Protocol):
    """What answers for prompts that are text. Raises `NoTokenizer` where nothing turns them into tokens."""

    def score_prompt(self, prompt: str, /, *, model: str, pods: Collection[str] | None = None) -> Mapping[str, float]:
        """Give the score of each pod that holds at least the first block, highest first."""


class AnswerMetrics:
    """What is counted of questions and their answers. Names are llm-d's where they mean the same."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lookups = Counter("kvcache_index_lookup_requests_total", "Questions answered", registry=registry)
        self._latency = Histogram(
            "kvcache_index_lookup_latency_seconds", "Time to answer one", buckets=_BUCKETS, registry=registry
        )
        # llm-d adds the same number to both
        self._hits = [
            Counter(name, "Blocks found, each question's on the pod that holds the most", registry=registry)
            for name in ("kvcache_index_lookup_hits_total", "kvcache_index_max_pod_hit_count_total")
        ]
        self._blocks = Counter("kvindex_lookup_blocks_total", "Whole blocks of prompts asked for", registry=registry)
        self._tokens = Counter("kvindex_lookup_tokens_total", "Tokens of prompts asked for", registry=registry)
        outcomes = Counter("kvindex_questions_total", "Questions by outcome", ["by", "outcome"], registry=registry)
        self._outcomes = {
            (by, outcome): outcomes.labels(by, outcome)
            for by in ("http", "grpc")
            for outcome in ("answered", "refused", "unavailable")
        }
        stages = Histogram(
            "kvindex_answer_stage_seconds", "Parts of an answer's time", ["stage"], buckets=_BUCKETS, registry=registry
        )
        self._stages = {stage: stages.labels(stage) for stage in ("wait", "match", "text")}

    def waited(self, seconds: float) -> None:
        """Note how long a question waited for a thread."""
        self._stages["wait"].observe(seconds)

    def answered(self, by: Carrier, stage: Literal["match", "text"], seconds: float) -> None:
        """Count an answer and the time that it took, without the wait."""
        self._outcomes[by, "answered"].inc()
        self._stages[stage].observe(seconds)
        self._lookups.inc()
        self._latency.observe(seconds)

    def found(self, answer: Answer, tokens: int) -> None:
        """Count what was asked for and what was found."""
        self._tokens.inc(tokens)
        self._blocks.inc(tokens // answer.block_size)
        most = max((match.blocks for match in answer.matches), default=0)
        for counter in self._hits:
            counter.inc(most)

    def failed(self, by: Carrier, error: Exception) -> None:
        """Count a question that got no answer."""
        self._outcomes[by, "unavailable" if isinstance(error, IndexUnavailable) else "refused"].inc()


class Questions:
    """Answers the questions that one carrier brings.

    `asked` hears the names that questions are for; `texts` answers for text, if anything does. Methods may be called
    from any event loop. They raise `InvalidRequest` with the field's name in front, `IndexUnavailable`, and whatever
    else the scorer raises.
    """

    def __init__(
        self,
        scorer: PrefixScorer,
        followed: discovery.Follower,
        asked: Asked,
        metrics: AnswerMetrics,
        *,
        by: Carrier,
        max_tokens: int,
        texts: TextScorer | None = None,
    ) -> None:
        self._scorer = scorer
        self._texts = texts
        self._followed = followed
        self._asked = asked
        self._metrics = metrics
        self._by: Carrier = by
        self._max_tokens = max_tokens

    async def match(
        self,
        token_ids: list[int] | bytes,
        *,
        model: str,
        pods: Sequence[str] | None = None,
        lora_name: str | None = None,
        cache_salt: str | None = None,
        mm_items: Sequence[ImageItem] = (),
    ) -> Answer:
        """Say what each pod holds of a prompt, token ids or a buffer of them; `pods` by any of their names."""
        came = time.perf_counter()
        return await asyncio.to_thread(
            self._match, came, token_ids, model, pods, lora_name=lora_name, cache_salt=cache_salt, mm_items=mm_items
        )

    def _match(
        self,
        came: float,
        token_ids: list[int] | bytes,
        model: str,
        pods: Sequence[str] | None,
        *,
        lora_name: str | None,
        cache_salt: str | None,
        mm_items: Sequence[ImageItem],
    ) -> Answer:
        begun = time.perf_counter()
        self._metrics.waited(begun - came)
        try:
            length = len(token_ids) // 4 if isinstance(token_ids, bytes) else len(token_ids)
            self._check(pods, tokens=length, items=len(mm_items))
            self._asked.note(model, pods)
            matches = self._scorer.match(
                token_ids,
                model=model,
                pods=None if pods is None else self._followed.resolve(pods),
                lora_name=lora_name,
                cache_salt=cache_salt,
                mm_items=mm_items,
            )
            answer = Answer(matches, scores_of(matches), self._scorer.block_size(model))
        except (ScorerError, IndexUnavailable) as error:
            self._metrics.failed(self._by, error)
            raise
        self._metrics.answered(self._by, "match", time.perf_counter() - begun)
        self._metrics.found(answer, length)
        return answer

    async def score_text(self, text: str, *, model: str, pods: Sequence[str] | None = None) -> list[tuple[str, float]]:
        """Give the score of each pod that holds at least the first block, highest first.

        A pod that was asked for by another of its names is called by that one. Raises `NoTokenizer` where nothing turns
        text for this model into tokens.
        """
        came = time.perf_counter()
        return await asyncio.to_thread(self._score_text, came, text, model, pods)

    def _score_text(self, came: float, text: str, model: str, pods: Sequence[str] | None) -> list[tuple[str, float]]:
        begun = time.perf_counter()
        self._metrics.waited(begun - came)
        try:
            self._check(pods, characters=len(text))
            self._asked.note(model, pods)
            if self._texts is None:
                raise NoTokenizer(f"model {model[:200]!r}: this service has no tokenizers; ask it with token ids")
            names = None if pods is None else self._names_of(pods)
            scores = self._texts.score_prompt(text, model=model, pods=names)
        except (ScorerError, IndexUnavailable) as error:
            self._metrics.failed(self._by, error)
            raise
        self._metrics.answered(self._by, "text", time.perf_counter() - begun)
        said: dict[str, float] = {}
        for pod, score in scores.items():
            for name in (pod,) if names is None else names[pod]:
                said.setdefault(name, score)  # the highest comes first
        return list(said.items())

    def _names_of(self, pods: Sequence[str]) -> dict[str, list[str]]:
        """Give the pods' own names, with those they were asked for by."""
        names: dict[str, list[str]] = {}
        for asked in pods:
            for name in self._followed.resolve([asked]):
                names.setdefault(name, []).append(asked)
        return names

    def _check(self, pods: Sequence[str] | None, *, tokens: int = 0, characters: int = 0, items: int = 0) -> None:
        for field, what, count, most in (
            ("token_ids", "tokens", tokens, self._max_tokens),
            ("prompt", "characters", characters, _CHARACTERS_A_TOKEN * self._max_tokens),
            ("pods", "names", len(pods or ()), MOST_PODS),
            ("mm_items", "items", items, MOST_ITEMS),
        ):
            if count > most:
                raise InvalidRequest(f"{field}: {count} {what}, at most {most} are answered")
