"""How fast and how large the index is: `python benchmarks/index.py [--blocks N] [--rounds N]`.

Prints medians of several rounds with the lowest and highest, for payload bytes to index, tokens to match at 64 pods
(2,048 blocks held by 8 pods each, a list and a buffer of tokens), and memory for each (block, source).
"""

import argparse
import gc
import platform
import statistics
import time
import tracemalloc
from array import array
from collections.abc import Callable

from workload import BLOCK, MODEL, payloads

from indexer import Prompt, Source, open_index
from kvevents import decode_batch

PODS = 64


def report(name: str, unit: str, values: list[float]) -> None:
    print(f"{name:52} {statistics.median(values):12,.2f} {unit:10} ({min(values):,.2f} to {max(values):,.2f})")


def timed(work: Callable[[], object]) -> float:
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    work()
    taken = time.perf_counter() - start
    gc.enable()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"python {platform.python_version()}, {platform.machine()}, memory://?impl=python, {options.rounds} rounds")

    bodies = payloads(options.blocks, 1)
    rates = []
    for _ in range(options.rounds):
        index = open_index("memory://?impl=python")
        index.register(Source("pod"), model=MODEL)

        def apply(index=index) -> None:  # noqa: ANN001
            for body in bodies:
                index.apply(Source("pod"), decode_batch(body).events)

        rates.append(options.blocks / timed(apply) / 1e6)
        assert index.stats()["held"] == options.blocks
    report("payload bytes to index, one worker", "M blocks/s", rates)

    index = open_index("memory://?impl=python")
    for pod in range(PODS):
        index.register(Source(f"pod-{pod}"), model=MODEL)
        for body in payloads(8192, pod // 8):
            index.apply(Source(f"pod-{pod}"), decode_batch(body).events)
    tokens: list[int] = []
    for body in payloads(2048, 3):
        tokens += decode_batch(body).events[0].token_ids
    for name, asked in (("list", tokens), ("buffer", array("I", tokens))):
        prompt = Prompt(asked, MODEL)
        assert sum(holding.tokens == 2048 * BLOCK for holding in index.match(prompt)) == 8

        def match(asked=asked) -> None:  # noqa: ANN001
            index.match(Prompt(asked, MODEL))

        times = [timed(match) for _ in range(options.rounds * 20)]
        report(f"tokens ({name}) to match, 2,048 blocks, 64 pods", "us", [t * 1e6 for t in times])
        report(f"tokens ({name}) to match, 2,048 blocks, 64 pods", "M blocks/s", [2048 / t / 1e6 for t in times])

    gc.collect()
    tracemalloc.start()
    index = open_index("memory://?impl=python")
    for pod in range(PODS):
        source = Source(f"pod-{pod}")
        index.register(source, model=MODEL)
        for body in payloads(4096, pod % 8):
            index.apply(source, decode_batch(body).events)
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    report("memory for each (block, source), 8 pods a block", "bytes", [size / index.stats()["held"]])


if __name__ == "__main__":
    main()
