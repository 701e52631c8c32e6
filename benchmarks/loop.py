"""What closing the loop is worth with pods whose events get lost: `python benchmarks/loop.py [--seeds 3]`.

A simulated engine of 700 blocks serves 40 conversations of 12 to 44 blocks, so that most of what comes again has partly
been evicted. For 400 requests a share of the events is lost for good while nobody observes; then each request is
routed, run and observed. "Then none": no more is lost from there on, the index is only wrong from before. "Then the
same": it goes on. The error is |predicted - reused| in blocks for each request, the mean over requests 101 to 600; the
same requests with `heal` and without. "Wrong before": how many predictions had been wrong when the pod was marked, that
of the last request included.

The second table has the same where the scorer sees less or other things happen at once, with losses that go on.
"""

import argparse
from collections.abc import Iterable
from itertools import islice
from statistics import fmean
from typing import NamedTuple

from drifting import DriftingPod, Losses, Traffic, conversations

from indexer import open_index
from kvevents import EventPool
from scorer import PrefixScorer

WARM, OBSERVED, SETTLED = 400, 600, 100
USUAL = Traffic()


class Outcome(NamedTuple):
    """What came of one run."""

    marked: int | None
    """The request that marked the pod."""
    wrong: int
    """Wrong predictions up to that one, or in all."""
    error: float


def run(before: Losses, after: Losses, traffic: Traffic, *, heal: bool, seed: int) -> Outcome:
    """Lose events, then observe."""
    index = open_index()
    scorer = PrefixScorer(index, heal=EventPool(index).recount if heal else None)
    pod = DriftingPod(index, "pod", before, num_blocks=700, seed=seed)
    prompts = conversations(seed, count=40, blocks=20)
    for _ in range(WARM):
        pod.hear(pod.engine.run(next(prompts)).events)
    pod.losses = after
    marked, wrong, errors = None, 0, []
    for number, seen in enumerate(islice(pod.serve(scorer, prompts, traffic, seed=seed), OBSERVED), 1):
        errors.append(abs(seen.error_blocks))
        wrong += marked is None and seen.error_blocks != 0
        marked = marked or (number if seen.drifting else None)
    return Outcome(marked, wrong, fmean(errors[SETTLED:]))


def row(what: str, then: str, before: Losses, after: Losses, traffic: Traffic, seeds: Iterable[int]) -> str:
    """Give a row of a table."""
    plain = [run(before, after, traffic, heal=False, seed=seed) for seed in seeds]
    healed = [run(before, after, traffic, heal=True, seed=seed) for seed in seeds]
    marks = ", ".join("never" if one.marked is None else str(one.marked) for one in plain)
    wrong = ", ".join(str(one.wrong) for one in plain)
    error, rest = fmean(one.error for one in plain), fmean(one.error for one in healed)
    less = f"{1 - rest / error:.0%}" if error else "-"
    return f"| {what} | {then} | {marks} | {wrong} | {error:.3f} | {rest:.3f} | {less} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(1, parser.parse_args().seeds + 1)
    columns = "marked at request | wrong before | error | with heal | less by |\n|---|---|---|---|---|---|---|"
    print(f"| lost | then | {columns}")
    removals = [(f"{share:.0%} of removals", Losses(share)) for share in (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)]
    stores = [(f"{share:.0%} of stores", Losses(0, share)) for share in (0.1, 0.3)]
    for what, losses in [*removals, *stores]:
        if losses.removals:
            print(row(what, "none", losses, Losses(), USUAL, seeds), flush=True)
        print(row(what, "the same", losses, losses, USUAL, seeds), flush=True)
    print(f"\n| lost | traffic | {columns}")
    for kind, traffic in {
        "answers of about 100 tokens": Traffic(generated=100),
        "8 at once": Traffic(at_once=8),
        "half of it unseen": Traffic(unseen=0.5),
        "all three": Traffic(0.5, 100, 8),
    }.items():
        for what, losses in [removals[0], removals[1], removals[3], removals[-1], stores[0]]:
            print(row(what, kind, losses, losses, traffic, seeds), flush=True)


if __name__ == "__main__":
    main()
