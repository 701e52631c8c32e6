"""Asks once what a pod holds of a prompt, without a service: follows the pod, has its past replayed, asks, ends.

python -m examples.score_once tcp://10.0.0.7:5557 --replay tcp://10.0.0.7:5558 --model Qwen/Qwen3-8B 1 2 3 ...
"""

import argparse
import time

from indexer import Source, open_index
from kvevents import EventPool
from scorer import PodMatch, PrefixScorer


def score_once(endpoint: str, replay: str, model: str, tokens: list[int], timeout: float = 5.0) -> PodMatch:
    """Give what the pod holds of a prompt, when all that it can replay has been applied.

    Where that is not over in time, the answer's `trust` is ``degraded`` and its `reason` says why.
    """
    index, source = open_index("memory://"), Source("pod")
    with EventPool(index, workers=1) as pool:
        pool.subscribe(source.pod, endpoint, replay=replay, model=model)
        deadline = time.monotonic() + timeout
        while any(status.degraded for status in index.sources()) and time.monotonic() < deadline:
            time.sleep(0.005)  # events come when they come: a script has nothing else to do
        (match,) = PrefixScorer(index).match(tokens, model=model)
    index.close()
    return match


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description="What does this pod hold of this prompt?")
    parser.add_argument("endpoint")
    parser.add_argument("--replay", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("tokens", type=int, nargs="+")
    options = parser.parse_args()
    match = score_once(options.endpoint, options.replay, options.model, options.tokens)
    print(f"{match.tokens} of {len(options.tokens)} tokens, {match.reusable_tokens} can be reused; {match.trust}")
    if match.reason:
        print(f"  {match.reason}")


if __name__ == "__main__":
    main()
