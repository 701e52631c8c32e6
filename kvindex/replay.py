"""`kvindex replay`: a capture into an index, and its queries against the engine's own answers."""

import gzip
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta
from rich.console import Console
from rich.progress import track

from indexer import Copies, Index, open_index
from kvevents import EventPool, Message
from kvindex.errors import UserError
from kvindex.playing import paced
from scorer import PrefixScorer

_T = TypeVar("_T")
_SHOWN = 10
_KINDS = ("meta", "message", "resident", "query")


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
    file: Path,
    *,
    check: bool = False,
    copies: Copies = "count",
    pod: str | None = None,
    model: str | None = None,
    speed: float = math.inf,
    publish: Callable[[Sequence[tuple[dict[str, Any], Message]]], int] | None = None,
) -> int:
    """Play a capture (JSON lines, also gzipped) into an index and print what it left.

    `speed` is how many times as fast as it was, infinity as fast as can be. With `publish` the messages go there in the
    place of an index.

    With `check`, ask the queries in the capture and compare with the engine's answers; the exit status is 1 where they
    differ. `pod` and `model` hold for messages whose topics do not say. Raises `UserError` for what is no capture.
    """
    lines = list(_read(file))
    for line in lines:
        if line.get("kind", "message") not in _KINDS:
            raise UserError(f"{file}, line {line['line']}: kind {line['kind']!r}: expected one of {', '.join(_KINDS)}")
    meta: dict[str, Any] = next((line for line in lines if line.get("kind") == "meta"), {})
    messages = [line for line in lines if line.get("kind", "message") == "message"]
    queries = [line for line in lines if line.get("kind") == "query"]
    if check and not queries:
        raise UserError(f"{file}: holds no queries to check against; replay it without --check")
    if check and not meta:
        raise UserError(f"{file}: no line of kind meta says how the pod was set up; replay it without --check")
    if publish is not None:
        return publish([(line, _message(line, pod)) for line in messages])
    setup = _typed(meta, _Setup) if check else None
    asked = [_typed(line, _Query) for line in queries] if check else []
    index = open_index()
    console = Console(file=sys.stderr)
    due = paced([(line, _message(line, pod)) for line in messages], speed)
    shown = track(due, "replaying", total=len(messages), console=console, disable=not console.is_terminal)
    with EventPool(index, model=model or meta.get("model", "unknown"), copies=copies) as pool:
        for message in shown:
            pool.submit(message)
        pool.drain(600.0)
        stats = pool.stats()
    _report(file, len(messages), index, stats)
    return 0 if setup is None else _check(setup, asked, index)


def _read(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            for number, line in enumerate(lines, 1):
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}, line {number}: no JSON: {error}") from error
                if not isinstance(value, dict):
                    raise UserError(f"{file}, line {number}: expected an object, got {type(value).__name__}")
                yield value | {"line": number, "file": str(file)}
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _typed(line: dict[str, Any], kind: type[_T]) -> _T:
    try:
        return msgspec.convert(line, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{line['file']}, line {line['line']}: {line['kind']}: {error}") from error


def _message(line: dict[str, Any], pod: str | None) -> Message:
    try:
        topic = bytes.fromhex(line["topic_hex"]) if "topic_hex" in line else str(line["topic"]).encode()
        payload = bytes.fromhex(line.get("payload_hex") or line["payload"])
        seq = int(line["seq"])
        if not 0 <= seq < 2**64:
            raise ValueError(f"seq: expected 0 to 2**64-1, got {seq}")  # noqa: TRY301
        endpoint = str(line.get("endpoint", ""))
        name = pod or line.get("pod") or (None if topic else endpoint or "pod-0")
        return Message(topic, seq, payload, pod=None if name is None else str(name))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{line['file']}, line {line['line']}: no message with topic, seq and payload in hex: {error!r}"
        ) from error


def _report(file: Path, messages: int, index: Index, stats: dict[str, int]) -> None:
    held = index.stats()
    print(f"{file.name}: {messages} messages, {stats['events_total']} events, {stats['gaps_total']} gaps")
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
