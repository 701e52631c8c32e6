"""OpenAI-compatible servers without a model, whose time to the first token depends on what they have cached.

    python -m examples.simulated_servers --pods 4 --port 9000 --events-port 5557

Pod number i serves at port 9000 + i, publishes KV events at 5557 + 2i as vLLM does and answers replays at the port
after it. Prompts are computed one at a time at a given speed, less what the pod's cache holds; then tokens come one by
one. A prompt is token ids, or text for a tokenizer of bytes that is made here (or the one of `--tokenizer`). What the
answer says is made up, unless the request has its tokens in `simulated_output`.

It prints one line of JSON: `pods` as KVINDEX_PODS takes them, and the `urls` of the servers.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import uvicorn
from jinja2.sandbox import ImmutableSandboxedEnvironment
from litestar import Litestar, Response, get, post
from litestar.exceptions import HTTPException
from litestar.params import JSONBody
from litestar.response import Stream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvindex.engine import EngineEvent, OutOfBlocksError, Request
from kvindex.fleet import Fleet, Pod, on_the_wire

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["what", "was", "said", "before", "is", "held", "so", "that", "only", "new", "words", "are", "computed"]


def save_tokenizer(folder: Path) -> None:
    """Make a tokenizer of which each byte is a token, with a chat template, as files that engines and scorers read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))


class Words:
    """Turns text and messages into tokens and back, with the tokenizer of a folder."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        self._template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        self._size = self._tokenizer.get_vocab_size()

    def tokens_of(self, text: str, *, special: bool = True) -> list[int]:
        """Give the tokens of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def tokens_of_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Give the tokens of messages, and of the beginning of an answer."""
        return self.tokens_of(self._template.render(messages=messages, add_generation_prompt=True), special=False)

    def text_of(self, tokens: Sequence[int]) -> str:
        """Give the text of tokens; those that the tokenizer does not have as numbers."""
        if all(token < self._size for token in tokens):
            return str(self._tokenizer.decode(tokens, skip_special_tokens=False))
        return "".join(f" {token}" for token in tokens)

    def made_up(self, prompt: list[int], count: int) -> list[int]:
        """Give `count` tokens of an answer, the same for the same prompt."""
        words = random.Random(str(prompt)).choices(WORDS, k=count)
        return self.tokens_of(" ".join(words), special=False)[:count]


class Speed(msgspec.Struct, frozen=True):
    """How fast a pod is."""

    prefill: float = 8_000.0
    """Tokens of a prompt that it computes in a second."""
    decode_s: float = 0.02
    """Seconds a token of the answer takes."""
    stream_interval: int = 4
    """Tokens in a piece of a stream, vLLM's `--stream-interval`."""
    max_waiting: int = 1_000
    """Prompts that may wait; more are refused with 503."""


class Busy(Exception):
    """Too many prompts wait already."""


class Engine:
    """The scheduler of one pod: one prompt at a time, events published when it is computed."""

    def __init__(self, pod: Pod, speed: Speed) -> None:
        self.pod = pod
        self.speed = speed
        self.waiting = 0
        self.running = 0
        self._computing = asyncio.Lock()
        self._finished = asyncio.Event()
        self._events: list[EngineEvent] = []

    async def begin(self, tokens: list[int], salt: str | None) -> Request:
        """Wait for the turn of a prompt, compute it, and keep its blocks in use until `finish`.

        Given up meanwhile, it ends at once, and its blocks count as computed.
        """
        self.waiting += 1
        try:
            async with self._computing:
                request = await self._allocated(tokens, salt)
                self._events += request.events
                self.running += 1
                try:
                    await asyncio.sleep((len(tokens) - request.cached_tokens) / self.speed.prefill)
                except asyncio.CancelledError:
                    self._release(request, ())
                    raise
                finally:
                    self._publish()
                return request
        finally:
            self.waiting -= 1

    def finish(self, request: Request, output: Sequence[int]) -> None:
        """End a request that generated `output`."""
        self._release(request, output)
        # While a prompt is computed its own events, older than these, are not out yet: all go at the end of the step.
        if not self._computing.locked():
            self._publish()

    def reset(self) -> bool:
        """Empty the cache, where nothing runs."""
        events = self.pod.engine.reset()
        self._events += events
        self._publish()
        return bool(events)

    async def _allocated(self, tokens: list[int], salt: str | None) -> Request:
        while True:
            self._finished.clear()
            try:
                return self.pod.engine.begin(tokens, cache_salt=salt)
            except OutOfBlocksError:
                await self._finished.wait()

    def _release(self, request: Request, output: Sequence[int]) -> None:
        self._events += self.pod.engine.finish(request, output)
        self.running -= 1
        self._finished.set()

    def _publish(self) -> None:
        events, self._events = self._events, []
        if events:
            size = self.pod.engine.block_size
            self.pod.publisher.publish([on_the_wire(self.pod.dialect, event, size) for event in events])


TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class StreamOptions(msgspec.Struct):
    """Of a request with `stream`."""

    include_usage: bool = False


class Wanted(msgspec.Struct, kw_only=True):
    """What all requests have. Other fields of the API are taken and passed over."""

    model: str = ""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    simulated_output: list[TokenId] = []


class CompletionRequest(Wanted, kw_only=True):
    """Body of `/v1/completions`."""

    prompt: str | list[TokenId]


class ChatRequest(Wanted, kw_only=True):
    """Body of `/v1/chat/completions`."""

    messages: list[dict[str, Any]]


class Shape:
    """The form of answers: completions, or chat."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self._chat = chat
        self._kind = "chat.completion" if chat else "text_completion"
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{random.getrandbits(64):016x}"
        self._model = model

    def whole(self, text: str, usage: dict[str, Any]) -> dict[str, Any]:
        """Give an answer in one."""
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return self._body(self._kind, [{"index": 0, **said, "finish_reason": "length"}], usage)

    def piece(self, text: str, *, first: bool, last: bool) -> dict[str, Any]:
        """Give a piece of an answer."""
        said: dict[str, Any] = {"text": text}
        if self._chat:
            said = {"delta": {"role": "assistant", "content": text} if first else {"content": text}}
        return self._body(self._piece, [{"index": 0, **said, "finish_reason": "length" if last else None}])

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Give the piece that ends a stream."""
        return self._body(self._piece, [], usage)

    @property
    def _piece(self) -> str:
        return "chat.completion.chunk" if self._chat else self._kind

    def _body(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        body = {"id": self._id, "object": kind, "created": int(time.time()), "model": self._model, "choices": choices}
        return body if usage is None else {**body, "usage": usage}


async def generate(engine: Engine, prompt: list[int], output: list[int], salt: str | None) -> AsyncGenerator[Any, None]:
    """Run a request: give its usage when the prompt is computed, then its tokens as they come."""
    request = await engine.begin(prompt, salt)
    done = 0
    try:
        yield {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(output),
            "total_tokens": len(prompt) + len(output),
            "prompt_tokens_details": {"cached_tokens": request.cached_tokens},
        }
        step = engine.speed.stream_interval
        while done < len(output):
            if done:
                await asyncio.sleep(engine.speed.decode_s * min(step, len(output) - done))
            piece = output[done : done + (step if done else 1)]
            done += len(piece)
            yield piece
    finally:
        engine.finish(request, output[:done])


async def stream(
    run: AsyncGenerator[Any, None], words: Words, shape: Shape, size: int, *, usage: bool
) -> AsyncIterator[bytes]:
    """Give an answer as server-sent events."""
    async with contextlib.aclosing(run):  # also when the client goes away
        facts = await anext(run)
        done = 0
        async for piece in run:
            first, done = not done, done + len(piece)
            yield _event(shape.piece(words.text_of(piece), first=first, last=done == size))
    if usage:
        yield _event(shape.usage(facts))
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def create_app(engine: Engine, words: Words, model: str) -> Litestar:
    """Make the application of one pod."""

    async def answer(wanted: Wanted, prompt: list[int], *, chat: bool) -> Response[Any] | Stream:
        if wanted.model != model:
            raise HTTPException(status_code=404, detail=f"model {wanted.model[:200]!r}: this server has {model!r}")
        count = wanted.max_completion_tokens or wanted.max_tokens or 16
        output = wanted.simulated_output[:count] or words.made_up(prompt, count)
        cache = engine.pod.engine
        if not prompt or len(prompt) + len(output) > cache.num_blocks * cache.block_size:
            raise HTTPException(status_code=400, detail=f"prompt: {len(prompt)} tokens are none or too many")
        if engine.waiting >= engine.speed.max_waiting:
            raise HTTPException(status_code=503, detail=f"{engine.waiting} prompts wait already")
        run = generate(engine, prompt, output, wanted.cache_salt)
        shape = Shape(model, chat=chat)
        if wanted.stream:
            usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            events = stream(run, words, shape, len(output), usage=usage)
            return Stream(events, media_type="text/event-stream; charset=utf-8")
        facts = await anext(run)
        async for _ in run:
            pass
        return Response(shape.whole(words.text_of(output), facts))

    @post("/v1/completions", status_code=200)
    async def completions(data: JSONBody[CompletionRequest]) -> Response[Any] | Stream:
        prompt = words.tokens_of(data.prompt) if isinstance(data.prompt, str) else data.prompt
        return await answer(data, prompt, chat=False)

    @post("/v1/chat/completions", status_code=200)
    async def chat(data: JSONBody[ChatRequest]) -> Response[Any] | Stream:
        return await answer(data, words.tokens_of_chat(data.messages), chat=True)

    @get("/v1/models")
    async def served() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model, "object": "model", "owned_by": engine.pod.name}]}

    @post("/reset_prefix_cache", status_code=200)
    async def reset() -> dict[str, bool]:
        return {"emptied": engine.reset()}

    @get("/health")
    async def health() -> dict[str, int]:
        return {"waiting": engine.waiting, "running": engine.running}

    return Litestar([completions, chat, served, reset, health], openapi_config=None, logging_config=None)


