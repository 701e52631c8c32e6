"""`kvindex watch`: live events in the terminal."""

import time
from collections import Counter

from rich.console import Console
from rich.live import Live
from rich.table import Table

from kvevents import BlockRemoved, BlockStored, DecodeError, Heard, Listener, decode_batch
from kvindex.reach import Reach


def run_watch(endpoints: list[str], *, topic: str = "", seconds: float = 0.0) -> int:
    """Subscribe to publishers and show what they say, for `seconds` (0: until interrupted).

    Raises `SubscriptionError` for an endpoint that cannot be used.
    """
    console = Console()
    counts = {endpoint: Counter[str]() for endpoint in endpoints}
    last: dict[str, int] = {}
    start = time.monotonic()
    reach = Reach(topic, start)
    try:
        with Listener(list(counts), topic=topic) as listener, Live(console=console, auto_refresh=False) as live:
            while not seconds or time.monotonic() - start < seconds:
                said = reach.quiet(time.monotonic())
                for what in listener.receive(0.25):
                    if not isinstance(what, Heard):
                        said.append(reach.change(what))
                        continue
                    reach.heard(what.endpoint)
                    line = _take(what.frames, counts[what.endpoint], last, what.endpoint)
                    if not console.is_terminal:
                        print(f"{what.endpoint} {line}", flush=True)
                for line in filter(None, said):
                    live.console.print(line, markup=False, highlight=False, soft_wrap=True)
                if console.is_terminal:
                    live.update(_table(counts, last, time.monotonic() - start), refresh=True)
    except KeyboardInterrupt:
        pass
    if not console.is_terminal:
        Console(width=120).print(_table(counts, last, time.monotonic() - start))
    return 0


def _take(frames: list[bytes], counts: Counter[str], last: dict[str, int], endpoint: str) -> str:
    counts["messages"] += 1
    if len(frames) != 3 or len(frames[1]) != 8:
        counts["bad"] += 1
        return f"bad frames: {[len(frame) for frame in frames]}"
    seq = int.from_bytes(frames[1], "big")
    if endpoint in last and seq != last[endpoint] + 1:
        counts["gaps" if seq > last[endpoint] else "restarts"] += 1
    last[endpoint] = seq
    try:
        batch = decode_batch(frames[2])
    except DecodeError as error:
        counts["bad"] += 1
        return f"seq {seq}: {error}"
    parts = Counter[str]()
    for event in batch.events:
        if isinstance(event, BlockStored):
            parts["stored"] += len(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            parts["removed"] += len(event.block_hashes)
        else:
            parts["cleared"] += 1
    counts.update(parts)
    counts["bad"] += batch.discards.total()
    said = ", ".join(f"{count} {what}" for what, count in parts.items()) or "nothing"
    return f"{frames[0].decode(errors='replace')} seq {seq} rank {batch.rank}: {said}"


def _table(counts: dict[str, Counter[str]], last: dict[str, int], seconds: float) -> Table:
    table = Table(title="KV events")
    for name in (
        "endpoint",
        "messages",
        "stored",
        "removed",
        "cleared",
        "gaps",
        "restarts",
        "bad",
        "last seq",
        "blocks/s",
    ):
        table.add_column(name, justify="left" if name == "endpoint" else "right")
    for endpoint, count in counts.items():
        rate = (count["stored"] + count["removed"]) / max(seconds, 0.001)
        cells = [str(count[name]) for name in ("messages", "stored", "removed", "cleared", "gaps", "restarts", "bad")]
        table.add_row(endpoint, *cells, str(last.get(endpoint, "-")), f"{rate:,.0f}")
    return table
