"""`kvindex score`: one question to a running service."""

import json

import httpx
from rich.console import Console
from rich.table import Table

from kvindex.errors import UserError


def run_score(
    url: str, model: str, tokens: list[int], *, lora_name: str | None, cache_salt: str | None, raw: bool
) -> int:
    """Ask and print a table, or the answer as it is. Raises `UserError` when there is no answer."""
    asked = {"model": model, "token_ids": tokens, "lora_name": lora_name, "cache_salt": cache_salt}
    try:
        response = httpx.post(f"{url.rstrip('/')}/v1/score", json=asked, timeout=30.0)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"{url}: no answer: {error}; is `kvindex serve` running there?") from error
    try:
        answer = response.json()
    except ValueError as error:
        raise UserError(f"{url}: status {response.status_code}, and no JSON: is this a kvindex service?") from error
    if response.status_code != httpx.codes.OK:
        raise UserError(f"{url}: status {response.status_code}: {answer.get('detail', response.text)}")
    if raw:
        print(json.dumps(answer, indent=1))
        return 0
    table = Table(title=f"{answer['prompt_tokens']} tokens, blocks of {answer['block_size']}, best: {answer['best']}")
    for name in ("pod", "rank", "blocks", "reusable tokens", "score", "tiers", "trust"):
        table.add_column(name)
    for match in answer["matches"]:
        cells = [match["pod"], match["rank"], match["blocks"], match["reusable_tokens"], f"{match['score']:.1f}"]
        table.add_row(*map(str, cells), json.dumps(match["tiers"]), f"{match['trust']} {match['reason']}")
    Console().print(table)
    return 0
