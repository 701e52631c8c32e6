"""What the benchmarks share: time and memory taken, the table they print, the machine it was on."""

import ctypes
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, TypeAlias

from indexer import IndexerError, open_index

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


class Row(NamedTuple):
    """One line of the table: what was measured, in which unit, whether more is better."""

    what: str
    unit: str
    more: bool = False


Figures: TypeAlias = dict[Row, dict[str, list[float]]]
"""The figures of each row, by contender."""


def note(figures: Figures, row: Row, name: str, value: float) -> None:
    figures.setdefault(row, {}).setdefault(name, []).append(value)


def note_latency(figures: Figures, what: str, name: str, times: list[float]) -> None:
    """Note the 50th and 99th percentile of some seconds."""
    ordered = sorted(times)
    for percent in (50, 99):
        note(figures, Row(f"{what}, p{percent}", "us"), name, percentile(ordered, percent) * 1e6)


@contextmanager
def on_cores(count: int | None) -> Iterator[None]:
    """Keep this thread, and the threads that it starts, to some of the cores; None is all of them."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(CORES)[-count:] if count else CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def each(work: Callable[..., object], values: Sequence[object]) -> list[float]:
    """Give the seconds that `work` takes for each value."""
    clock = time.perf_counter
    times = []
    gc.collect()
    gc.disable()
    try:
        for value in values:
            start = clock()
            work(value)
            times.append(clock() - start)
    finally:
        gc.enable()
    return times


def percentile(ordered: list[float], percent: int) -> float:
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def resident_bytes() -> int:
    """Give the size of the resident set, after what is free has been given back to the system."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(figures: Figures, names: list[str]) -> str:
    heads = ["", "", *names] + ["times better"] * (len(names) > 1)
    lines = [heads]
    for row, values in figures.items():
        medians = [statistics.median(values[name]) for name in names]
        cells = [
            f"{number(median)} ({number(min(values[name]))} to {number(max(values[name]))})"
            for median, name in zip(medians, names, strict=True)
        ]
        if len(names) > 1:
            cells.append(number(medians[0] / medians[1] if row.more else medians[1] / medians[0]))
        lines.append([row.what, row.unit, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(aligned, line, widths)).rstrip() for line in lines)


def aligned(cell: str, width: int) -> str:
    return cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from source"


def machine() -> str:
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    return f"{model}, {os.cpu_count()} cores"


def best_impl() -> str:
    try:
        open_index("memory://?impl=native").close()
    except (IndexerError, ImportError):
        return "python"
    return "native"
