"""From a pod's socket to a score that has it: real publishers in a process of their own, ZMQ on loopback."""

import random
import time
from array import array
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import zmq

from indexer import open_index
from kvevents import EventPool
from kvevents.testing import Publisher
from kvindex.bench.asking import latency
from kvindex.bench.scale import Figures, Scale
from kvindex.bench.workload import MODEL, PODS, Chain, make_chain, payload_of
from scorer import PrefixScorer

Pipe: TypeAlias = "Connection[Any, Any]"

RATE, STORED = 100, 2
"""Messages a second of each pod, and blocks that each message stores."""

PATIENCE_S = 10.0
"""What is not visible so long after the last message counts as if it had just become so."""

_LOOK_EVERY_S = 0.0005
_START_S = 30.0


def visible(scale: Scale) -> Generator[Figures]:
    """All pods store the same chain, message by message, taking turns; a score says for each how far it is.

    A message is visible when a score that is asked for all the time, with a short rest in between, has its blocks.
    """
    messages = max(1, int(RATE * scale.socket_s))
    index = open_index("memory://")
    scorer = PrefixScorer(index)
    with _publishing() as (pipe, endpoints), EventPool(index, workers=2) as pool:
        for pod, endpoint in enumerate(endpoints):
            pool.subscribe(f"pod-{pod}", endpoint, model=MODEL)
        for number in range(scale.socket_rounds):
            pipe.send((number, messages))
            seen = _look(scorer, _chain(number, messages).tokens, messages)
            sent: list[float] = pipe.recv()
            taken = [at - start for at, start in zip(seen, sent, strict=True)]
            yield latency("visible", taken, unit_s=1e-3) | {
                "visible_rate": (len(sent) - 1) / (max(sent) - min(sent)),
            }


def _chain(number: int, messages: int) -> Chain:
    """Give what is stored in a round, in either process."""
    return make_chain(random.Random(number), messages * STORED)


def _look(scorer: PrefixScorer, tokens: "array[int]", messages: int) -> list[float]:
    """Give when each message of each pod became visible, in the order in which they are sent."""
    seen: list[list[float]] = [[] for _ in range(PODS)]
    until = time.monotonic() + messages / RATE + PATIENCE_S
    missing = PODS * messages
    while missing:
        scores = scorer.score(tokens, model=MODEL)
        now = time.monotonic()
        late = now > until
        for pod, times in enumerate(seen):
            come = (messages if late else int(scores.get(f"pod-{pod}", 0)) // STORED) - len(times)
            times.extend([now] * come)
            missing -= come
        time.sleep(_LOOK_EVERY_S)
    return [seen[pod][number] for number in range(messages) for pod in range(PODS)]


@contextmanager
def _publishing() -> Iterator[tuple[Pipe, list[str]]]:
    """Run the pods in a process of their own; give the way to it and where they publish."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=publish, args=(there,), daemon=True)
    process.start()
    there.close()
    try:
        yield here, here.recv()
    finally:
        here.close()
        process.join(_START_S)


def publish(pipe: Pipe) -> None:
    """Tell where the pods publish; then, for each round that is asked for, publish and tell when each message was sent.

    Ends when the other end of the pipe is closed.
    """
    with zmq.Context() as context, ExitStack() as running:
        pods = [
            running.enter_context(Publisher("tcp://127.0.0.1:0", topic=b"kv@pod-%d" % pod, context=context))
            for pod in range(PODS)
        ]
        pipe.send([pod.endpoint for pod in pods])
        while True:
            try:
                number, messages = pipe.recv()
            except EOFError:
                return
            payloads = [payload_of(store) for store in _chain(number, messages).stores(STORED)]
            for pod in pods:
                pod.wait_for_subscribers(timeout=_START_S)
            pipe.send(_publish(pods, payloads))


def _publish(pods: list[Publisher], payloads: list[bytes]) -> list[float]:
    """Publish at an even rate, the pods taking turns; give when each message was sent, by the system's own clock."""
    sent = []
    clock = time.monotonic
    start = clock()
    for number, payload in enumerate(payloads):
        for pod, publisher in enumerate(pods):
            due = start + (number + pod / len(pods)) / RATE
            if (early := due - clock()) > 0:
                time.sleep(early)
            sent.append(clock())
            publisher.send(payload)
    return sent
