"""Draws lines in panels beside each other, as SVG: no more than `load` needs."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#0b7285", "#e8590c", "#868e96")
WIDTH, HEIGHT, LEFT, TOP, GAP = 230, 170, 46, 44, 62
TICKS = 4

Lines = dict[str, list[tuple[float, float]]]


class Panel(NamedTuple):
    """One diagram."""

    title: str
    lines: Lines
    """By name, each a list of (x, y)."""


def draw(panels: Sequence[Panel], *, below: str) -> str:
    """Give the diagrams as an SVG file, `below` under each; the first names the lines for all."""
    total = LEFT + len(panels) * (WIDTH + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {TOP + HEIGHT + 46}" '
        'font-family="sans-serif" font-size="11" fill="#343a40">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, name in enumerate(panels[0].lines):
        parts.append(f'<rect x="{LEFT + 110 * number}" y="8" width="14" height="4" fill="{COLOURS[number]}"/>')
        parts.append(_text(LEFT + 110 * number + 20, 14, name, "start"))
    for number, panel in enumerate(panels):
        parts += _panel(panel, LEFT + number * (WIDTH + GAP), below)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, left: float, below: str) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    most_x, most_y = max(x for x, _ in points), _round_up(max(y for _, y in points))
    bottom = TOP + HEIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return left + WIDTH * x / most_x, bottom - HEIGHT * y / most_y

    parts = [_text(left, TOP - 12, panel.title, "start"), _text(left + WIDTH / 2, bottom + 34, below, "middle")]
    for step in range(TICKS + 1):
        _, y = place(0, most_y * step / TICKS)
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#dee2e6"/>')
        parts.append(_text(left - 6, y + 4, f"{most_y * step / TICKS:g}", "end"))
    parts += [_text(place(x, 0)[0], bottom + 16, f"{x:g}", "middle") for x in sorted({x for x, _ in points})]
    for colour, line in zip(COLOURS, panel.lines.values(), strict=False):
        places = [place(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return parts


def _round_up(value: float) -> float:
    """Give a round number of at least `value`, which `TICKS` divides well."""
    unit = 1.0
    while unit * 10 <= value:
        unit *= 10
    return next(unit * step for step in (1, 2, 2.4, 3.2, 4, 6, 8, 10) if unit * step >= value)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
