"""This index beside NVIDIA Dynamo's, in one run: `python benchmarks/peers.py [--impl python] [--pairs N] [--rounds N]`.

One generated fleet (64 pods, 500,000 (block, pod), blocks of 16 tokens, stores of 32 blocks, chains of 2,048 blocks,
each chain on 8 pods drawn by lot) goes through both. Both must name the right pods with the right number of blocks for
sampled prompts before anything is timed. Then the two take turns, round by round, and the table has for each the median
of the rounds with the lowest and highest, and how many times better this index is (below 1: Dynamo is better):

- hash: tokens to the hashes of their blocks, for a chain of 2,048 blocks;
- apply: what the pods send to the index, by one calling thread and by four that have a quarter of the pods each;
- match: a prompt to the blocks that each pod holds of it, other prompts one after the other, 50th and 99th percentile;
- score: tokens to a dict of pod and score;
- memory: growth of the resident set of a fresh process for each (block, pod), with each chain on 8 pods and on one.

Each gets what it takes best. This index: the payload bytes that vLLM publishes (32 payloads of a pod at a time,
decoding included), prompts as a buffer of uint32, and a match that includes hashing the prompt. Dynamo: events as JSON
bytes made beforehand, with the tokens of each block already hashed, prompts as a list, and a match of blocks already
hashed. Rows that say so give both the same: payload bytes, or lists of tokens. What one caller does is measured on one
core: Dynamo's index answers from a thread of its own, and the way to a core that sleeps costs more than the answer.

Dynamo is optional (`pip install kv-cache-indexer[peers]`): without it this index is measured alone.
"""

import argparse
import platform
import statistics
import sys
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import msgspec
from report import Figures, Row, best_impl, note, note_latency, table

from indexer import Prompt, Source, block_keys, open_index
from kvevents import decode_batches
from kvindex.bench.machine import each, machine, on_cores, resident_bytes, version_of
from kvindex.bench.workload import (
    BLOCK,
    CHAIN,
    MODEL,
    Asked,
    Chain,
    Fleet,
    deliveries,
    make_fleet,
    payloads_of,
    prompts,
    samples,
)
from scorer import PrefixScorer

SHORT, CALLERS, QUESTIONS = 280, 4, 300
PACKAGE = "ai-dynamo-runtime"

Pieces: TypeAlias = list[tuple[int, list[bytes]]]
"""Messages of one pod at a time."""


class Contender(Protocol):
    """One index with its hashing, filled through `apply` and asked through the others."""

    name: str

    def messages(self, chain: Chain) -> list[bytes]:
        """Give what a pod that holds the chain sends, in the form that `apply` takes."""

    def apply(self, pod: int, messages: list[bytes]) -> None: ...

    def apply_payloads(self, pod: int, payloads: list[bytes]) -> None:
        """Apply what vLLM publishes."""

    def best_form(self, tokens: "array[int]") -> Sequence[int]:
        """Give tokens in the form that `hash` and `scores` are fastest with."""

    def question(self, tokens: "array[int]") -> Sequence[int]:
        """Give the prompt in the form that `match` takes."""

    def hash(self, tokens: Sequence[int]) -> Sequence[int]: ...

    def match(self, question: Sequence[int]) -> object: ...

    def scores(self, tokens: Sequence[int]) -> object: ...

    def held(self, tokens: "array[int]") -> dict[int, int]:
        """Give the blocks that each pod holds, from `match`, having seen that `scores` says the same."""

    def close(self) -> None:
        """Give the memory back before returning."""


