"""A cluster of Redis servers: each command goes to the node that has its hash slot, all nodes are asked at once.

The client library's own cluster client is not used: it sends a pipeline's commands one after the other through many
layers, which for one command of many keys takes longer than Redis itself, and its two kinds, for threads and for event
loops, have little in common. Left are a map of slots and two ways to send.
"""

import asyncio
import random
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import redis
import redis.asyncio
from redis.crc import key_slot
from redis.exceptions import AskError, ConnectionError, MovedError, RedisError, TryAgainError  # noqa: A004

from indexer.errors import IndexUnavailable
from indexer.redis.layout import Packed
from indexer.redis.store import (
    Command,
    accepted,
    async_pool_of,
    exchange,
    packed_of,
    pool_of,
    read_answers,
    unavailable,
)
from indexer.redis.url import RedisUrl

_SLOTS = 16384
_TRIES = 4
"""How often commands are sent to where they are said to belong; slots that move are followed."""


class Node(NamedTuple):
    """The address of a server."""

    host: str
    port: int


class Topology:
    """Which node has which hash slot. No I/O."""

    def __init__(self) -> None:
        self._owners: list[Node | None] = [None] * _SLOTS
        self.nodes: list[Node] = []
        """All nodes that are known, replicas too."""
        self.is_old = True
        """It has to be asked for before it is used."""

    def learn(self, answer: list[Any], asked: str) -> None:
        """Take the answer to CLUSTER SLOTS; `asked` is the host that gave it, which it may not name."""
        owners: list[Node | None] = [None] * _SLOTS
        nodes = []
        for first, last, *servers in answer:
            found = [Node(_host(host) or asked, int(port)) for host, port, *_ in servers]
            owners[first : last + 1] = [found[0]] * (last + 1 - first)
            nodes += [node for node in found if node.port]
        self._owners, self.nodes = owners, list(dict.fromkeys(nodes))
        self.is_old = False

    def divide(self, commands: Sequence[Command], places: Sequence[int]) -> dict[Node, list[int]]:
        """Say which of some commands, by their places, go to which node. Raises `ConnectionError` where none has
        them.
        """
        divided: dict[Node, list[int]] = {}
        for place in places:
            node = self._owners[key_slot(_key_of(commands[place]))]
            if node is None:
                self.is_old = True
                raise ConnectionError("a part of the cluster has no node; it may be failing over")
            divided.setdefault(node, []).append(place)
        return divided

    def judge(self, answers: list[Any], places: Sequence[int]) -> list[int]:
        """Say which of some commands were not done, because their slot is elsewhere."""
        moved = [place for place in places if isinstance(answers[place], MovedError)]
        broken = any(isinstance(answers[place], (ConnectionError, redis.TimeoutError)) for place in places)
        self.is_old = self.is_old or broken or bool(moved)
        return moved


def _key_of(command: Command) -> bytes:
    if isinstance(command, Packed):
        return command.key
    key: bytes = command[3] if command[0] == "EVAL" else command[1]
    return key


def _first_error(shown: str, answers: list[Any], *, full: bool = False) -> list[Any]:
    # of a slot that is on its way to another node some keys are here and some there: that passes
    for answer in answers:
        if isinstance(answer, (AskError, TryAgainError)):
            raise IndexUnavailable(f"{shown}: a part of the index is being moved to another node")
    return accepted(shown, answers, full=full)


