"""The run: which measurements, one after the other, with progress on stderr and the table or JSON on stdout."""

import sys
import time
from collections.abc import Callable, Collection, Generator
from contextlib import closing
from functools import partial

import msgspec
from rich.console import Console
from rich.live import Live

from indexer import implementation
from kvindex.bench import asking, goals, memory, shared, visible, writing
from kvindex.bench.machine import tells_memory
from kvindex.bench.report import make_report, print_report
from kvindex.bench.scale import QUICK, Figures, Scale
from kvindex.errors import UserError

Measure = Callable[[Scale], Generator[Figures]]


def run_bench(*, quick: bool, only: Collection[str], redis_url: str, as_json: bool) -> int:
    """Measure and print; the exit status is 0, whatever the figures are.

    Raises `UserError` for a measurement that there is not, and where Redis is to be measured and cannot be.
    """
    unknown = [name for name in only if name not in goals.ROWS]
    if unknown:
        raise UserError(f"--only {unknown[0]}: expected one of {', '.join(goals.ROWS)}")
    if goals.REDIS in only and not redis_url:
        raise UserError("--only redis: needs the URL of a server, as in --redis redis://127.0.0.1:6379/0")
    scale = QUICK if quick else Scale()
    measurements, left_out = _chosen(only, redis_url)
    if redis_url and goals.REDIS in measurements:
        shared.server(redis_url).close()  # what is wrong with it is said now, not after all the rest
    start = time.monotonic()
    rounds: dict[str, list[Figures]] = {}
    console = Console(stderr=True, highlight=False)
    # drawn between rounds only: a thread that draws would be measured too
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for place, (name, measure) in enumerate(measurements.items(), 1):
            rounds[name] = []
            for figures in _started(measure, scale):
                if figures is not None:
                    rounds[name].append(figures)
                if console.is_terminal:
                    at = f"{place} of {len(measurements)}, round {len(rounds[name]) + 1}"
                    live.update(f"measuring {name} ({implementation}), {at}", refresh=True)
                elif figures is None:
                    print(f"measuring {name}", file=sys.stderr, flush=True)
    report = make_report(rounds, scale, quick=quick, seconds=time.monotonic() - start, left_out=left_out)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print_report(report)
    return 0


def _started(measure: Measure, scale: Scale) -> Generator[Figures | None]:
    """Give None when a measurement begins, then the figures of each round; what it opened is closed at the end."""
    yield None
    with closing(measure(scale)) as rounds:
        yield from rounds


def _chosen(only: Collection[str], redis_url: str) -> tuple[dict[str, Measure], dict[str, str]]:
    """Give what is to be measured, in the order of the table, and why the rest of what was wanted is left out."""
    measurements: dict[str, Measure] = {
        goals.HASH: writing.hashing,
        goals.APPLY: writing.applying,
        goals.MATCH: asking.matching,
        goals.SCORE: asking.scoring,
        goals.MEMORY: memory.memory,
        goals.SOCKET: visible.visible,
        goals.REDIS: partial(shared.sharing, url=redis_url),
    }
    cannot = {}
    if not tells_memory():
        cannot[goals.MEMORY] = "this system has no /proc/self/statm"
    if not redis_url:
        cannot[goals.REDIS] = "give --redis URL to measure a server"
    wanted = {name: measure for name, measure in measurements.items() if not only or name in only}
    return (
        {name: measure for name, measure in wanted.items() if name not in cannot},
        {name: why for name, why in cannot.items() if name in wanted},
    )
