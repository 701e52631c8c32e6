"""SGLang servers, which say themselves where they publish their events."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from indexer import Copies
from kvevents.discovery.base import MAX_RANKS, Endpoint, Found, Port, of_ranks
from kvevents.discovery.identity import is_ip, normalise
from kvevents.endpoints import tcp
from kvevents.errors import DiscoveryError, SubscriptionError

TIMEOUT_S = 5.0
ANSWER_S = 15.0
MAX_BYTES = 4 * 1024 * 1024
_WILDCARDS = {"", "*", "0.0.0.0", "::", "[::]"}


class SglangFollow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An SGLang server, and what it does not say itself."""

    url: Annotated[str, Meta(pattern=r"^https?://[^/]+")]
    """Its base URL, ``http://10.0.0.7:30000``."""
    pod: str = ""
    """What the router calls it; none: the URL's host and port."""
    model: str = ""
    """None: the name that the server says it serves."""
    copies: Copies | None = None
    """As in ``[pool]``, for this server."""


class _KVEvents(msgspec.Struct):
    """What ``/server_info`` says of events (SGLang 0.5.23; other fields are left alone)."""

    endpoint_port_base: Port
    publisher: str = "zmq"
    endpoint_host: str | None = None
    topic: str | None = None
    dp_size: Annotated[int, Meta(ge=1, le=MAX_RANKS)] = 1
    replay_endpoint_port_base: Port | None = None


class _ServerInfo(msgspec.Struct):
    kv_events: _KVEvents | None = None
    served_model_name: str | None = None
    model_path: str | None = None


class SglangDiscovery:
    """One server, asked every `interval_s`."""

    def __init__(self, follow: SglangFollow, *, interval_s: float) -> None:
        self._follow = follow
        self._interval_s = interval_s
        self._base = follow.url.rstrip("/")

    @property
    def label(self) -> str:
        """What the source is called in logs."""
        return f"sglang {self._base}"

    def watch(self, stop: threading.Event) -> Iterator[Sequence[Found]]:
        """Give the server as it says it is now. Raises `DiscoveryError`."""
        while True:
            yield [self.read()]
            if stop.wait(self._interval_s):
                return

    def read(self) -> Found:
        """Ask once. Raises `DiscoveryError`."""
        import httpx

        try:
            url = httpx.URL(self._base)
            info = msgspec.json.decode(self._get("/server_info") or self._get("/get_server_info"), type=_ServerInfo)
        except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError) as error:
            raise DiscoveryError(f"{self.label}: {error or type(error).__name__}") from error
        events = info.kv_events
        if events is None or events.publisher != "zmq":
            raise DiscoveryError(
                f"{self.label}: it publishes no events; start it with --kv-events-config "
                """'{"publisher": "zmq", "endpoint": "tcp://*:5557"}'"""
            )
        said = events.endpoint_host or ""
        host = url.host if said in _WILDCARDS else said.strip("[]")
        replays = events.replay_endpoint_port_base
        model = self._follow.model or info.served_model_name or info.model_path or ""
        replay = None if replays is None else tcp(host, replays)
        first = Endpoint(tcp(host, events.endpoint_port_base), replay, model, events.topic or "", self._follow.copies)
        try:
            endpoints = of_ranks(first, events.dp_size)
        except SubscriptionError as error:
            raise DiscoveryError(f"{self.label}: {error}") from error
        port = url.port or (443 if url.scheme == "https" else 80)
        address = normalise(f"[{url.host}]:{port}" if ":" in url.host else f"{url.host}:{port}")
        named = self._follow.pod
        ip = url.host if is_ip(url.host) and not named else ""
        return Found(name=named or address, endpoints=endpoints, ip=ip, port=port, aliases=(address, url.host))

    def _get(self, path: str) -> bytes:
        """Give what is there; nothing where the server knows no such path, as older ones do."""
        import httpx

        until = time.monotonic() + ANSWER_S
        with httpx.stream("GET", self._base + path, timeout=TIMEOUT_S) as answer:
            if answer.status_code == 404 and path == "/server_info":
                return b""
            answer.raise_for_status()
            data = bytearray()
            for part in answer.iter_bytes():
                data += part
                if time.monotonic() > until:
                    raise DiscoveryError(f"{self.label}: {path} was not answered whole within {ANSWER_S:.0f} s")
                if len(data) > MAX_BYTES:
                    raise DiscoveryError(f"{self.label}: {path} is larger than {MAX_BYTES} bytes")
        return bytes(data)
