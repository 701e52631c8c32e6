"""Hashing and applying: how fast blocks get into the index."""

import statistics
import threading
from array import array
from collections.abc import Callable, Generator, Sequence

from indexer import Prompt, block_keys, open_index
from kvevents import Message
from kvevents.testing import FullWorker
from kvindex.bench.machine import CORES, each, on_cores
from kvindex.bench.scale import Figures, Scale
from kvindex.bench.workload import BLOCK, CHAIN, MODEL, make_fleet, messages_of, prompts

_TOGETHER = 8
"""Chains hashed at once where threads are compared: long enough for a call that lets other threads run."""

_HASHING_S = 0.05
"""About how long each thread hashes there."""


def hashing(scale: Scale) -> Generator[Figures]:
    """Tokens to the keys of their blocks, kept in a `Prompt` and as a list of numbers; one thread.

    Each prompt is hashed twice in a row: tokens that were just received are in the cache, as they are the second time.
    """
    asked = [asked.tokens for asked in prompts(make_fleet(scale.pairs), CHAIN)]
    for _ in range(scale.rounds):
        with on_cores(1):
            kept = each(_hash, [tokens for tokens in asked for _ in range(2)])
            listed = each(lambda tokens: block_keys(tokens, MODEL), asked)
        yield {
            "hash": statistics.median(kept[1::2]) / CHAIN * 1e9,
            "hash_cold": statistics.median(kept[::2]) / CHAIN * 1e9,
            "hash_list": statistics.median(listed) / CHAIN * 1e9,
        }


def applying(scale: Scale) -> Generator[Figures]:
    """Payload bytes to the index, from full queues: by one thread on one core, by two with half the pods each on two.

    What two cores are worth at that moment is measured with hashing, which needs next to no memory and, in the core, no
    interpreter lock. With one core there is nothing to compare.
    """
    fleet = make_fleet(scale.pairs)
    messages = messages_of(fleet)
    tokens = [asked.tokens for asked in prompts(fleet, CHAIN)]
    together = array("I", b"".join(chain.tobytes() for chain in tokens[:_TOGETHER]))
    times = max(1, int(_HASHING_S / each(_hash, [together])[0]))
    for _ in range(scale.rounds):
        one = _rate(messages, fleet.pairs, 1)
        if len(CORES) < 2:
            yield {"apply": one}
            continue
        two = _rate(messages, fleet.pairs, 2)
        worth = 2 * _hash_in_threads(together, times, 1) / _hash_in_threads(together, times, 2)
        yield {"apply": one, "apply_two": two, "apply_scaling": two / one, "cores_scaling": worth}


def _hash(tokens: "array[int]") -> None:
    Prompt(tokens, MODEL).prepare(BLOCK)


def _hash_in_threads(tokens: "array[int]", times: int, threads: int) -> float:
    """Give the seconds in which some threads hash so often each."""

    def work() -> None:
        for _ in range(times):
            _hash(tokens)

    return _seconds([work] * threads)


def _rate(messages: Sequence[Message], pairs: int, workers: int) -> float:
    """Give how many millions of blocks some workers apply in a second."""
    shares: list[list[Message]] = [[] for _ in range(workers)]
    for message in messages:
        shares[int((message.pod or "").rpartition("-")[2]) % workers].append(message)
    index = open_index("memory://")
    seconds = _seconds([FullWorker(index, share, model=MODEL).work for share in shares])
    held = index.stats()["held"]
    index.close()
    if held != pairs:
        raise RuntimeError(f"the index holds {held} blocks of pods after events that store {pairs}")
    return pairs / seconds / 1e6


def _seconds(works: Sequence[Callable[[], None]]) -> float:
    """Give the seconds until all are done, each in a thread on a core of its own."""

    def work(_: object) -> None:
        threads = [threading.Thread(target=work) for work in works[1:]]
        for thread in threads:
            thread.start()
        works[0]()
        for thread in threads:
            thread.join()

    with on_cores(len(works)):
        (taken,) = each(work, [None])
    return taken
