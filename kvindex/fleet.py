"""A fleet of simulated engines that publish over real sockets."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import zmq

from kvevents.testing import Dialect, Publisher, RawEvent, cleared, removed, stored
from kvindex.engine import EngineEvent, Removed, Request, SimulatedEngine, Stored


def on_the_wire(dialect: Dialect, event: EngineEvent, block_size: int) -> RawEvent:
    """Say an engine's event in the words of a dialect."""
    match event:
        case Stored(hashes, parent, tokens, lora_name, salt):
            return stored(dialect, hashes, parent, tokens, block_size, lora_name=lora_name, cache_salt=salt)
        case Removed(name):
            return removed(dialect, [name])
        case _:
            return cleared(dialect)


@dataclass(eq=False)
class Pod:
    """One engine and its publisher."""

    name: str
    engine: SimulatedEngine
    publisher: Publisher
    dialect: Dialect
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    blocks_published: int = 0

    @property
    def hit_share(self) -> float:
        """The share of all prompt tokens that was not computed again."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def begin(self, prompt: Sequence[int]) -> Request:
        """Run a prompt, publish what it did to the cache, and keep its blocks in use."""
        request = self.engine.begin(prompt)
        self.requests += 1
        self.prompt_tokens += len(prompt)
        self.cached_tokens += request.cached_tokens
        self._publish(request.events)
        return request

    def finish(self, request: Request, output: Sequence[int] = ()) -> None:
        """End a request and publish what its output did to the cache."""
        self._publish(self.engine.finish(request, output))

    def reset(self) -> None:
        """Empty the cache."""
        self._publish(self.engine.reset())

    def _publish(self, events: Sequence[EngineEvent]) -> None:
        if not events:
            return
        self.blocks_published += sum(len(event.hashes) for event in events if isinstance(event, Stored))
        self.publisher.publish([on_the_wire(self.dialect, event, self.engine.block_size) for event in events])


class Fleet:
    """Simulated pods, each with an engine, a publisher and a replay socket.

    Pod number i publishes at port `base_port + 2 * i` of `host` and replays at the port after it; `base_port=0` takes
    any free ports. `dialects` are given to the pods in turn. Use it as a context manager or call `close`.

    Raises `zmq.ZMQError` when an endpoint cannot be bound.
    """

    def __init__(
        self,
        pods: int = 16,
        *,
        base_port: int = 0,
        host: str = "127.0.0.1",
        model: str = "sim/model",
        block_size: int = 16,
        num_blocks: int = 2_048,
        dialects: Sequence[Dialect] = ("vllm-map",),
        seed: int = 0,
    ) -> None:
        if pods < 1 or not dialects:
            raise ValueError(f"expected at least one pod and one dialect, got {pods} and {list(dialects)}")
        self.model = model
        self.pods: list[Pod] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.max_sockets = 4 * pods + 64
        try:
            for number in range(pods):
                name = f"pod-{number:02}"
                ports = (base_port + 2 * number, base_port + 2 * number + 1) if base_port else (0, 0)
                publisher = Publisher(
                    f"tcp://{host}:{ports[0]}",
                    replay=f"tcp://{host}:{ports[1]}",
                    topic=f"kv@{name}@{model}".encode(),
                    context=self._context,
                )
                engine = SimulatedEngine(block_size=block_size, num_blocks=num_blocks, seed=seed * 1_000 + number)
                self.pods.append(Pod(name, engine, publisher, dialects[number % len(dialects)]))
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Fleet({len(self.pods)} pods of {self.model!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, pod: Pod | int, prompt: Sequence[int], output: Sequence[int] = ()) -> int:
        """Run one request on a pod (or the pod of a number); give the tokens that were cached."""
        chosen = self.pods[pod] if isinstance(pod, int) else pod
        request = chosen.begin(prompt)
        chosen.finish(request, output)
        return request.cached_tokens

    def endpoints(self) -> list[dict[str, str]]:
        """Say where each pod publishes and replays."""
        return [
            {
                "pod": pod.name,
                "endpoint": pod.publisher.endpoint,
                "replay": pod.publisher.replay or "",
                "model": self.model,
            }
            for pod in self.pods
        ]

    def blocks_published(self) -> int:
        """Give the number of blocks that all pods have announced."""
        return sum(pod.blocks_published for pod in self.pods)

    def close(self) -> None:
        """Close all sockets. May be called twice."""
        for pod in self.pods:
            pod.publisher.close()
        if not self._context.closed:
            self._context.term()
