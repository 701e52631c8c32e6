"""Memory of the index for each (block, pod)."""

from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from indexer import Index, open_index
from kvevents import Message
from kvevents.testing import FullWorker
from kvindex.bench.machine import resident_bytes
from kvindex.bench.scale import Figures, Scale
from kvindex.bench.workload import CHAIN, MODEL, PODS, SHARE, Chain, make_chains, payloads_of


def memory(scale: Scale) -> Generator[Figures]:
    """Measure how much a process grows, a fresh one for each way of sharing; one round, as it comes out the same."""
    figures = {}
    for row, share in (("memory_shared", SHARE), ("memory", 1)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            figures[row] = fresh.submit(bytes_a_pair, scale.memory_pairs, share).result()
    yield figures


def bytes_a_pair(pairs: int, share: int) -> float:
    """Give the bytes by which this process, which should have done nothing else yet, grows for each (block, pod).

    Chains are made, applied and dropped one by one: what a chain takes is there before the first and after the last.
    """
    _fill(open_index("memory://"), CHAIN, 1)  # what is set up at first use
    index = open_index("memory://")
    before = resident_bytes()
    stored = _fill(index, pairs, share)
    grown = resident_bytes() - before
    if (held := index.stats()["held"]) != stored:
        raise RuntimeError(f"the index holds {held} blocks of pods after events that store {stored}")
    return grown / stored


def _fill(index: Index, pairs: int, share: int) -> int:
    """Apply the events of chains; give how many (block, pod) they store."""
    worker, sent, stored = FullWorker(index, model=MODEL), [0] * PODS, 0
    for chain in make_chains(pairs, share=share):
        worker.fill(_messages_of(chain, sent))
        worker.work()
        stored += len(chain.hashes) * len(chain.pods)
    return stored


def _messages_of(chain: Chain, sent: list[int]) -> list[Message]:
    """Give what the pods of a chain publish for it, numbered on from what they `sent`."""
    messages = []
    payloads = payloads_of(chain)
    for pod in chain.pods:
        messages += [Message(b"", sent[pod] + n, payload, f"pod-{pod}") for n, payload in enumerate(payloads)]
        sent[pod] += len(payloads)
    return messages
