"""The connection to Redis: commands in, answers out. What is asked is `redis_layout`'s and `redis_index`'s business."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import hiredis
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError, ResponseError  # noqa: A004
from redis.retry import Retry

from indexer.errors import IndexUnavailable, InvalidQuestion
from indexer.redis_url import RedisUrl

Command: TypeAlias = tuple[Any, ...] | bytes
"""A command and its arguments, or all of that as it goes over the wire."""


class RedisStore:
    """Runs commands, in one round trip each time. May be used by any number of threads."""

    def __init__(self, url: RedisUrl) -> None:
        self.shown = url.shown
        try:
            self._pool = redis.ConnectionPool.from_url(url.url, **_options(url))
        except ValueError as error:
            raise InvalidQuestion(f"index URL {url.shown}: {error}") from error

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands one after the other and give their answers.

        Raises `IndexUnavailable` when Redis does not answer or refuses one of them; the others may have been done.
        """
        if not commands:
            return []
        packed = _packed(commands)
        try:
            try:
                answers = self._exchange(packed, len(commands))
            except ConnectionError:  # the server closed the connection since it was used last, or is gone
                answers = self._exchange(packed, len(commands))
        except RedisError as error:
            raise unavailable(self.shown, error) from error
        return _accepted(self.shown, answers)

    def _exchange(self, packed: bytes, count: int) -> list[Any]:
        connection = self._pool.get_connection()
        answers: list[Any] = []
        try:
            connection.send_packed_command([packed])  # type: ignore[no-untyped-call]
            while len(answers) < count:
                try:
                    answers.append(connection.read_response(disable_decoding=True))
                except ResponseError as error:
                    answers.append(error)
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call]  # answers may still be on their way
            raise
        finally:
            self._pool.release(connection)
        return answers

    def close(self) -> None:
        """Give all connections back. May be called twice."""
        self._pool.disconnect()


class AsyncRedisStore:
    """The same for an event loop."""

    def __init__(self, url: RedisUrl) -> None:
        self.shown = url.shown
        try:
            self._pool = redis.asyncio.ConnectionPool.from_url(url.url, **_options(url))
        except ValueError as error:
            raise InvalidQuestion(f"index URL {url.shown}: {error}") from error

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """Do what `RedisStore.run` does."""
        if not commands:
            return []
        packed = _packed(commands)
        try:
            try:
                answers = await self._exchange(packed, len(commands))
            except ConnectionError:
                answers = await self._exchange(packed, len(commands))
        except RedisError as error:
            raise unavailable(self.shown, error) from error
        return _accepted(self.shown, answers)

    async def _exchange(self, packed: bytes, count: int) -> list[Any]:
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        answers: list[Any] = []
        try:
            await connection.send_packed_command([packed])
            while len(answers) < count:
                try:
                    answers.append(await connection.read_response(disable_decoding=True))
                except ResponseError as error:
                    answers.append(error)
        except BaseException:
            await connection.disconnect()
            raise
        finally:
            await self._pool.release(connection)
        return answers

    async def close(self) -> None:
        """Give all connections back. May be called twice."""
        await self._pool.disconnect()


def _packed(commands: Sequence[Command]) -> bytes:
    # Not the client's pipelines: for one command of many keys they take as long as Redis itself.
    return b"".join(command if isinstance(command, bytes) else hiredis.pack_command(command) for command in commands)


def _accepted(shown: str, answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, ResponseError):
            raise unavailable(shown, answer) from answer
    return answers


def _options(url: RedisUrl) -> dict[str, Any]:
    # one more try at once, for connections that the server closed meanwhile
    return {"socket_timeout": url.timeout_s, "socket_connect_timeout": url.timeout_s, "retry": Retry(NoBackoff(), 1)}


def unavailable(shown: str, error: RedisError) -> IndexUnavailable:
    """Say that Redis did not do what it was asked."""
    return IndexUnavailable(f"{shown}: {str(error)[:200] or type(error).__name__}")  # some answers are a page long
