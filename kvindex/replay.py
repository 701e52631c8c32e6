"""`kvindex replay`: a capture into an index, and its queries against the engine's own answers."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta
from rich.console import Console
from rich.progress import track

from indexer import Copies, Index, open_index
from kvevents import EventPool
from kvindex.captures import Capture, Line
from kvindex.errors import UserError
from kvindex.playing import paced
from scorer import PrefixScorer

_T = TypeVar("_T")
_SHOWN = 10


class _Setup(msgspec.Struct, frozen=True):
    """What a check needs of the line that says how the pod was set up."""

    pod: str
    model: str
    block_size: Annotated[int, Meta(ge=1)]
    dp_rank: int = 0
    swa_block_size: int | None = None


class _Query(msgspec.Struct, frozen=True):
    """A prompt, and what the engine said of it."""

    tokens: list[Annotated[int, Meta(ge=0, le=2**32 - 1)]]
    hit_blocks: int
    engine_hit_blocks: int
    lora_name: str | None = None
    cache_salt: str | None = None
    mm: list[tuple[str, int, int]] = []


def run_replay(
    files: Sequence[Path],
    *,
    check: bool = False,
    copies: Copies = "count",
    pod: str | None = None,
    model: str | None = None,
    speed: float = math.inf,
    publish: Callable[[Capture], int] | None = None,
) -> int:
    """Play a capture (JSON lines, also gzipped; rotated files in their order) into an index and print what it left.

    `speed` is how many times as fast as it was, infinity as fast as can be. With `publish` the messages go there in the
    place of an index.

    With `check`, ask the queries in the capture and compare with the engine's answers; the exit status is 1 where they
    differ. `pod` and `model` hold for messages whose topics do not say. Raises `UserError` for what is no capture.
    """
    capture = Capture(files, pod)
    if publish is not None:
        return publish(capture)
    meta: Line = {}
    asked: list[_Query] = []
    count = 0
    for line in capture.lines():
        count += line["kind"] == "message"
        if line["kind"] == "meta":
            meta = meta or line
        elif line["kind"] == "query" and check:
            asked.append(_typed(line, _Query))
    if check and not asked:
        raise UserError(f"{capture}: holds no queries to check against; replay it without --check")
    if check and not meta:
        raise UserError(f"{capture}: no line of kind meta says how the pod was set up; replay it without --check")
    setup = _typed(meta, _Setup) if check else None
    index = open_index()
    console = Console(file=sys.stderr)
    due = paced(capture.messages(), speed)
    shown = track(due, "replaying", total=count, console=console, disable=not console.is_terminal)
    with EventPool(index, model=str(model or meta.get("model", "unknown")), copies=copies) as pool:
        for message in shown:
            pool.submit(message)
        pool.drain(600.0)
        stats = pool.stats()
    _report(str(capture), count, index, stats)
    return 0 if setup is None else _check(setup, asked, index)


def _typed(line: Line, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(line, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{line['file']}, line {line['line']}: {line['kind']}: {error}") from error


def _report(capture: str, messages: int, index: Index, stats: dict[str, int]) -> None:
    held = index.stats()
    print(f"{capture}: {messages} messages, {stats['events_total']} events, {stats['gaps_total']} gaps")
    print(f"  {held.get('stored_total', 0)} blocks stored, {held.get('removed_total', 0)} removed, {held['held']} live")
    for name, count in sorted((stats | held).items()):
        if count and (name.startswith("dropped") or "unknown" in name or "conflict" in name):
            print(f"  {name}: {count}")
    for status in index.sources():
        trust = f"degraded, {status.degraded}" if status.degraded else "exact"
        print(f"  {status.source} ({status.model}): {status.blocks} blocks {status.tiers}, {trust}")


def _check(setup: _Setup, queries: list[_Query], index: Index) -> int:
    size = setup.block_size
    # where groups of one model use different block sizes, the wire does not say where some blocks lie
    bounded = setup.swa_block_size not in (None, size)
    scorer = PrefixScorer(index, size)
    wrong = equal = 0
    for number, query in enumerate(queries, 1):
        matches = scorer.match(
            query.tokens,
            model=setup.model,
            lora_name=query.lora_name,
            cache_salt=query.cache_salt,
            mm_items=query.mm,
        )
        ours = [(m.blocks, m.reusable_tokens // size) for m in matches if (m.pod, m.rank) == (setup.pod, setup.dp_rank)]
        engine = (query.hit_blocks, query.engine_hit_blocks)
        same = ours == [engine]
        equal += same
        understated = bounded and len(ours) == 1 and ours[0][0] <= engine[0] and ours[0][1] <= engine[1]
        if not same and not understated:
            wrong += 1
            if wrong <= _SHOWN:
                print(f"  query {number}: ours {ours}, the engine {engine} (hit_blocks, engine_hit_blocks)")
    print(f"{equal} of {len(queries)} queries equal the engine's own answers")
    if bounded:
        print(f"  {len(queries) - wrong} of {len(queries)} never overstate: all that can be had for this layout")
    return 1 if wrong else 0
