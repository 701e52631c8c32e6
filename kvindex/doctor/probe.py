"""Looks at publishers and engines over the network, and leaves the judgement to others."""

import re
import time
from collections.abc import Callable, Sequence

import httpx
import msgspec

from kvevents import Listener, ask_replay
from kvindex.client import open_client
from kvindex.doctor.judgement import EngineSeen
from kvindex.doctor.observation import Observation

_REPLAY_S = 3.0
_HTTP_S = 5.0
_ANSWER_S = 15.0
_MOST_BYTES = 16 * 1024 * 1024
_CACHE_INFO = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def observe(
    endpoints: Sequence[str], replays: Sequence[str], seconds: float, say: Callable[[str], None] = lambda _: None
) -> list[Observation]:
    """Listen to all publishers at once, to all topics, then ask each for its replay; `say` hears what is waited for.

    `replays` belong to the endpoints in order; there may be fewer. Raises `SubscriptionError` for an endpoint that
    cannot be used.
    """
    seen = {endpoint: Observation(endpoint, seconds) for endpoint in endpoints}
    until = time.monotonic() + seconds
    with Listener(list(seen)) as listener:
        say(f"listening for {seconds:g} s ...")
        while (left := until - time.monotonic()) > 0:
            for what in listener.receive(min(left, 0.25)):
                seen[what.endpoint].take(what)
    for endpoint, replay in zip(endpoints, replays, strict=False):
        say(f"asking for the replay of {replay} ...")
        seen[endpoint].take_replay(replay, ask_replay(replay, timeout=_REPLAY_S))
    return list(seen.values())


def ask_engine(url: str) -> EngineSeen:
    """Ask an engine for the names it serves under and for its cache's settings. What it does not say stays unknown."""
    base = url.rstrip("/")
    models: list[str] = []
    caching, size, is_reached = None, None, False
    try:
        answer = fetch(f"{base}/v1/models")
        is_reached = True
        models = [model.id for model in msgspec.json.decode(answer, type=_Models).data]
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError, UnicodeDecodeError):
        pass  # another server than vLLM's: then it is up and says nothing
    try:
        info = _CACHE_INFO.search(fetch(f"{base}/metrics").decode(errors="replace"))
        is_reached = True
        labels = dict(_LABEL.findall(info[1])) if info else {}
        if "enable_prefix_caching" in labels:
            caching = labels["enable_prefix_caching"] == "True"
        if labels.get("block_size", "").isdigit():
            size = int(labels["block_size"])
    except (httpx.HTTPError, httpx.InvalidURL):
        pass
    return EngineSeen(url, is_reached, models, caching, size)


def fetch(url: str, *, refuse: bool = False, token: str = "") -> bytes:
    """Read an answer, up to a bound of size and time; with `refuse` none that says there was an error.

    Raises `httpx.HTTPError`, `httpx.InvalidURL`, and `UserError` as `open_client`.
    """
    body = bytearray()
    until = time.monotonic() + _ANSWER_S
    with open_client(token=token, timeout=_HTTP_S) as client, client.stream("GET", url) as response:
        if refuse:
            response.raise_for_status()
        for chunk in response.iter_bytes():
            body += chunk
            if time.monotonic() > until:
                raise httpx.ReadTimeout(f"it was still answering after {_ANSWER_S:.0f} s", request=response.request)
            if len(body) > _MOST_BYTES:
                break
    return bytes(body)
