"""The table of figures beside floors and goals, for people and for programs."""

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from indexer import implementation
from kvindex.bench.goals import ROWS, Row
from kvindex.bench.machine import CORES, cpu_model, version_of
from kvindex.bench.scale import Figures, Scale
from kvindex.bench.workload import PODS

_PACKAGES = ("kv-cache-indexer", "msgspec", "pyzmq", "redis")
_WIDTH = 120
"""Columns where the output is no terminal."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One row: figures of all rounds in its unit, and what they are held against."""

    name: str
    measurement: str
    """What `--only` calls it."""
    what: str
    unit: str
    median: float
    lowest: float
    highest: float
    rounds: int
    more_is_better: bool
    floor: float | None
    floor_holds: bool | None
    """None where there is no floor."""
    goal: float | None
    goal_holds: bool | None
    """None where there is no goal, or none for this implementation."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that one run measured, and on what."""

    implementation: str
    versions: dict[str, str]
    system: str
    cpu: str
    cpus: int
    usable_cpus: int
    quick: bool
    pods: int
    pairs: int
    """(block, pod) in the index."""
    memory_pairs: int
    seconds: float
    """How long it took."""
    left_out: dict[str, str]
    """What was not measured although it was asked for or nothing was chosen, and why."""
    rows: list[Line]


def make_report(
    rounds: Mapping[str, Sequence[Figures]], scale: Scale, *, quick: bool, seconds: float, left_out: dict[str, str]
) -> Report:
    """Put the figures of all rounds of each measurement together."""
    return Report(
        implementation=implementation,
        versions={"python": platform.python_version()} | {name: version_of(name) for name in _PACKAGES},
        system=platform.platform(),
        cpu=cpu_model(),
        cpus=os.cpu_count() or 1,
        usable_cpus=len(CORES),
        quick=quick,
        pods=PODS,
        pairs=scale.pairs,
        memory_pairs=scale.memory_pairs,
        seconds=seconds,
        left_out=left_out,
        rows=[line for measurement, figures in rounds.items() for line in _lines(measurement, figures)],
    )


def _lines(measurement: str, rounds: Sequence[Figures]) -> Iterable[Line]:
    for name, row in ROWS[measurement].items():
        values = [figures[name] for figures in rounds if name in figures]
        if values:
            yield _line(name, measurement, row, values)


def _line(name: str, measurement: str, row: Row, values: Sequence[float]) -> Line:
    median = statistics.median(values)
    return Line(
        name=name,
        measurement=measurement,
        what=row.what,
        unit=row.unit,
        median=median,
        lowest=min(values),
        highest=max(values),
        rounds=len(values),
        more_is_better=row.more,
        floor=row.floor,
        floor_holds=row.floor_holds(median),
        goal=row.goal,
        goal_holds=row.goal_holds(median, implementation),
    )


def print_report(report: Report) -> None:
    """Print the table."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    table = Table(box=None, pad_edge=False, title_justify="left", caption_justify="left")
    table.add_column("")  # the one that is broken where the terminal is narrow: figures are shown whole
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("lowest\nto highest", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("floor", justify="right", no_wrap=True)
    table.add_column("goal", justify="right", no_wrap=True)
    table.add_column("goal\nholds", no_wrap=True)
    for line in report.rows:
        style = "yellow" if line.goal_holds is False or line.floor_holds is False else ""
        table.add_row(*cells(line), style=style)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    console.print(f"{report.implementation} implementation, {versions}")
    console.print(f"{report.cpu}, {report.cpus} CPUs of which {report.usable_cpus} may be used, {report.system}")
    console.print(f"{report.pairs:,} (block, pod) of {report.pods} pods, memory with {report.memory_pairs:,}\n")
    console.print(table)
    console.print(f"\nmeasured in {report.seconds:.0f} s" + "; figures of --quick are rough" * report.quick)
    for name, why in report.left_out.items():
        console.print(f"left out: {name}, {why}")


def cells(line: Line) -> list[str]:
    """Give what the table says of a row."""
    bound = "≥ " if line.more_is_better else "≤ "
    return [
        line.what,
        number(line.median),
        f"{number(line.lowest)} to {number(line.highest)}" if line.rounds > 1 else "",
        line.unit,
        "" if line.floor is None else f"{bound}{line.floor:g}",
        "" if line.goal is None else f"{bound}{line.goal:g}",
        _verdict(line),
    ]


def _verdict(line: Line) -> str:
    if line.floor_holds is False:
        return "nor the floor"
    if line.goal_holds is not None:
        return "yes" if line.goal_holds else "no"
    return "" if line.goal is None else "core only"


def number(value: float) -> str:
    """Write a figure with three digits or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