class ClusterStore:
    """See `Store`. Commands of one hash slot are done in order."""

    def __init__(self, url: RedisUrl) -> None:
        self.shown = url.shown
        self._url = url
        self._seeds = [pool_of(url, place) for place in url.urls]
        self._pools: dict[Node, redis.ConnectionPool] = {}
        self._topology = Topology()
        self._lock = threading.Lock()

    def run(self, commands: Sequence[Command], *, again: bool = True, full: bool = False) -> list[Any]:
        """Run commands, see `Store.run`."""
        answers: list[Any] = [None] * len(commands)
        todo = list(range(len(commands)))
        try:
            for attempt in range(_TRIES):
                if not todo:
                    break
                if self._topology.is_old:
                    self._ask_for_slots()
                self._exchange(commands, todo, answers)
                moved = self._topology.judge(answers, todo)
                broken = [place for place in todo if isinstance(answers[place], ConnectionError)]
                todo = sorted([*moved, *(broken if again and not attempt else [])])
        except RedisError as error:
            raise unavailable(self.shown, error) from error
        return _first_error(self.shown, answers, full=full)

    def _exchange(self, commands: Sequence[Command], todo: Sequence[int], answers: list[Any]) -> None:
        """Ask all nodes, then hear all of them. What fails has the error in its place."""
        asked = []
        try:
            for node, places in self._topology.divide(commands, todo).items():
                pool = self._pool(node)
                try:
                    connection = pool.get_connection()
                except (ConnectionError, redis.TimeoutError) as error:
                    _put(answers, places, [error] * len(places))
                    continue
                asked.append((pool, connection, places))
                packed = packed_of([commands[place] for place in places])
                try:
                    connection.send_packed_command([packed])  # type: ignore[no-untyped-call]
                except (ConnectionError, redis.TimeoutError):
                    connection.disconnect()  # type: ignore[no-untyped-call]  # so that reading below fails at once
            for _, connection, places in asked:
                try:
                    _put(answers, places, read_answers(connection, len(places)))
                except (ConnectionError, redis.TimeoutError) as error:
                    connection.disconnect()  # type: ignore[no-untyped-call]
                    _put(answers, places, [error] * len(places))
        except BaseException:
            for _, connection, _ in asked:
                connection.disconnect()  # type: ignore[no-untyped-call]
            raise
        finally:
            for pool, connection, _ in asked:
                pool.release(connection)

    def _pool(self, node: Node) -> redis.ConnectionPool:
        with self._lock:
            pool = self._pools.get(node)
            if pool is None:
                pool = self._pools[node] = pool_of(self._url, self._url.of_node(*node))
            return pool

    def _ask_for_slots(self) -> None:
        known = [self._pool(node) for node in self._topology.nodes]
        random.shuffle(known)
        last: RedisError = ConnectionError("no node of the cluster answers")
        for pool in [*known, *self._seeds]:
            try:
                connection = pool.get_connection()
            except (ConnectionError, redis.TimeoutError) as error:
                last = error
                continue
            try:
                connection.send_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]
                self._topology.learn(connection.read_response(disable_decoding=True), _host_of(pool))
            except RedisError as error:
                connection.disconnect()  # type: ignore[no-untyped-call]
                last = error
            else:
                return
            finally:
                pool.release(connection)
        raise last

    def close(self) -> None:
        """Give all connections back. May be called twice."""
        for pool in [*self._seeds, *self._pools.values()]:
            pool.disconnect()


class AsyncClusterStore:
    """The same for an event loop."""

    def __init__(self, url: RedisUrl) -> None:
        self._shown = url.shown
        self._url = url
        self._seeds = [async_pool_of(url, place) for place in url.urls]
        self._pools: dict[Node, redis.asyncio.ConnectionPool] = {}
        self._topology = Topology()

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """Do what `Store.run` does."""
        answers: list[Any] = [None] * len(commands)
        todo = list(range(len(commands)))
        try:
            for attempt in range(_TRIES):
                if not todo:
                    break
                if self._topology.is_old:
                    await self._ask_for_slots()
                divided = self._topology.divide(commands, todo)
                await asyncio.gather(
                    *[self._exchange(node, commands, places, answers) for node, places in divided.items()]
                )
                moved = self._topology.judge(answers, todo)
                broken = [place for place in todo if isinstance(answers[place], ConnectionError)]
                todo = sorted([*moved, *([] if attempt else broken)])
        except RedisError as error:
            raise unavailable(self._shown, error) from error
        return _first_error(self._shown, answers)

    async def _exchange(
        self, node: Node, commands: Sequence[Command], places: Sequence[int], answers: list[Any]
    ) -> None:
        packed = packed_of([commands[place] for place in places])
        try:
            _put(answers, places, await exchange(self._pool(node), packed, len(places)))
        except (ConnectionError, redis.TimeoutError) as error:
            _put(answers, places, [error] * len(places))

    def _pool(self, node: Node) -> redis.asyncio.ConnectionPool:
        pool = self._pools.get(node)
        if pool is None:
            pool = self._pools[node] = async_pool_of(self._url, self._url.of_node(*node))
        return pool

    async def _ask_for_slots(self) -> None:
        known = [self._pool(node) for node in self._topology.nodes]
        random.shuffle(known)
        last: RedisError = ConnectionError("no node of the cluster answers")
        question = packed_of([("CLUSTER", "SLOTS")])
        for pool in [*known, *self._seeds]:
            try:
                (answer,) = accepted(self._shown, await exchange(pool, question, 1))
            except RedisError as error:
                last = error
            else:
                self._topology.learn(answer, _host_of(pool))
                return
        raise last

    async def close(self) -> None:
        """Give all connections back. May be called twice."""
        for pool in [*self._seeds, *self._pools.values()]:
            await pool.disconnect()


def _host(name: bytes | None) -> str:
    return "" if name in (None, b"", b"?") else name.decode()


def _put(answers: list[Any], places: Sequence[int], given: Sequence[Any]) -> None:
    for place, answer in zip(places, given, strict=True):
        answers[place] = answer


def _host_of(pool: redis.ConnectionPool | redis.asyncio.ConnectionPool) -> str:
    host: str = pool.connection_kwargs["host"]
    return host
