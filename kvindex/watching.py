"""`kvindex watch --url`: a running service's pods in one screen."""

import time
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table

from kvindex.doctor.run import fetch_stats
from kvindex.errors import UserError
from kvindex.stats import PodStatus, Stats

_COLUMNS = ("pod", "rank", "model", "trust", "blocks", "last seq", "messages/s", "lag", "silent", "gaps")


def run_watch_service(url: str, *, seconds: float = 0.0, every: float = 1.0, token: str = "") -> int:
    """Show a service's pods until interrupted, or for `seconds`; lines where there is no terminal.

    Raises `UserError` when the service does not answer the first time; later it is shown, and asked again.
    """
    console = Console()
    now: Stats = fetch_stats(url, token=token)
    before: Stats | None = None
    until = time.monotonic() + seconds if seconds else float("inf")
    trouble = ""
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                if console.is_terminal:
                    live.update(_table(now, before, trouble, url), refresh=True)
                else:
                    for line in _lines(now, before, trouble):
                        print(line, flush=True)
                if time.monotonic() + every > until:
                    return 0
                time.sleep(every)
                try:
                    # a service that came back may be another one, whose counters began anew
                    now, before, trouble = fetch_stats(url, token=token), None if trouble else now, ""
                except UserError as error:
                    trouble = str(error)
    except KeyboardInterrupt:
        return 0


def cells(status: PodStatus, now: Stats, before: Stats | None) -> list[str]:
    """Give what is shown of one rank of a pod, in the order of the columns."""
    was = (
        next((one for one in before.pods if (one.pod, one.rank) == (status.pod, status.rank)), None) if before else None
    )
    rate = "-"
    if before is not None and was is not None and now.at > before.at:
        rate = f"{max(0, status.messages - was.messages) / (now.at - before.at):.1f}"
    tiers = " ".join(f"{tier} {count:,}" for tier, count in sorted(status.tiers.items()))
    return [
        status.pod,
        str(status.rank),
        status.model or "-",
        "not connected" if status.connected is False else status.reason or status.trust,
        tiers or str(status.blocks),
        "-" if status.last_seq is None else str(status.last_seq),
        rate,
        _seconds(status.lag_s),
        _seconds(status.silent_s),
        str(status.gaps),
    ]


def _table(now: Stats, before: Stats | None, trouble: str, url: str) -> Table:
    table = Table(title=f"{url}: {len(now.pods)} sources, {now.index.get('held', 0):,} blocks held", caption=trouble)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("pod", "model", "trust", "blocks") else "right")
    for status in now.pods:
        table.add_row(*cells(status, now, before), style="" if status.trust == "exact" else "yellow")
    return table


def _lines(now: Stats, before: Stats | None, trouble: str) -> Iterator[str]:
    if trouble:
        yield trouble
        return
    for status in now.pods:
        pod, rank, *rest = cells(status, now, before)
        yield f"{pod} rank {rank}: " + ", ".join(
            f"{name} {value}" for name, value in zip(_COLUMNS[2:], rest, strict=True)
        )
    if not now.pods:
        yield "no pod has said anything yet"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if abs(value) < 1 else f"{value:,.1f} s"
