"""Both implementations of the index side by side: `python benchmarks/index.py [--impl native] [--rounds N]`.

They take turns, round by round, and the table has for each the median of the rounds with the lowest and highest, and
how many times better the first is. Blocks have 16 tokens, stores 32 blocks, chains 2,048 blocks; 64 pods hold 500,000
(block, pod), each chain on 8 pods drawn by lot; prompts are buffers of uint32.

- hash: tokens to the keys of their blocks, kept in a `Prompt` and as a list of numbers.
- apply: vLLM's payload bytes to the index, from full queues, as a worker of the pool does it: by one thread on one
  core, and by two that have half the pods each on two cores; the same for four times as many (block, pod).
- hash, two threads against one: how much more hashing two do; without the interpreter lock (native) and with next to no
  memory that is what two cores of the machine are worth at that moment. "Two against one" cannot be better.
- match: a prompt to what each pod holds of it; then the same while a worker applies events without a pause.
- score: tokens to a dict of pod and score; where the core is installed it hashes the prompt for both.
- memory: growth of the resident set of a fresh process for each (block, pod), each chain on 8 pods and on one.
"""

import argparse
import platform
import statistics
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import structlog
from report import CORES, Figures, Row, best_impl, each, machine, note, note_latency, on_cores, resident_bytes, table
from workload import BLOCK, CHAIN, MODEL, Fleet, deliveries, make_fleet, payloads_of, prompts

from indexer import Index, Source, keys, open_index, prompt
from kvevents import Message
from kvevents.message import Publisher
from kvevents.queue import ShardQueue
from kvevents.shard import Shard
from scorer import PrefixScorer

PODS, SHARE, SHORT, QUESTIONS = 64, 8, 280, 300
SIZES = (SHORT, CHAIN)


class Made(NamedTuple):
    """How an implementation makes a prompt, and a list of keys."""

    prompt: Callable[..., prompt.Prompt]
    keys: Callable[..., list[int]]


def made_by(impl: str) -> Made:
    if impl == "python":
        return Made(prompt.Prompt, keys.block_keys)
    from indexer import _native, native

    return Made(_native.Prompt, native.block_keys)


def open_at(impl: str) -> Index:
    return open_index(f"memory://?impl={impl}")


def messages_of(fleet: Fleet) -> list[Message]:
    """Give what all pods publish, the pods taking turns."""
    sent = [0] * fleet.pods
    messages = []
    for pod, payloads in deliveries(fleet, payloads_of):
        for payload in payloads:
            messages.append(Message(b"", sent[pod], payload, f"pod-{pod}"))
            sent[pod] += 1
    return messages


def shard_of(index: Index) -> Shard:
    return Shard(index, model=MODEL, copies="count", log=structlog.get_logger())


class Worker:
    """What a thread of the pool does, with a full queue."""

    def __init__(self, index: Index, messages: list[Message]) -> None:
        self._queue = ShardQueue(len(messages) + 1, 1 << 40)
        for message in messages:
            self._queue.put(Publisher(message.pod or "", ""), message, wait=True)
        self._shard = shard_of(index)

    def work(self, enough: Callable[[], bool] = lambda: False) -> None:
        while (taken := self._queue.take(0)) and not enough():
            self._shard.apply(*taken)
            self._queue.done()


