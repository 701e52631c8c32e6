"""A router for OpenAI-compatible servers that sends each request to the pod with the least left to compute.

    python -m examples.router --scorer http://127.0.0.1:8080 \
        --pod vllm-0=http://10.0.0.7:8000 --pod vllm-1=http://10.0.0.8:8000

The names are those under which kvindex follows the pods. Of the policies, `kv` asks the scorer, `round-robin` and
`random` do not; the header `x-routing-policy` chooses one for a single request. See docs/router.md.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import uvicorn
from litestar import Litestar, Request, Response, get, post
from litestar.exceptions import ClientException, HTTPException
from litestar.types import ASGIApp, Receive, Scope, Send

POLICIES = ("kv", "round-robin", "random")
REQUEST_TOKENS = 128
"""What one request in flight counts for, in tokens to compute: it takes its share of every step of the engine."""
REFUSALS = {429, 502, 503, 504}
REFUSED_S = 1.0
"""For so long a pod that refused is asked last."""
ATTEMPTS = 3
"""Pods that a request is given to at most: one that kills engines must not go round all of them."""
TIMEOUT = httpx.Timeout(600.0, connect=2.0)
SCORER_TIMEOUT_S = 1.0
MAX_BODY_BYTES = 64 * 1024 * 1024
USAGE_BYTES = 1024 * 1024
"""So much of an answer's end is kept, to read its usage."""
DROPPED_HEADERS = {b"connection", b"content-length", b"host", b"keep-alive", b"transfer-encoding", b"upgrade"}


class Match(msgspec.Struct):
    """Of `/v1/score`: what one rank of a pod holds of the prompt."""

    pod: str
    tokens: int
    speculative_tokens: int = 0


class Scores(msgspec.Struct):
    """The answer of `/v1/score`, as far as it is needed here."""

    matches: list[Match] = []
    prompt_tokens: int = 0


