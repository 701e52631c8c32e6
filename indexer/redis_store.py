"""The connection to Redis: commands in, answers out. What is asked is `redis_layout`'s and `redis_index`'s business."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from indexer.errors import IndexUnavailable, InvalidQuestion
from indexer.redis_url import RedisUrl

Command: TypeAlias = tuple[Any, ...]


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
        if not commands:
            return []
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