class Ours:
    """The memory index of this project, read through `match` and through the scorer, as a router does."""

    def __init__(self, impl: str, pods: int) -> None:
        self.name = f"kvindex ({impl})"
        self._index = open_index(f"memory://?impl={impl}")
        self._sources = [Source(f"pod-{pod}") for pod in range(pods)]
        for source in self._sources:
            self._index.register(source, model=MODEL)
        self._scorer = PrefixScorer(self._index)
        self._pods = {source.pod: pod for pod, source in enumerate(self._sources)}

    def messages(self, chain: Chain) -> list[bytes]:
        return payloads_of(chain)

    def apply(self, pod: int, messages: list[bytes]) -> None:
        batches = decode_batches(messages, self._index)
        self._index.apply_all(self._sources[pod], [batch.events for batch in batches])

    apply_payloads = apply

    def best_form(self, tokens: "array[int]") -> Sequence[int]:
        return tokens

    question = best_form

    def hash(self, tokens: Sequence[int]) -> Sequence[int]:
        return block_keys(tokens, MODEL, block_size=BLOCK)

    def match(self, question: Sequence[int]) -> object:
        return self._index.match(Prompt(question, MODEL))

    def scores(self, tokens: Sequence[int]) -> object:
        return self._scorer.score(tokens, model=MODEL)

    def held(self, tokens: "array[int]") -> dict[int, int]:
        holdings = self._index.match(Prompt(tokens, MODEL))
        held = {self._pods[h.source.pod]: h.tokens // BLOCK for h in holdings if h.tokens}
        scores = self._scorer.score(tokens, model=MODEL)
        assert {self._pods[pod]: score for pod, score in scores.items()} == held, (scores, held)
        return held

    def close(self) -> None:
        self._index.close()


class _Published(msgspec.Struct):
    """What Dynamo needs of vLLM's BlockStored."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]


class _Block(msgspec.Struct):
    block_hash: int
    tokens_hash: int


class Dynamo:
    """The `RadixTree` of Dynamo's Python binding.

    It is the only index of the binding that a program fills and asks by itself: `KvIndexer` is in the stubs, no longer
    in the module, and `SelectionService` reads events from ZMQ sockets only and is asked through asyncio, with a dict
    for each worker as the answer (350 us for 280 blocks). A `RadixTree` lives in a thread of its own, to which every
    call is sent: it is at its best with several callers, or where both threads share a core.
    """

    name = "Dynamo"

    def __init__(self) -> None:
        from dynamo.llm import RadixTree, compute_block_hash_for_seq

        self._tree = RadixTree()
        self._hash = compute_block_hash_for_seq
        self._decode = msgspec.msgpack.Decoder(tuple[float, list[_Published], int]).decode
        self._encode = msgspec.json.Encoder().encode
        self._pods: set[int] = set()

    def messages(self, chain: Chain) -> list[bytes]:
        return [self._event(store.hashes, store.parent, store.tokens) for store in chain.stores()]

    def _event(self, hashes: list[int], parent: int | None, tokens: list[int]) -> bytes:
        blocks = list(map(_Block, hashes, self._hash(tokens, BLOCK)))
        return self._encode({"event_id": 0, "data": {"stored": {"parent_hash": parent, "blocks": blocks}}})

    def apply(self, pod: int, messages: list[bytes]) -> None:
        self._pods.add(pod)
        for message in messages:
            self._tree.apply_event(pod, message)

    def apply_payloads(self, pod: int, payloads: list[bytes]) -> None:
        for payload in payloads:
            for event in self._decode(payload)[1]:
                body = self._event(event.block_hashes, event.parent_block_hash, event.token_ids)
                self._tree.apply_event(pod, body)

    def best_form(self, tokens: "array[int]") -> Sequence[int]:
        return tokens.tolist()  # an array takes it twice as long, a numpy array three times

    def question(self, tokens: "array[int]") -> Sequence[int]:
        return self.hash(tokens.tolist())

    def hash(self, tokens: Sequence[int]) -> Sequence[int]:
        return self._hash(tokens, BLOCK)

    def match(self, question: Sequence[int]) -> object:
        return self._tree.find_matches(question).scores

    def scores(self, tokens: Sequence[int]) -> object:
        return self._tree.find_matches(self._hash(tokens, BLOCK)).scores

    def held(self, tokens: "array[int]") -> dict[int, int]:
        scores = self._tree.find_matches(self.question(tokens)).scores
        return {pod: blocks for (pod, _), blocks in scores.items()}

    def close(self) -> None:
        # a tree that is dropped full is taken down by its thread, in the middle of the next measurement
        for pod in self._pods:
            self._tree.remove_worker(pod)


class Side(NamedTuple):
    """How to open one contender, in this process or another."""

    impl: str | None
    """Of this index; None is Dynamo."""
    pods: int

    def open(self) -> Contender:
        return Dynamo() if self.impl is None else Ours(self.impl, self.pods)


class Bench:
    """One run: the fleet, both contenders filled with it, and the figures so far."""

    def __init__(self, sides: list[Side], fleet: Fleet) -> None:
        self._figures: Figures = {}
        self._sides = sides
        self._fleet = fleet
        self._filled = [side.open() for side in sides]
        self._pieces = [deliveries(fleet, contender.messages) for contender in self._filled]
        self._payloads = deliveries(fleet, payloads_of)
        self._asked = {blocks: prompts(fleet, blocks) for blocks in (SHORT, CHAIN)}
        for contender, pieces in zip(self._filled, self._pieces, strict=True):
            fill(contender.apply, pieces)

    def check(self) -> None:
        """See that each names the right pods with the right number of blocks."""
        asked = [*samples(self._fleet), *self._asked[SHORT], *self._asked[CHAIN]]
        for contender in self._filled:
            check(contender, asked)
            print(f"checked: {contender.name} names the right pods and blocks for {len(asked)} prompts")

    def round(self, number: int) -> None:
        """Measure everything once, the contenders taking turns at going first."""
        turns = range(len(self._sides))
        turns = turns if number % 2 else turns[::-1]
        for measure in (self._hashing, self._applying, self._matching, self._scoring):
            for turn in turns:
                measure(turn)

    def memory(self, share: int) -> None:
        """Measure memory once, for the fleet and for one of the same size without sharing."""
        for holders in (share, 1):
            row = Row(f"memory, each chain on {holders} {'pod' if holders == 1 else 'pods'}", "bytes/pair")
            for side, contender in zip(self._sides, self._filled, strict=True):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                    grown = fresh.submit(memory_of, side, self._fleet.pairs, holders).result()
                note(self._figures, row, contender.name, grown)

    def table(self) -> str:
        return table(self._figures, [contender.name for contender in self._filled])

    def _hashing(self, turn: int) -> None:
        contender = self._filled[turn]
        chains = [asked.tokens for asked in self._asked[CHAIN]]
        for form, make in (("", contender.best_form), (", from a list", list)):
            times = each(contender.hash, [make(tokens) for tokens in chains])
            note(self._figures, Row("hash" + form, "ns/block"), contender.name, statistics.median(times) / CHAIN * 1e9)

    def _applying(self, turn: int) -> None:
        name = self._filled[turn].name
        note(self._figures, Row("apply", "M blocks/s", more=True), name, self._rate(turn, self._pieces[turn]))
        row = Row(f"apply, {CALLERS} callers", "M blocks/s", more=True)
        note(self._figures, row, name, self._rate(turn, self._pieces[turn], callers=CALLERS))
        row = Row("apply, both from vLLM's payload bytes", "M blocks/s", more=True)
        note(self._figures, row, name, self._rate(turn, self._payloads, payloads=True))

    def _rate(self, turn: int, pieces: Pieces, *, callers: int = 1, payloads: bool = False) -> float:
        with on_cores(1 if callers == 1 else None):
            contender = self._sides[turn].open()
            taken = fill(contender.apply_payloads if payloads else contender.apply, pieces, callers)
            check(contender, self._asked[CHAIN][-1:])
            contender.close()
        return self._fleet.pairs / taken / 1e6

    def _matching(self, turn: int) -> None:
        contender = self._filled[turn]
        for blocks, asked in self._asked.items():
            self._latency(f"match {blocks:,} blocks", contender, contender.match, contender.question, asked)

    def _scoring(self, turn: int) -> None:
        contender = self._filled[turn]
        for blocks, asked in self._asked.items():
            what = f"score {blocks:,} blocks"
            self._latency(what, contender, contender.scores, contender.best_form, asked)
            self._latency(what + ", from a list", contender, contender.scores, list, asked)

    def _latency(
        self,
        what: str,
        contender: Contender,
        work: Callable[[Sequence[int]], object],
        form: "Callable[[array[int]], Sequence[int]]",
        asked: list[Asked],
    ) -> None:
        prepared = [form(one.tokens) for one in asked]
        times = each(work, [prepared[i % len(prepared)] for i in range(QUESTIONS)])
        note_latency(self._figures, what, contender.name, times)


def check(contender: Contender, asked: list[Asked]) -> None:
    for prompt in asked:
        held = contender.held(prompt.tokens)
        assert held == prompt.holds, f"{contender.name}: pods and blocks {held}, expected {prompt.holds}"


def fill(apply: Callable[[int, list[bytes]], None], pieces: Pieces, callers: int = 1) -> float:
    """Apply all messages, those of one pod in order and by one thread, and give the seconds it took."""
    shares = [[piece for piece in pieces if piece[0] % callers == caller] for caller in range(callers)]

    def work(share: Pieces) -> None:
        for pod, messages in share:
            apply(pod, messages)

    if callers == 1:
        return each(work, shares)[0]
    with ThreadPoolExecutor(callers) as threads:
        return each(lambda shares: list(threads.map(work, shares)), [shares])[0]


def memory_of(side: Side, pairs: int, share: int) -> float:
    """Give the bytes by which this process, which should have done nothing else yet, grows for each (block, pod).

    The messages are made before and kept until after, so they do not count, and their memory is not used again.
    """
    fleet = make_fleet(pairs, pods=side.pods, share=share)
    contender, first = side.open(), side.open()
    pieces = deliveries(fleet, contender.messages)
    fill(first.apply, pieces[:1])  # what is loaded or set up at first use is no part of the growth
    first.held(fleet.chains[0].tokens)
    first.close()
    before = resident_bytes()
    fill(contender.apply, pieces)
    after = resident_bytes()
    check(contender, prompts(fleet, CHAIN)[-1:])
    return (after - before) / fleet.pairs


def dynamo_works() -> bool:
    try:
        from dynamo.llm import RadixTree, compute_block_hash_for_seq  # noqa: F401
    except ImportError as error:
        print(f"\nwithout Dynamo ({error}); to compare: {sys.executable} -m pip install {PACKAGE}", end="")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--impl", choices=["native", "python"], help="of this index; by default native where it is there"
    )
    parser.add_argument("--pairs", type=int, default=500_000, help="(block, pod) in the index")
    parser.add_argument("--pods", type=int, default=64)
    parser.add_argument("--share", type=int, default=8, help="pods that hold each chain")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.pairs // options.share < CHAIN or options.share > options.pods:
        parser.error(f"--pairs: at least {CHAIN:,} for each of --share; --share: at most --pods")

    sides = [Side(options.impl or best_impl(), options.pods)]
    print(f"{machine()}, python {platform.python_version()}, kv-cache-indexer {version_of('kv-cache-indexer')}", end="")
    if dynamo_works():
        sides.append(Side(None, options.pods))
        print(f", {PACKAGE} {version_of(PACKAGE)}", end="")
    fleet = make_fleet(options.pairs, pods=options.pods, share=options.share)
    print(
        f"\n{fleet.pairs:,} (block, pod), {options.pods} pods, {len(fleet.chains)} chains on {options.share} pods each,"
        f" {options.rounds} rounds"
    )
    with on_cores(1):
        bench = Bench(sides, fleet)
        bench.check()
        for turn in range(options.rounds):
            bench.round(turn)
    if Path("/proc/self/statm").exists():
        for _ in range(min(options.rounds, 3)):
            bench.memory(options.share)
    print("\n" + bench.table())


if __name__ == "__main__":
    main()
