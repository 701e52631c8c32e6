"""`kvindex score`: one question to a running service."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from kvindex.client import open_client, refusal_of
from kvindex.errors import UserError


class _Match(msgspec.Struct, frozen=True):
    pod: str
    rank: int
    blocks: int
    reusable_tokens: int
    score: float
    tiers: dict[str, int]
    trust: str
    reason: str


class _Answer(msgspec.Struct, frozen=True):
    matches: list[_Match]
    block_size: int
    prompt_tokens: int
    best: str | None


def run_score(url: str, asked: Mapping[str, Any], *, raw: bool, token: str = "") -> int:
    """Ask with a body, and print a table, or the answer as it is. Raises `UserError` when there is no answer."""
    try:
        with open_client(token=token, timeout=30.0) as client:
            response = client.post(f"{url.rstrip('/')}/v1/score", json=asked)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"{url}: no answer: {error}; is `kvindex serve` running there?") from error
    if refusal := refusal_of(url, response):
        raise refusal
    try:
        answer = response.json()
    except ValueError as error:
        raise UserError(f"{url}: status {response.status_code}, and no JSON: is this a kvindex service?") from error
    if response.status_code != httpx.codes.OK:
        raise UserError(f"{url}: status {response.status_code}: {_detail(answer) or response.text[:200]}")
    try:
        typed = msgspec.convert(answer, _Answer)
    except msgspec.ValidationError as error:
        raise UserError(f"{url}: an answer that is no score: {error}; is this a kvindex service?") from error
    if raw:
        print(json.dumps(answer, indent=1))
        return 0
    table = Table(title=f"{typed.prompt_tokens} tokens, blocks of {typed.block_size}, best: {typed.best}")
    for name in ("pod", "rank", "blocks", "reusable tokens", "score", "tiers", "trust"):
        table.add_column(name)
    for match in typed.matches:
        cells = [match.pod, match.rank, match.blocks, match.reusable_tokens, f"{match.score:.1f}"]
        table.add_row(*map(str, cells), json.dumps(match.tiers), f"{match.trust} {match.reason}")
    Console().print(table)
    return 0


def read_messages(path: Path) -> dict[str, Any]:
    """Read a chat request from a file: its messages, or the whole body. Raises `UserError` for anything else."""
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise UserError(f"--messages {path}: {error}") from error
    if isinstance(found, list):
        return {"messages": found}
    if isinstance(found, dict) and "messages" in found:
        return found
    raise UserError(f"--messages {path}: expected a list of messages, or an object that has one as `messages`")


def _detail(answer: object) -> object:
    return answer.get("detail") if isinstance(answer, dict) else None
