"""Matching and scoring: how long a question takes, on its own and while events pour in."""

import threading
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

from indexer import Index, Prompt, Source, open_index
from kvevents import Message
from kvevents.testing import FullWorker
from kvindex.bench.machine import each, on_cores, percentile
from kvindex.bench.scale import Figures, Scale
from kvindex.bench.workload import BLOCK, CHAIN, MODEL, Asked, Fleet, make_fleet, messages_of, prompts
from scorer import PrefixScorer

SHORT = 280
"""Blocks of the shorter prompt."""

OTHER = "bench/other"
"""The model of the pods whose events pour in."""


def matching(scale: Scale) -> Generator[Figures]:
    """A prompt of 2,048 blocks to what each of 64 pods holds of it, from tokens; hashing is part of it."""
    with _filled(make_fleet(scale.pairs)) as (index, asked, messages):

        def match(tokens: "array[int]") -> object:
            return index.match(Prompt(tokens, MODEL))

        for _ in range(scale.rounds):
            with on_cores(1):
                alone = _percentiles("match", asked, match, scale)
            with _pouring(index, messages):
                pouring = _percentiles("match_pouring", asked, match, scale)
            yield alone | pouring


def scoring(scale: Scale) -> Generator[Figures]:
    """Tokens of 280 blocks to the scores of 64 pods."""
    with _filled(make_fleet(scale.pairs)) as (index, asked, _):
        scorer = PrefixScorer(index)
        short = [one._replace(tokens=one.tokens[: SHORT * BLOCK]) for one in asked]
        for _ in range(scale.rounds):
            with on_cores(1):
                figures = _percentiles("score", short, lambda tokens: scorer.score(tokens, model=MODEL), scale)
            yield figures


def latency(name: str, seconds: Sequence[float], *, unit_s: float) -> dict[str, float]:
    """Give the 50th and 99th percentile of some seconds, in a unit of so many."""
    ordered = sorted(seconds)
    return {f"{name}_p{percent}": percentile(ordered, percent) / unit_s for percent in (50, 99)}


def _percentiles(
    name: str, asked: Sequence[Asked], work: Callable[["array[int]"], object], scale: Scale
) -> dict[str, float]:
    questions = [asked[number % len(asked)].tokens for number in range(scale.questions)]
    return latency(name, each(work, questions), unit_s=1e-6)


@contextmanager
def _filled(fleet: Fleet) -> Iterator[tuple[Index, list[Asked], list[Message]]]:
    """Give an index that holds a fleet, prompts of 2,048 blocks and the messages that filled it."""
    index, messages, asked = open_index("memory://"), messages_of(fleet), prompts(fleet, CHAIN)
    FullWorker(index, messages, model=MODEL).work()
    for one in asked:
        holdings = index.match(Prompt(one.tokens, MODEL))
        held = {holding.source.pod: holding.tokens // BLOCK for holding in holdings if holding.tokens}
        if held != {f"pod-{pod}": blocks for pod, blocks in one.holds.items()}:
            raise RuntimeError(f"the index says {held} where pods hold {one.holds}")
    yield index, asked, messages
    index.close()


@contextmanager
def _pouring(index: Index, messages: Sequence[Message]) -> Iterator[None]:
    """Let one worker apply events of pods of their own, over and over, without a pause."""
    done = threading.Event()
    others = [Message(b"", m.seq, m.payload, f"other-{m.pod}") for m in messages]
    pods = {message.pod or "" for message in others}
    for pod in pods:
        index.register(Source(pod), model=OTHER)

    def pour() -> None:
        while not done.is_set():  # each time the sequence numbers begin anew, as if the pods had restarted
            FullWorker(index, others, model=MODEL).work(done.is_set)

    thread = threading.Thread(target=pour)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for pod in pods:
            index.forget(pod)
