"""What the gRPC services answer: from messages to questions, and from answers to messages."""

import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

from indexer import Prompt
from kvevents import discovery
from kvindex.answers import AnswerMetrics, stages_of
from kvindex.rpc.schema import MessageType, Schema, parse
from kvindex.stats import Asked
from kvindex.tracing import note_stages
from scorer import InvalidRequest, PodMatch, PrefixScorer, Timings, check_items, scores_of

Call: TypeAlias = Callable[[bytes], Awaitable[bytes]]

MOST_PODS = 16_384
MOST_ITEMS = 1_024
_EXACT, _DEGRADED = 1, 2


class Calls:
    """Answers the methods by name, bytes to bytes.

    They raise `InvalidRequest` with the field's name in front, `IndexUnavailable`, and whatever else the scorer raises.
    """

    def __init__(
        self,
        schema: Schema,
        scorer: PrefixScorer,
        followed: discovery.Follower,
        asked: Asked,
        metrics: AnswerMetrics,
        *,
        max_tokens: int,
    ) -> None:
        self._scorer = scorer
        self._followed = followed
        self._asked = asked
        self._metrics = metrics
        self._max_tokens = max_tokens
        self._scores, self._score = schema.methods["GetPodScores"], schema.methods["Score"]
        self.by_name: Mapping[str, Call] = {"GetPodScores": self.get_pod_scores, "Score": self.score}

    async def get_pod_scores(self, payload: bytes) -> bytes:
        """Answer llm-d's question. Pods are called in the answer what the question called them."""
        begun = time.perf_counter()
        with self._metrics.question("grpc"):
            request = parse(self._scores.request, payload)
            model = request.model_name
            _require_name(model, "model_name")
            asked = list(request.pod_identifiers)
            _check(len(asked), MOST_PODS, "pod_identifiers", "names")
            names = self._names_of(asked)
            prompts, timings = self._scorer.prompts, Timings()
            self._asked.note(prompts.tokenizers.resolve(model)[0], names)
            (prompt,) = await prompts.run(prompts.read, {"model": model, "prompt": request.prompt}, timings)
            self._metrics.tokenized(timings)
            _check(prompt.length, self._max_tokens, "prompt", "tokens")
            made = time.perf_counter()
            matches = await self._metrics.to_thread(self._match, prompt, names if asked else None)
            matched = time.perf_counter()
            answer = self._scores.response()
            for pod, worth in _as_asked(scores_of(matches), names).items():
                answer.scores.add(pod=pod, score=worth)
            encoded = _bytes(answer)
        note_stages(begun, stages_of(begun, made, matched, timings))
        return encoded

    def _match(self, prompt: Prompt, pods: Collection[str] | None) -> list[PodMatch]:
        matches = self._metrics.timed(self._scorer.match, prompt, pods=pods, holders_only=True)
        self._metrics.found(matches, tokens=prompt.length, block_size=self._scorer.block_size(prompt.model))
        return matches

    async def score(self, payload: bytes) -> bytes:
        """Answer with all there is to know."""
        with self._metrics.question("grpc"):
            return await self._metrics.to_thread(self._answer, payload)

    def _answer(self, payload: bytes) -> bytes:
        begun = time.perf_counter()
        request = parse(self._score.request, payload)
        _require_name(request.model, "model")
        model, lora = self._scorer.prompts.identity(request.model, request.lora_name or None)
        tokens, length = _tokens_of(request)
        pods = list(request.pods)
        _check(length, self._max_tokens, "token_ids", "tokens")
        _check(len(pods), MOST_PODS, "pods", "names")
        _check(len(request.mm_items), MOST_ITEMS, "mm_items", "items")
        items = [(item.identifier, item.first_token, item.length) for item in request.mm_items]
        check_items(items, length)
        names = self._followed.resolve(pods) if pods else None
        self._asked.note(model, names)
        made = time.perf_counter()
        matches = self._metrics.timed(
            self._scorer.match,
            tokens,
            model=model,
            pods=names,
            lora_name=lora,
            cache_salt=request.cache_salt or None,
            mm_items=items,
            holders_only=request.holders_only,
        )
        matched = time.perf_counter()
        scores, size = scores_of(matches), self._scorer.block_size(model)
        self._metrics.found(matches, tokens=length, block_size=size)
        answer = self._score.response(
            scores=scores, block_size=size, prompt_tokens=length, best=next(iter(scores), None)
        )
        for match in matches:
            _add(answer.matches, match)
        encoded = _bytes(answer)
        note_stages(begun, {"read": made - begun, "match": matched - made, "encode": time.perf_counter() - matched})
        return encoded

    def _names_of(self, asked: Iterable[str]) -> dict[str, list[str]]:
        """Give the names that pods are followed under, with those they were asked for by."""
        names: dict[str, list[str]] = {}
        for text in asked:
            for name in self._followed.resolve([text]):
                names.setdefault(name, []).append(text)
        return names


def _as_asked(scores: Mapping[str, float], names: Mapping[str, list[str]]) -> dict[str, float]:
    """Call the pods what the question called them: a client looks for them under that name."""
    said: dict[str, float] = {}
    for pod, score in scores.items():
        for name in names.get(pod, [pod]):
            said.setdefault(name, score)  # where several pods share an address, the best of them comes first
    return said


def _tokens_of(request: MessageType) -> tuple[list[int] | bytes, int]:
    packed: bytes = request.token_buffer
    if packed and request.token_ids:
        raise InvalidRequest("token_buffer: expected it or token_ids, got both")
    if packed:
        if len(packed) % 4:
            raise InvalidRequest(f"token_buffer: expected four bytes a token, got {len(packed)} bytes")
        return packed, len(packed) // 4
    if not request.token_ids:
        raise InvalidRequest("token_ids: expected the prompt's, got none")
    return list(request.token_ids), len(request.token_ids)


def _add(matches: MessageType, match: PodMatch) -> None:
    said = matches.add(
        pod=match.pod,
        rank=match.rank,
        blocks=match.blocks,
        tokens=match.tokens,
        reusable_tokens=match.reusable_tokens,
        score=match.score,
        trust=_EXACT if match.trust == "exact" else _DEGRADED,
        reason=match.reason,
        speculative_blocks=match.speculative_blocks,
        speculative_tokens=match.speculative_tokens,
    )
    said.tiers.update(match.tiers)


def _require_name(value: str, field: str) -> None:
    if not value:
        raise InvalidRequest(f"{field}: expected the model's name, got ''")


def _check(count: int, most: int, field: str, what: str) -> None:
    if count > most:
        raise InvalidRequest(f"{field}: {count} {what}, at most {most} are answered")


def _bytes(message: Any) -> bytes:  # noqa: ANN401
    data: bytes = message.SerializeToString()
    return data
