"""The HTTP server, which leaves in order: nobody is sent to it any more, then nobody is let in, then it ends."""

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import structlog
import uvicorn

from kvindex.arriving import Arrivals
from kvindex.gate import Gate
from kvindex.reading import Reading
from kvindex.tls import Tls

_TICKS = 10
"""Ticks of uvicorn, of 0.1 s, after which connections are looked at."""


class Beside(Protocol):
    """Another server of the same service, that leaves with it. None of its methods waits."""

    def leave(self) -> None:
        """Say that nobody should come any more, and answer on."""

    def stop(self, grace_s: float | None) -> None:
        """Let nobody in; end what is under way after so many seconds, or now."""


class Server(uvicorn.Server):
    """Uvicorn's, but `run` returns after SIGTERM or SIGINT, so that the pool and the index are closed too.

    At the first signal it is not ready at once, and answers on for `delay_s`; then it stops listening, and lets what is
    under way end within `timeout_s`. A second signal ends it at once.

    A connection whose request does not come within `read_timeout_s` is closed: its places are few.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        gate: Gate,
        beside: Beside | None,
        *,
        delay_s: float,
        timeout_s: int,
        read_timeout_s: float,
        max_connections: int,
        tls: Tls | None,
    ) -> None:
        super().__init__(config)
        config.timeout_graceful_shutdown = timeout_s + 1  # for what does not even end when it is cut off
        self._gate = gate
        self._beside = beside
        self._delay_s = delay_s
        self._timeout_s = timeout_s
        self._read_timeout_s = read_timeout_s
        self._arrivals = Arrivals(
            self._protocol,
            self.server_state.connections,
            gate,
            max_connections=max_connections,
            greet_s=read_timeout_s,
            tls=tls,
        )
        self._stop_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals until the end, and no more then: one that comes while the index is closed ends the process."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve at sockets that listen already."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=[])
        for listener in sockets or ():
            self._arrivals.start(listener)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Begin to leave, or at the second signal end."""
        if self.should_exit:
            if self._beside is not None:
                self._beside.stop(None)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._cut_off)
            return
        self._stop_at = time.monotonic() + self._delay_s
        self._gate.leave()
        if self._beside is not None:
            self._beside.leave()
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Close what is late, and say whether it is time to stop."""
        if counter % _TICKS == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Reading) and connection.is_late(self._read_timeout_s):
                    self._gate.late += 1
                    connection.transport.abort()
        return await super().on_tick(counter) and (self.force_exit or time.monotonic() >= self._stop_at)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let nobody in, and wait for those who are."""
        if self._beside is not None:
            self._beside.stop(self._timeout_s)
        await self._arrivals.close()
        over = asyncio.get_running_loop().call_later(self._timeout_s, self._cut_off)
        await super().shutdown(sockets=sockets)
        over.cancel()
        if self.force_exit:  # uvicorn leaves it out then, and the application complains
            await self.lifespan.shutdown()

    def _protocol(self) -> asyncio.Protocol:
        return Reading(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def _cut_off(self) -> None:
        self.force_exit = True
        if self._gate.under_way:
            structlog.get_logger("kvindex").warning("requests_cut_off", requests=self._gate.under_way)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