class Bench:
    """One run: the fleet, an index of each implementation filled with it, and the figures so far."""

    def __init__(self, impls: list[str], fleet: Fleet) -> None:
        self._impls = impls
        self._fleet = fleet
        self._messages = messages_of(fleet)
        self._large = make_fleet(4 * fleet.pairs, pods=fleet.pods, share=SHARE)
        self._many = messages_of(self._large)
        self._figures: Figures = {}
        self._asked = {blocks: prompts(fleet, blocks) for blocks in SIZES}
        self._filled = {impl: open_at(impl) for impl in impls}
        for impl, index in self._filled.items():
            Worker(index, self._messages).work()
            assert index.stats()["held"] == fleet.pairs
            for asked in self._asked[CHAIN]:
                held = {
                    h.source.pod: h.tokens for h in index.match(made_by(impl).prompt(asked.tokens, MODEL)) if h.tokens
                }
                assert held == {f"pod-{pod}": blocks * BLOCK for pod, blocks in asked.holds.items()}

    def round(self, number: int) -> None:
        """Measure everything once, the implementations taking turns at going first."""
        for measure in (self._hashing, self._cores, self._applying, self._matching, self._scoring):
            for impl in self._impls[:: 1 if number % 2 else -1]:
                measure(impl)

    def memory(self, pairs: int) -> None:
        """Measure memory once."""
        for share in (SHARE, 1):
            row = Row(f"memory, each chain on {share} {'pod' if share == 1 else 'pods'}", "bytes/pair")
            for impl in self._impls:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                    note(self._figures, row, impl, fresh.submit(memory_of, impl, pairs, share).result())

    def table(self) -> str:
        return table(self._figures, self._impls)

    def _hashing(self, impl: str) -> None:
        make, listed = made_by(impl)
        for row, work in (
            ("hash", lambda tokens: make(tokens, MODEL).prepare(BLOCK)),
            ("hash, keys as a list", lambda tokens: listed(tokens, MODEL)),
        ):
            with on_cores(1):
                times = each(work, [asked.tokens for asked in self._asked[CHAIN]])
            note(self._figures, Row(row, "ns/block"), impl, statistics.median(times) / CHAIN * 1e9)

    def _cores(self, impl: str) -> None:
        tokens = np.concatenate([np.asarray(asked.tokens) for asked in self._asked[CHAIN][:8]])
        make = made_by(impl).prompt

        def work(threads: int) -> float:
            def hash_some() -> None:
                for _ in range(400):
                    make(tokens, MODEL).prepare(BLOCK)

            running = [threading.Thread(target=hash_some) for _ in range(threads)]

            def run(_: object) -> None:
                for thread in running:
                    thread.start()
                for thread in running:
                    thread.join()

            with on_cores(threads):
                (taken,) = each(run, [None])
            return threads / taken

        note(self._figures, Row("hash, two threads against one", "times", more=True), impl, work(2) / work(1))

    def _applying(self, impl: str) -> None:
        for what, sent in (("apply", self._messages), (f"apply, {self._large.pairs:,} pairs", self._many)):
            one, two = (self._rate(impl, sent, workers) for workers in (1, 2))
            note(self._figures, Row(f"{what}, one worker", "M blocks/s", more=True), impl, one)
            note(self._figures, Row(f"{what}, two workers", "M blocks/s", more=True), impl, two)
            note(self._figures, Row(f"{what}, two against one", "times", more=True), impl, two / one)

    def _rate(self, impl: str, messages: list[Message], workers: int) -> float:
        index = open_at(impl)
        shares: list[list[Message]] = [[] for _ in range(workers)]
        for message in messages:
            shares[int((message.pod or "").rpartition("-")[2]) % workers].append(message)
        filled = [Worker(index, share) for share in shares]

        def work(_: object) -> None:
            threads = [threading.Thread(target=worker.work) for worker in filled[1:]]
            for thread in threads:
                thread.start()
            filled[0].work()
            for thread in threads:
                thread.join()

        with on_cores(workers):
            (taken,) = each(work, [None])
        held = index.stats()["held"]
        assert held == (self._fleet if messages is self._messages else self._large).pairs
        index.close()
        return held / taken / 1e6

    def _matching(self, impl: str) -> None:
        index, make = self._filled[impl], made_by(impl).prompt
        for blocks in SIZES:
            with on_cores(1):
                self._latency(f"match {blocks:,} blocks", impl, blocks, lambda asked: index.match(make(asked, MODEL)))
        with pouring(index, self._messages):
            for blocks in SIZES:
                what = f"match {blocks:,} blocks, events pouring in"
                self._latency(what, impl, blocks, lambda asked: index.match(make(asked, MODEL)))

    def _scoring(self, impl: str) -> None:
        scorer = PrefixScorer(self._filled[impl])
        with on_cores(1):
            for blocks in SIZES:
                self._latency(f"score {blocks:,} blocks", impl, blocks, lambda asked: scorer.score(asked, model=MODEL))

    def _latency(self, what: str, impl: str, blocks: int, work: Callable[..., object]) -> None:
        asked = self._asked[blocks]
        tokens = [asked[number % len(asked)].tokens for number in range(QUESTIONS)]
        note_latency(self._figures, what, impl, each(work, tokens))


@contextmanager
def pouring(index: Index, messages: list[Message]) -> Iterator[None]:
    """Let one worker apply events of pods of their own, over and over, without a pause."""
    done = threading.Event()
    others = [Message(b"", m.seq, m.payload, f"other-{m.pod}") for m in messages]
    for pod in {message.pod for message in others}:
        index.register(Source(pod or ""), model="bench/other")

    def pour() -> None:
        while not done.is_set():  # each time the sequence numbers begin anew, as if the pods had restarted
            Worker(index, others).work(done.is_set)

    thread = threading.Thread(target=pour)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for pod in {message.pod for message in others}:
            index.forget(pod or "")


def memory_of(impl: str, pairs: int, share: int) -> float:
    """Give the bytes by which this process, which should have done nothing else yet, grows for each (block, pod).

    The messages are made before and kept until after, so they do not count, and their memory is not used again.
    """
    fleet = make_fleet(pairs, pods=PODS, share=share)
    messages, index = messages_of(fleet), open_at(impl)
    Worker(open_at(impl), messages_of(make_fleet(CHAIN, pods=PODS, share=1))).work()  # what is set up at first use
    shard = shard_of(index)
    before = resident_bytes()
    for pod, sent in groupby(messages, lambda message: message.pod or ""):
        shard.apply(Publisher(pod, ""), list(sent))
    after = resident_bytes()
    assert index.stats()["held"] == fleet.pairs
    return (after - before) / fleet.pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", choices=["native", "python"], action="append", help="only this one; may be repeated")
    parser.add_argument("--pairs", type=int, default=500_000, help="(block, pod) in the index")
    parser.add_argument("--memory-pairs", type=int, default=5_000_000, help="the same where memory is measured; 0: not")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.pairs < CHAIN * SHARE:
        parser.error(f"--pairs: at least {CHAIN * SHARE:,}, one chain on {SHARE} pods")
    impls = options.impl or (["native", "python"] if best_impl() == "native" else ["python"])
    fleet = make_fleet(options.pairs, pods=PODS, share=SHARE)
    print(f"{machine()} ({len(CORES)} usable), python {platform.python_version()}")
    print(f"{fleet.pairs:,} (block, pod), {PODS} pods, {len(fleet.chains)} chains, {options.rounds} rounds")
    bench = Bench(impls, fleet)
    for number in range(options.rounds):
        bench.round(number)
    if options.memory_pairs:
        bench.memory(options.memory_pairs)
    print("\n" + bench.table())


if __name__ == "__main__":
    main()
