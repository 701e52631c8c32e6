"""How much of a request is read, and for how long, before the application sees any of it."""

import asyncio
import time

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MAX_HEAD_BYTES = 65_536
"""Bytes of a request line and its headers, and of what comes with a body and is none of it."""

_CHUNK_BYTES = 16
"""What a chunk of a body takes besides, at most."""
_COUNTS_BODIES = hasattr(AutoHTTPProtocol, "on_body")
"""Whether it is httptools, which knows no bounds; h11 has its own."""

_SAID = b"the request line and its headers are longer than %d bytes" % MAX_HEAD_BYTES
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(_SAID), _SAID)
)


class Reading(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """Uvicorn's connection, which ends where a head is too long. `is_late` says when a request takes too long."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._read = 0
        """Bytes of the request that comes now, without its body."""
        self._since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Read on, or end it."""
        before = self.cycle
        comes = before is None or before.more_body
        if not comes and not self._read:
            self._since = time.monotonic()
        self._read += len(data)
        super().data_received(data)
        cycle = self.cycle
        if cycle is not before or (comes and cycle is not None and not cycle.more_body):
            self._read = 0
        elif self._read > MAX_HEAD_BYTES and not self.transport.is_closing():
            if cycle is None or (cycle.response_complete and not cycle.more_body):
                self.transport.write(_TOO_LARGE)
                self.transport.close()
            elif _COUNTS_BODIES or not cycle.more_body:
                self.transport.close()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body, which the application bounds."""
        self._read -= len(body) + _CHUNK_BYTES
        super().on_body(body)

    def is_late(self, timeout_s: float) -> bool:
        """Say whether a request, the first one too, has been awaited for longer than so many seconds."""
        cycle = self.cycle
        if cycle is not None and not cycle.more_body:
            comes = bool(self._read) and cycle.response_complete
        else:
            comes = not self.flow.read_paused  # else it is we who let it wait
        return comes and time.monotonic() - self._since > timeout_s
