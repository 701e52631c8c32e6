"""The connection to Redis: commands in, answers out. What is asked is others' business."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import hiredis
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, OutOfMemoryError, RedisError, ResponseError  # noqa: A004
from redis.retry import Retry

from indexer.errors import IndexUnavailable, InvalidQuestion
from indexer.redis.layout import Packed
from indexer.redis.url import RedisUrl

Command: TypeAlias = tuple[Any, ...] | Packed
"""A command and its arguments, or all of that as it goes over the wire."""


class Store(Protocol):
    """Runs commands. May be used by any number of threads."""

    shown: str
    """Where, without the password."""

    def run(self, commands: Sequence[Command], *, again: bool = True, full: bool = False) -> list[Any]:
        """Run commands, those of one hash slot one after the other, and give their answers.

        `again` tries once more at once where a connection breaks; then each may be done twice. Raises
        `IndexUnavailable` when Redis does not answer or refuses one of them; the others may have been done. With
        `full`, those for which Redis has no memory have an `OutOfMemoryError` as their answer.
        """

    def close(self) -> None:
        """Give all connections back. May be called twice."""


class AsyncStore(Protocol):
    """The same for an event loop."""

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """Do what `Store.run` does."""

    async def close(self) -> None:
        """Give all connections back. May be called twice."""


class ServerStore:
    """One server, asked in one round trip each time."""

    def __init__(self, url: RedisUrl) -> None:
        self.shown = url.shown
        self._pool = pool_of(url, url.urls[0])

    def run(self, commands: Sequence[Command], *, again: bool = True, full: bool = False) -> list[Any]:
        """Run commands, see `Store.run`."""
        if not commands:
            return []
        packed = packed_of(commands)
        try:
            try:
                answers = self._exchange(packed, len(commands))
            except ConnectionError:  # the server closed the connection since it was used last, or is gone
                if not again:
                    raise
                answers = self._exchange(packed, len(commands))
        except RedisError as error:
            raise unavailable(self.shown, error) from error
        return accepted(self.shown, answers, full=full)

    def _exchange(self, packed: bytes, count: int) -> list[Any]:
        connection = self._pool.get_connection()
        try:
            connection.send_packed_command([packed])  # type: ignore[no-untyped-call]
            return read_answers(connection, count)
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call]  # answers may still be on their way
            raise
        finally:
            self._pool.release(connection)

    def close(self) -> None:
        """Give all connections back. May be called twice."""
        self._pool.disconnect()


class AsyncServerStore:
    """The same for an event loop."""

    def __init__(self, url: RedisUrl) -> None:
        self._shown = url.shown
        self._pool = async_pool_of(url, url.urls[0])

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """Do what `Store.run` does."""
        if not commands:
            return []
        packed = packed_of(commands)
        try:
            try:
                answers = await exchange(self._pool, packed, len(commands))
            except ConnectionError:
                answers = await exchange(self._pool, packed, len(commands))
        except RedisError as error:
            raise unavailable(self._shown, error) from error
        return accepted(self._shown, answers)

    async def close(self) -> None:
        """Give all connections back. May be called twice."""
        await self._pool.disconnect()


def read_answers(connection: redis.connection.AbstractConnection, count: int) -> list[Any]:
    """Read the answers to so many commands; those that were refused have the error in their place."""
    answers: list[Any] = []
    while len(answers) < count:
        try:
            answers.append(connection.read_response(disable_decoding=True))
        except ResponseError as error:
            answers.append(error)
    return answers


async def exchange(pool: redis.asyncio.ConnectionPool, packed: bytes, count: int) -> list[Any]:
    """Send some commands and read their answers."""
    connection = await pool.get_connection()  # type: ignore[no-untyped-call]
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
        await pool.release(connection)
    return answers


def packed_of(commands: Sequence[Command]) -> bytes:
    """Write commands as they go over the wire."""
    if len(commands) == 1 and isinstance(commands[0], Packed):
        return commands[0].content
    # Not the client's pipelines: for one command of many keys they take as long as Redis itself.
    return b"".join(
        command.content if isinstance(command, Packed) else hiredis.pack_command(command) for command in commands
    )


def accepted(shown: str, answers: list[Any], *, full: bool = False) -> list[Any]:
    """Give answers none of which says no; with `full`, none but for want of memory."""
    for answer in answers:
        if isinstance(answer, RedisError) and not (full and isinstance(answer, OutOfMemoryError)):
            raise unavailable(shown, answer) from answer
    return answers


def pool_of(url: RedisUrl, place: str) -> redis.ConnectionPool:
    """Make the connections to one server."""
    try:
        return redis.ConnectionPool.from_url(place, **_options(url))
    except ValueError as error:
        raise InvalidQuestion(f"index URL {url.shown}: {error}") from error


def async_pool_of(url: RedisUrl, place: str) -> redis.asyncio.ConnectionPool:
    """Make the connections to one server from an event loop."""
    try:
        return redis.asyncio.ConnectionPool.from_url(place, **_options(url))
    except ValueError as error:
        raise InvalidQuestion(f"index URL {url.shown}: {error}") from error


def _options(url: RedisUrl) -> dict[str, Any]:
    # one more try at once, for connections that the server closed meanwhile
    return {"socket_timeout": url.timeout_s, "socket_connect_timeout": url.timeout_s, "retry": Retry(NoBackoff(), 1)}


def unavailable(shown: str, error: RedisError) -> IndexUnavailable:
    """Say that Redis did not do what it was asked."""
    return IndexUnavailable(f"{shown}: {str(error)[:200] or type(error).__name__}")  # some answers are a page long