class Details(msgspec.Struct):
    """Of an answer's usage."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """What an answer took."""

    prompt_tokens_details: Details | None = None


class Answer(msgspec.Struct):
    """An OpenAI answer, or one piece of its stream."""

    usage: Usage | None = None


@dataclass(eq=False)
class Pod:
    """One server, and what this router knows of its load."""

    name: str
    url: str
    in_flight: int = 0
    waiting_tokens: int = 0
    """Tokens that requests without a first byte still have to compute there."""
    refused_at: float = float("-inf")


class Refused(Exception):
    """A pod did not begin to answer."""


class Router:
    """Chooses pods, and tells the scorer what became of it."""

    def __init__(self, pods: list[Pod], scorers: list[str], policy: str = "kv", *, token: str = "") -> None:
        self.pods = pods
        self.policy = policy
        self.scorers = [url.rstrip("/") for url in scorers]
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        # uvicorn, in which vLLM runs, closes connections that are idle for 5 s: never send on one that is about to go.
        # The pool looks at all idle ones for each of them: so there must not be many.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=3)
        self.client = httpx.AsyncClient(timeout=TIMEOUT, limits=limits, trust_env=False)
        self._turn = itertools.count()
        self._tasks: set[asyncio.Task[bytes | None]] = set()

    async def choose(self, policy: str, question: dict[str, Any] | None) -> list[tuple[Pod, int]]:
        """Give all pods, the best first, each with the tokens of the prompt that it would have to compute.

        kv: least `to compute + waiting_tokens + REQUEST_TOKENS * in_flight`, where `to compute` is the prompt less
        what the pod holds, or will hold when requests on their way have run; at least one token is always computed.
        Where the scorer cannot say, all pods are taken to hold nothing.
        """
        if policy == "kv":
            asked = question and {**question, "holders_only": True}
            answer, scores = await self._ask("/v1/score", asked), Scores()
            with contextlib.suppress(msgspec.MsgspecError):
                scores = msgspec.json.decode(answer or b"{}", type=Scores)
            held = dict.fromkeys((pod.name for pod in self.pods), 0)
            for match in scores.matches:
                held[match.pod] = max(held.get(match.pod, 0), match.tokens + match.speculative_tokens)
            most = max(0, scores.prompt_tokens - 1)
            choices = [(pod, scores.prompt_tokens - min(held[pod.name], most)) for pod in self.pods]
            random.shuffle(choices)  # among equals
            choices.sort(key=lambda choice: choice[1] + choice[0].waiting_tokens + REQUEST_TOKENS * choice[0].in_flight)
        else:
            start = next(self._turn) if policy == "round-robin" else random.randrange(len(self.pods))
            choices = [(self.pods[(start + step) % len(self.pods)], 0) for step in range(len(self.pods))]
        now = time.monotonic()
        choices.sort(key=lambda choice: now - choice[0].refused_at < REFUSED_S)
        return choices

    def tell(self, path: str, question: dict[str, Any] | None, **facts: object) -> None:
        """Say to the scorer where a prompt went or what was reused of it, without waiting for the answer."""
        if question is not None:
            task = asyncio.create_task(self._ask(path, {**question, **facts}))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(self, path: str, body: dict[str, Any] | None) -> bytes | None:
        """Ask the first scorer, and the others when it does not answer; None when nobody can say."""
        for url in self.scorers if body is not None else []:
            with contextlib.suppress(httpx.HTTPError):
                answer = await self.client.post(url + path, json=body, headers=self._headers, timeout=SCORER_TIMEOUT_S)
                return answer.raise_for_status().content
        return None


class Forward:
    """One request on its way: an ASGI application that tries the pods in order and hands the answer through."""

    def __init__(self, router: Router, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.router = router
        self.path = path
        self.headers = headers
        self.body = body
        self.begun = False
        """Whether the client has a part of the answer."""
        self.policy = dict(headers).get(b"x-routing-policy", router.policy.encode()).decode("latin-1")
        if self.policy not in POLICIES:
            raise ClientException(f"x-routing-policy: expected one of {', '.join(POLICIES)}, got {self.policy[:40]!r}")
        try:
            request = msgspec.json.decode(body, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise ClientException(f"body: {error}") from error
        self.question = question_of(request) if self.policy == "kv" else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  (ASGI calls it so)
        """Answer, or stop when the client goes away: that closes the connection to the pod, which ends its work."""
        tasks = {asyncio.create_task(self._answer(send)), asyncio.create_task(_disconnect(receive))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _answer(self, send: Send) -> None:
        problem = "there is no pod"
        for pod, to_compute in (await self.router.choose(self.policy, self.question))[:ATTEMPTS]:
            pod.in_flight += 1
            pod.waiting_tokens += to_compute
            try:
                self.router.tell("/v1/routed", self.question, pod=pod.name)
                end = await self._forward(pod, to_compute, send)
            except (httpx.HTTPError, Refused) as error:
                if self.begun:
                    raise  # the client has a part of the answer: its connection is cut, too
                pod.refused_at = time.monotonic()
                problem = f"pod {pod.name}: {error or type(error).__name__}"
            else:
                cached = cached_tokens_of(end)
                if cached is not None:
                    self.router.tell("/v1/observe", self.question, pod=pod.name, cached_tokens=cached)
                return
            finally:
                pod.in_flight -= 1
                pod.waiting_tokens -= 0 if self.begun else to_compute
        await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": problem_body(503, problem), "more_body": False})

    async def _forward(self, pod: Pod, to_compute: int, send: Send) -> bytes:
        """Hand a pod's answer through as it comes; give its end. Nothing is handed through of a refusal."""
        # not by the client's `build_request`: that adds headers of its own
        timeout = {"timeout": TIMEOUT.as_dict()}
        request = httpx.Request(
            "POST", pod.url + self.path, headers=self.headers, content=self.body, extensions=timeout
        )
        answer = await self.router.client.send(request, stream=True)
        try:
            if answer.status_code in REFUSALS:
                raise Refused(f"status {answer.status_code}")
            chunks = answer.aiter_raw()
            chunk = await anext(chunks, b"")
            self.begun = True
            pod.waiting_tokens -= to_compute
            headers = [header for header in answer.headers.raw if header[0].lower() not in DROPPED_HEADERS]
            headers.append((b"x-routed-to", pod.name.encode()))
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            end = bytearray()
            while chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                end += chunk
                del end[:-USAGE_BYTES]
                chunk = await anext(chunks, b"")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return bytes(end)
        finally:
            await answer.aclose()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def problem_body(status: int, message: str) -> bytes:
    """Give an error as OpenAI's API has it."""
    return msgspec.json.encode({"error": {"message": message, "type": "router_error", "code": status}})


