"""What closing the loop is worth with pods whose events get lost: `python benchmarks/loop.py [--seeds 3]`.

A simulated engine of 700 blocks serves 40 conversations of 12 to 44 blocks, so that most of what comes again has partly
been evicted. For 400 requests a share of the removals is lost for good while nobody observes; then each request is
routed, run and observed. "Then none": no more is lost from there on, the index is only wrong from before. "Then the
same": it goes on. The error is |predicted - reused| in blocks for each request, the mean over requests 101 to 600; the
same requests with `heal` and without.
"""

import argparse
from statistics import fmean

from drifting import DriftingPod, Losses, conversations

from indexer import open_index
from kvevents import EventPool
from scorer import PrefixScorer

WARM, OBSERVED, SETTLED = 400, 600, 100


def run(before: Losses, after: Losses, *, heal: bool, seed: int) -> tuple[int | None, float]:
    """Give the request that marked the pod, and the mean error."""
    index = open_index()
    scorer = PrefixScorer(index, heal=EventPool(index).recount if heal else None)
    pod = DriftingPod(index, "pod", before, num_blocks=700, seed=seed)
    prompts = conversations(seed, count=40, blocks=20)
    for _ in range(WARM):
        pod.hear(pod.engine.run(next(prompts)).events)
    pod.losses = after
    marked, errors = None, []
    for number in range(1, OBSERVED + 1):
        seen = pod.request(scorer, next(prompts))
        errors.append(abs(seen.error_blocks))
        marked = marked or (number if seen.drifting else None)
    return marked, fmean(errors[SETTLED:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(1, parser.parse_args().seeds + 1)
    print("| lost | then | marked at request | error | with heal | less by |")
    print("|---|---|---|---|---|---|")
    cases = [(Losses(share), Losses(share * on), f"{share:.0%} of removals", ("none", "the same")[on])
             for share in (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0) for on in (0, 1) if share or on]  # fmt: skip
    cases += [(Losses(0, share), Losses(0, share), f"{share:.0%} of stores", "the same") for share in (0.1, 0.3)]
    for before, after, what, then in cases:
        plain = [run(before, after, heal=False, seed=seed) for seed in seeds]
        healed = [run(before, after, heal=True, seed=seed) for seed in seeds]
        marks = ", ".join("never" if mark is None else str(mark) for mark, _ in plain)
        error, rest = fmean(error for _, error in plain), fmean(error for _, error in healed)
        less = f"{1 - rest / error:.0%}" if error else "-"
        print(f"| {what} | {then} | {marks} | {error:.3f} | {rest:.3f} | {less} |")


if __name__ == "__main__":
    main()
