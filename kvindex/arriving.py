"""Connections before they carry HTTP: whether there is a place for one, and the handshake of TLS."""

import asyncio
import socket
import ssl
from collections.abc import Callable, Collection

import structlog

from kvindex.gate import Gate
from kvindex.tls import Tls

_NO_FILES_S = 1.0
"""Seconds until the next try, where no connection can be taken because too many files are open."""


class Arrivals:
    """Takes the connections of a listener, from `start` to `close`, and gives each to a `protocol` of its own.

    Of more than `max_connections`, with those that are still greeting, the last ones are closed and counted by the
    gate: each takes an open file, which those who follow the pods need. A handshake of TLS has `greet_s` seconds, and
    the certificate that holds when it begins. Uvicorn itself sees no connection before it has greeted, and keeps one
    certificate.
    """

    def __init__(
        self,
        protocol: Callable[[], asyncio.Protocol],
        connections: Collection[object],
        gate: Gate,
        *,
        max_connections: int,
        greet_s: float,
        tls: Tls | None,
    ) -> None:
        self._protocol = protocol
        self._connections = connections
        self._gate = gate
        self._max_connections = max_connections
        self._greet_s = greet_s
        self._tls = tls
        self._greeting: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, listener: socket.socket) -> None:
        """Take what comes at a socket that listens."""
        listener.settimeout(0.0)
        self._tasks.append(asyncio.get_running_loop().create_task(self._take(listener)))

    async def close(self) -> None:
        """Take no more, and end those that are greeting."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # one without a handshake is there in a moment; cut off in it, it would count as open for ever
        for task in self._greeting if self._tls is not None else ():
            task.cancel()
        await asyncio.gather(*self._greeting, return_exceptions=True)

    async def _take(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except ConnectionError:  # it went before it was taken
                continue
            except OSError:
                await asyncio.sleep(_NO_FILES_S)
                continue
            if len(self._connections) + len(self._greeting) >= self._max_connections:
                self._gate.turn_away()
                connection.close()
                await asyncio.sleep(0)  # however many come, all else goes on
            else:
                context = None if self._tls is None else self._tls.context
                task = loop.create_task(self._connect(connection, context))
                self._greeting.add(task)
                task.add_done_callback(self._greeting.discard)
                if context is None:
                    await asyncio.wait([task])  # which goes on where this one is cancelled
                else:
                    await asyncio.sleep(0)

    async def _connect(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol,
                connection,
                ssl=context,
                ssl_handshake_timeout=None if context is None else self._greet_s,
            )
        except ConnectionAbortedError:  # what the event loop makes of a handshake that does not come
            self._gate.late += context is not None
        except OSError:  # a stranger, or one who went
            pass
        except Exception as error:  # noqa: BLE001  (whatever it is with one of them, the others are let in)
            connection.close()
            structlog.get_logger("kvindex").error("connection_failed", error=repr(error))
