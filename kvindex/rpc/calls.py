"""From the messages of both services to questions, and from answers to messages."""

from collections.abc import Awaitable, Callable
from typing import Any

from kvindex.questions import Questions
from kvindex.rpc.schema import MessageType, Schema, parse
from scorer import InvalidRequest, PodMatch

Call = Callable[[bytes], Awaitable[bytes]]


def calls(schema: Schema, questions: Questions) -> dict[str, Call]:
    """Give what answers each method, bytes to bytes."""
    scores, score = schema.methods["GetPodScores"], schema.methods["Score"]

    async def get_pod_scores(payload: bytes) -> bytes:
        request = parse(scores.request, payload)
        _require(request.model_name, "model_name")
        found = await questions.score_text(
            request.prompt, model=request.model_name, pods=list(request.pod_identifiers) or None
        )
        answer = scores.response()
        for pod, worth in found:
            answer.scores.add(pod=pod, score=worth)
        return _bytes(answer)

    async def score_tokens(payload: bytes) -> bytes:
        request = parse(score.request, payload)
        _require(request.model, "model")
        tokens = _tokens_of(request)
        answer = await questions.match(
            tokens,
            model=request.model,
            pods=list(request.pods) or None,
            lora_name=request.lora_name or None,
            cache_salt=request.cache_salt or None,
            mm_items=[(item.identifier, item.first_token, item.length) for item in request.mm_items],
        )
        length = len(tokens) // 4 if isinstance(tokens, bytes) else len(tokens)
        said = score.response(
            scores=answer.scores, block_size=answer.block_size, prompt_tokens=length, best=answer.best
        )
        for match in answer.matches:
            _add(said.matches, match)
        return _bytes(said)

    return {"GetPodScores": get_pod_scores, "Score": score_tokens}


_EXACT, _DEGRADED = 1, 2


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


def _tokens_of(request: Any) -> list[int] | bytes:  # noqa: ANN401
    packed: bytes = request.token_buffer
    if not packed:
        if not request.token_ids:
            raise InvalidRequest("token_ids: expected the prompt's, got none")
        return list(request.token_ids)
    if request.token_ids:
        raise InvalidRequest("token_buffer: expected it or token_ids, got both")
    if len(packed) % 4:
        raise InvalidRequest(f"token_buffer: expected four bytes a token, got {len(packed)}")
    return packed


def _require(value: str, field: str) -> None:
    if not value:
        raise InvalidRequest(f"{field}: expected its name, got ''")


def _bytes(message: MessageType) -> bytes:
    data: bytes = message.SerializeToString()
    return data
