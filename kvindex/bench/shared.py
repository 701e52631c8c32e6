"""The index in Redis, on a server that is there: under a key prefix of its own, which is removed after."""

import secrets
import time
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

import redis

from indexer import Prompt, RedisIndex, Source
from kvevents import DecodeError, decode_batches
from kvindex.bench.asking import latency
from kvindex.bench.machine import each
from kvindex.bench.scale import Figures, Scale
from kvindex.bench.workload import BLOCK, CHAIN, MODEL, PODS, Fleet, deliveries, make_fleet, payloads_of, prompts
from kvindex.errors import UserError

PREFIX = "kvb"
"""What all keys begin with; four letters of chance and a colon follow. So it is as long as the prefix that an index has
by default: each block's key has it, and the bytes a (block, pod) are to be those of an index in use."""

_QUESTIONS, _REMOVED_AT_ONCE = 60, 500
_TIMEOUT_S = 30


class Shared:
    """A builder and reader of an index in Redis, with its sources."""

    def __init__(self, url: str, pods: int = PODS) -> None:
        self.index = RedisIndex(url)
        self.sources = [Source(f"10.0.{pod >> 8}.{pod & 255}:8000") for pod in range(pods)]
        for source in self.sources:
            self.index.register(source, model=MODEL)

    def write(self, fleet: Fleet) -> float:
        """Store all chains; give the seconds without decoding."""
        taken = 0.0
        for pod, payloads in deliveries(fleet, payloads_of):
            batches = [batch.events for batch in decode_batches(payloads) if not isinstance(batch, DecodeError)]
            start = time.perf_counter()
            self.index.apply_all(self.sources[pod], batches)
            taken += time.perf_counter() - start
        return taken

    def match(self, tokens: "array[int]") -> dict[str, int]:
        """Give the blocks that each pod holds of a prompt, of those that hold any."""
        held = self.index.match(Prompt(tokens, MODEL), holders_only=True)
        return {holding.source.pod: holding.tokens // BLOCK for holding in held}


def ledger_bytes(client: redis.Redis, prefix: str) -> int:
    """Give what the ledgers take that a builder goes on from when another was killed."""
    names = client.scan_iter(f"{prefix}l*", count=1_000)
    return sum(client.memory_usage(name) or 0 for name in names)


def server(url: str) -> redis.Redis:
    """Give a client of the server that an index URL names, which answers.

    Raises `UserError` for a URL that cannot be used here, and when the server does not answer.
    """
    parts = urlsplit(url)
    scheme = {"valkey": "redis", "valkeys": "rediss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("redis", "rediss", "unix"):
        raise UserError(f"--redis {url}: expected one server, redis://host:6379/0, rediss://, valkey:// or unix://")
    try:
        client = redis.Redis.from_url(_url(parts, scheme, {}), socket_timeout=_TIMEOUT_S)
        client.ping()
    except (redis.RedisError, ValueError) as error:
        raise UserError(f"--redis: {error}") from error
    return client


def _url(parts: SplitResult, scheme: str, options: dict[str, str]) -> str:
    """Give a URL with the options of an index exchanged for others."""
    kept = {name: value for name, value in parse_qsl(parts.query) if name not in ("prefix", "timeout")}
    # written out: urlunsplit puts no // before the path of a socket
    return f"{scheme}://{parts.netloc}{parts.path}?{urlencode(kept | options)}"


def sharing(scale: Scale, url: str) -> Generator[Figures]:
    """Write speed of one builder, bytes a (block, pod), matches of 2,048 blocks; each round has an index of its own.

    Raises `UserError` when the server does not answer.
    """
    client = server(url)
    fleet = make_fleet(scale.redis_pairs)
    parts = urlsplit(url)
    with client:
        for _ in range(scale.redis_rounds):
            with _unavailable(), _own_prefix(client) as prefix:
                options = {"prefix": prefix, "timeout": str(_TIMEOUT_S)}
                figures = _measure(client, _url(parts, parts.scheme, options), prefix, fleet)
            yield figures


def _measure(client: redis.Redis, url: str, prefix: str, fleet: Fleet) -> Figures:
    asked = prompts(fleet, CHAIN)
    before = _used(client)
    shared = Shared(url)
    try:
        seconds = shared.write(fleet)
        grown = _used(client) - before
        ledgers = ledger_bytes(client, prefix)
        for one in asked:
            held = shared.match(one.tokens)
            if held != {shared.sources[pod].pod: blocks for pod, blocks in one.holds.items()}:
                raise RuntimeError(f"the index in Redis says {held} where pods hold {one.holds}")
        questions = [asked[number % len(asked)].tokens for number in range(_QUESTIONS)]
        matches = each(shared.match, questions)
    finally:
        shared.index.close()
    return {
        "redis_write": fleet.pairs / seconds / 1e3,
        **latency("redis_match", matches, unit_s=1e-3),
        "redis_memory": (grown - ledgers) / fleet.pairs,
        "redis_memory_all": grown / fleet.pairs,
    }


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise UserError(f"--redis: {error}") from error


@contextmanager
def _own_prefix(client: redis.Redis) -> Iterator[str]:
    """Give a prefix that nobody uses, and remove all keys under it after."""
    prefix = f"{PREFIX}{secrets.token_hex(2)}:"
    while any(client.scan_iter(f"{prefix}*", count=1_000)):
        prefix = f"{PREFIX}{secrets.token_hex(2)}:"
    try:
        yield prefix
    finally:
        _remove(client, list(client.scan_iter(f"{prefix}*", count=1_000)))


def _remove(client: redis.Redis, names: Sequence[bytes]) -> None:
    for first in range(0, len(names), _REMOVED_AT_ONCE):
        client.unlink(*names[first : first + _REMOVED_AT_ONCE])


def _used(client: redis.Redis) -> int:
    """Give the memory that the server says it uses."""
    used: int = client.info("memory")["used_memory"]
    return used