class Server(uvicorn.Server):
    """Uvicorn's, which leaves signals to `serve`: there are several in one process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing."""
        yield


async def serve(fleet: Fleet, words: Words, speed: Speed, host: str, port: int) -> None:
    """Serve all pods of a fleet until SIGTERM or SIGINT; say on standard output where."""
    servers, urls, running = [], {}, []
    for number, pod in enumerate(fleet.pods):
        listener = socket.create_server((host, port + number if port else 0), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        urls[pod.name] = f"http://{host}:{listener.getsockname()[1]}"
        app = create_app(Engine(pod, speed), words, fleet.model)
        server = Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
        servers.append(server)
        running.append(asyncio.create_task(server.serve(sockets=[listener])))

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    while not all(server.started for server in servers):
        await asyncio.sleep(0.01)
    print(json.dumps({"pods": fleet.endpoints(), "urls": urls}), flush=True)
    await asyncio.gather(*running)


def main() -> None:
    """Run them."""
    parser = argparse.ArgumentParser(description="OpenAI-compatible servers without a model.")
    parser.add_argument("--pods", type=int, default=4)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000, help="of the first pod; 0: any")
    parser.add_argument("--events-port", type=int, default=5557, help="of the first pod's events; 0: any")
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--save-tokenizer", type=Path, help="FOLDER/MODEL gets the tokenizer that is made here")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--num-blocks", type=int, default=4096, help="in each pod's cache")
    parser.add_argument("--prefill", type=float, default=Speed().prefill, help="tokens/s of each pod")
    parser.add_argument("--decode", type=float, default=Speed().decode_s, help="seconds a token")
    parser.add_argument("--stream-interval", type=int, default=Speed().stream_interval, help="tokens in a piece")
    parser.add_argument("--max-waiting", type=int, default=Speed().max_waiting, help="more prompts are refused")
    options = parser.parse_args()
    with contextlib.ExitStack() as held:
        folder = options.tokenizer
        if folder is None:
            kept = options.save_tokenizer or Path(held.enter_context(tempfile.TemporaryDirectory()))
            folder = kept / options.model
            save_tokenizer(folder)
        fleet = held.enter_context(
            Fleet(
                options.pods,
                host=options.host,
                base_port=options.events_port,
                model=options.model,
                block_size=options.block_size,
                num_blocks=options.num_blocks,
            )
        )
        speed = Speed(options.prefill, options.decode, options.stream_interval, options.max_waiting)
        asyncio.run(serve(fleet, Words(folder), speed, options.host, options.port))


if __name__ == "__main__":
    main()