def _problem(_: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    return Response(
        problem_body(error.status_code, error.detail), status_code=error.status_code, media_type="application/json"
    )


def question_of(request: dict[str, Any]) -> dict[str, Any] | None:
    """Say of a request's body what the scorer needs to know: of text and messages all, as the engine reads it.

    None for several prompts in one request: those are routed by load.
    """
    prompt = request.get("prompt")
    if not isinstance(prompt, list):
        return request
    if not all(isinstance(token, int) for token in prompt):
        return None
    question = {"model": request.get("model"), "token_ids": prompt, "cache_salt": request.get("cache_salt")}
    return {name: value for name, value in question.items() if value is not None}


def cached_tokens_of(end: bytes) -> int | None:
    """Read from an answer, or from a stream's end, how many tokens of the prompt the engine reused.

    A stream says so only where the request has `stream_options.include_usage`, and vLLM only with
    `--enable-prompt-tokens-details`.
    """
    pieces = [line[5:] for line in end.splitlines() if line.startswith(b"data:")]
    for piece in reversed(pieces[-2:] or [end]):  # the last is [DONE]
        with contextlib.suppress(msgspec.MsgspecError):
            usage = msgspec.json.decode(piece, type=Answer).usage
            if usage is not None and usage.prompt_tokens_details is not None:
                return usage.prompt_tokens_details.cached_tokens
    return None


def create_app(router: Router) -> Litestar:
    """Make the application: `/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/health`."""

    @post(["/v1/completions", "/v1/chat/completions"], status_code=200, request_max_body_size=MAX_BODY_BYTES)
    async def forward(request: Request[Any, Any, Any]) -> ASGIApp:
        headers = [(name, value) for name, value in request.scope["headers"] if name not in DROPPED_HEADERS]
        return Forward(router, request.url.path, headers, await request.body())

    @get("/v1/models")
    async def models() -> Response[bytes]:
        for pod in router.pods:
            with contextlib.suppress(httpx.HTTPError):
                answer = await router.client.get(pod.url + "/v1/models")
                return Response(answer.content, status_code=answer.status_code, media_type="application/json")
        raise HTTPException(status_code=503, detail="no pod answers")

    @get("/health")
    async def health() -> dict[str, dict[str, int]]:
        return {pod.name: {"in_flight": pod.in_flight, "waiting_tokens": pod.waiting_tokens} for pod in router.pods}

    async def close(_: Litestar) -> None:
        await router.client.aclose()

    return Litestar(
        [forward, models, health],
        on_shutdown=[close],
        exception_handlers={HTTPException: _problem},
        openapi_config=None,
        logging_config=None,
    )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description="Sends each request to the pod with the least left to compute.")
    parser.add_argument("--pod", action="append", required=True, metavar="NAME=URL")
    parser.add_argument("--scorer", action="append", default=[], metavar="URL", help="kvindex serve; several in order")
    parser.add_argument("--token", default=os.environ.get("KVINDEX_TOKEN", ""), help="what the scorers want")
    parser.add_argument("--policy", choices=POLICIES, default="kv")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    pods = [Pod(name, url.rstrip("/")) for name, _, url in (pod.partition("=") for pod in options.pod)]
    for pod in pods:
        if not pod.url.startswith(("http://", "https://")):
            parser.error(f"--pod {pod.name}: expected NAME=URL, as pod-0=http://10.0.0.7:8000")
    app = create_app(Router(pods, options.scorer, options.policy, token=options.token))
    # the pods' own `date` and `server` headers go through
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", date_header=False, server_header=False)


if __name__ == "__main__":
    main()
