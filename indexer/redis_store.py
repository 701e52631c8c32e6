"""The connection to Redis: from a URL to answers. What is asked is `redis_layout`'s and `redis_index`'s business."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from indexer.errors import IndexUnavailable, InvalidQuestion

Command: TypeAlias = tuple[Any, ...]

SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss", "unix": "unix"}
"""Schemes of URLs, and those that the client library knows."""

_TIMEOUT_S = 1.0


class RedisUrl(NamedTuple):
    """A URL taken apart."""

    shown: str
    """Without the password."""
    url: str
    """For the client library."""
    prefix: str
    timeout_s: float


def parse_url(text: str) -> RedisUrl:
    """Read ``redis://user:password@host:port/db?prefix=kvindex:&timeout=1.0``.

    Raises `InvalidQuestion` for options that are not known.
    """
    parts = urlsplit(text)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    prefix = options.pop("prefix", "kvindex:")
    timeout = options.pop("timeout", str(_TIMEOUT_S))
    unknown = sorted(options.keys() - {"db"})
    if unknown:
        raise InvalidQuestion(f"index URL option {unknown[0]!r}: expected prefix, timeout or db")
    try:
        timeout_s = float(timeout)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s < 3600:
        raise InvalidQuestion(f"index URL option timeout={timeout!r}: expected seconds above 0")
    if not parts.hostname and parts.scheme != "unix":
        raise InvalidQuestion(f"index URL {text!r}: expected a host, as in {parts.scheme}://localhost:6379/0")
    host = parts.netloc.rpartition("@")[2]
    shown = urlunsplit((parts.scheme, host, parts.path, "", ""))
    url = urlunsplit((SCHEMES[parts.scheme], parts.netloc, parts.path, urlencode(options), ""))
    return RedisUrl(shown, url, prefix, timeout_s)


class RedisStore:
    """Runs commands, in one round trip each time. May be used by any number of threads."""

    def __init__(self, url: RedisUrl) -> None:
        self.shown = url.shown
        try:
            self._client = redis.Redis.from_url(url.url, **_options(url))
        except ValueError as error:
            raise InvalidQuestion(f"index URL {url.shown}: {error}") from error

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands one after the other and give their answers.

        Raises `IndexUnavailable` when Redis does not answer or refuses one of them; those before it may have been done.
        """
        try:
            with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
                return pipeline.execute()
        except RedisError as error:
            raise unavailable(self.shown, error) from error

    def close(self) -> None:
        """Give all connections back. May be called twice."""
        self._client.close()


class AsyncRedisStore:
    """The same for an event loop."""

    def __init__(self, url: RedisUrl) -> None:
        self.shown = url.shown
        try:
            self._client = redis.asyncio.Redis.from_url(url.url, **_options(url))
        except ValueError as error:
            raise InvalidQuestion(f"index URL {url.shown}: {error}") from error

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """Do what `RedisStore.run` does."""
        try:
            async with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return await pipeline.execute()
        except RedisError as error:
            raise unavailable(self.shown, error) from error

    async def close(self) -> None:
        """Give all connections back. May be called twice."""
        await self._client.aclose()


def _options(url: RedisUrl) -> dict[str, Any]:
    # One more try at once, for connections that the server closed meanwhile; what is run may be run twice.
    return {"socket_timeout": url.timeout_s, "socket_connect_timeout": url.timeout_s, "retry": Retry(NoBackoff(), 1)}


def unavailable(shown: str, error: RedisError) -> IndexUnavailable:
    """Say that Redis did not do what it was asked."""
    return IndexUnavailable(f"{shown}: {str(error) or type(error).__name__}")
