"""What the benchmarks share: the table of contenders side by side that they print."""

import statistics
from typing import NamedTuple, TypeAlias

from indexer import IndexerError, open_index
from kvindex.bench.machine import percentile
from kvindex.bench.report import number


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


def best_impl() -> str:
    try:
        open_index("memory://?impl=native").close()
    except (IndexerError, ImportError):
        return "python"
    return "native"
