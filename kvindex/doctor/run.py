"""The command: look, judge, print."""

import sys
from collections.abc import Sequence

import httpx
import msgspec

from kvindex.client import refusal_of
from kvindex.doctor.findings import Finding, is_trouble
from kvindex.doctor.fleet import judge_service
from kvindex.doctor.judgement import Expected, judge
from kvindex.doctor.probe import ask_engine, fetch, observe
from kvindex.errors import UserError
from kvindex.stats import Stats


class _Report(msgspec.Struct):
    """What was found about one thing."""

    subject: str
    findings: list[Finding]


def run_doctor(
    endpoints: Sequence[str],
    *,
    replays: Sequence[str],
    topic: str,
    model: str,
    block_size: int | None,
    pods: Sequence[str],
    seeds: Sequence[str],
    seconds: float,
    url: str,
    engine: str,
    as_json: bool,
    token: str = "",
) -> int:
    """Print what is found; 0 where nothing is wrong, also if it could be better, else 1.

    `token` is for the service at `url`, and for no engine. Raises `UserError` and `SubscriptionError`.
    """
    if not endpoints and not url:
        raise UserError("nothing to look at: name what pods publish at (tcp://10.0.0.7:5557), or --url of a service")
    twice = next((one for one in endpoints if endpoints.count(one) > 1), None)
    if twice is not None:
        raise UserError(f"endpoint {twice!r} is named twice")
    if len(replays) > len(endpoints):
        raise UserError(f"{len(replays)} --replay for {len(endpoints)} endpoints: one for each, in order, at most")
    if len(pods) > len(endpoints) > 0 and not url:
        raise UserError(f"{len(pods)} --pod for {len(endpoints)} endpoints: one for each, in order, at most")
    reports = []
    if endpoints:
        engine_seen = ask_engine(engine) if engine else None
        for number, seen in enumerate(observe(endpoints, replays, seconds, _say)):
            pod = pods[number] if number < len(pods) else ""
            expected = Expected(pod, model, block_size, topic, seeds)
            reports.append(_Report(seen.endpoint, judge(seen, expected, engine_seen)))
    if url:
        asked = [model] if model else []
        found = judge_service(fetch_stats(url, token=token), models=asked, pods=pods, block_size=block_size)
        reports.append(_Report(url, found))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(reports), indent=1).decode())
    else:
        for report in reports:
            _print(report)
    return int(any(is_trouble(finding) for report in reports for finding in report.findings))


def fetch_stats(url: str, *, token: str = "") -> Stats:
    """Ask a service for all it knows of itself. Raises `UserError` where there is none."""
    try:
        return msgspec.json.decode(fetch(f"{url.rstrip('/')}/v1/stats", refuse=True, token=token), type=Stats)
    except httpx.HTTPStatusError as error:
        raise refusal_of(url, error.response) or UserError(
            f"{url}: status {error.response.status_code} for /v1/stats; is this a kvindex service?"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"{url}: no answer: {error}; is `kvindex serve` running there?") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{url}: an answer that is none of ours: {error}; is this a kvindex service?") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(report: _Report) -> None:
    print(report.subject)
    for finding in report.findings:
        print(f"  {finding.level:6}  {finding.check}: {finding.what}")
        if finding.cause:
            print(f"          cause: {finding.cause}")
        if finding.remedy:
            print(f"          do: {finding.remedy}")
