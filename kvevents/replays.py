"""Replays that are on their way: what a publisher said lately, asked for again.

A DEALER asks the publisher's ROUTER; each request has a socket of its own, so that no late answer to an older one comes
in between. Both framings of the answers are read from the right (WIRE A4): the payload last, before it the number, and
an empty payload is the end. Everything here runs on the receiving thread.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import zmq
from structlog.typing import FilteringBoundLogger

from kvevents.message import MAX_TOPIC_BYTES, Message, Note
from kvevents.readable import Readable

ANSWER_S = 3.0
"""How long a publisher may say nothing before a replay counts as failed."""

_BURST = 256
"""Messages read from one socket before the next one's turn."""

_PAUSE_MS = 10
"""How soon to look again whether there is room for more."""

_WAIT_MS = 250
_RECEIVE_MESSAGES = 1_000


class Request(NamedTuple):
    """A replay that is asked for."""

    endpoint: str
    """Where."""
    start: int
    """From which number on."""
    like: Message
    """What its messages have in common: the pod, where it publishes, the number of the replay."""
    filter: bytes = b""
    """What the topics begin with that are heard live."""


class _Running:
    """A replay that is on its way."""

    __slots__ = ("heard_at", "is_paused", "request", "socket")

    def __init__(self, request: Request, socket: "zmq.Socket[bytes]") -> None:
        self.request = request
        self.socket = socket
        self.heard_at = time.monotonic()
        self.is_paused = False


class Replays:
    """See the module. `deliver` takes each message; `has_room` says whether there is room for more of a pod's."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        readable: Readable,
        deliver: Callable[[Message], None],
        has_room: Callable[[str], bool],
        log: FilteringBoundLogger,
    ) -> None:
        self._context = context
        self._readable = readable
        self._deliver = deliver
        self._has_room = has_room
        self._log = log
        self._running: dict[tuple[str | None, str], _Running] = {}
        self.asked = 0
        self.failed = 0
        self.unheard: dict[str | None, bytes] = {}
        """Pods whose filter does not let through what they publish, with the topic of that."""

    def ask(self, request: Request) -> None:
        """Ask for a replay; one of the same publisher that is still on its way is dropped."""
        self._drop(request)
        self.asked += 1
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.rcvhwm = _RECEIVE_MESSAGES
        socket.setsockopt(zmq.IPV6, 1)
        try:
            socket.connect(request.endpoint)
            socket.send_multipart([b"", request.start.to_bytes(8, "big")], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            socket.close(0)
            self._fail(request, error.strerror)
            return
        self._running[_key(request)] = _Running(request, socket)
        self._readable.register(socket)

    def drop(self, pod: str) -> None:
        """Drop the replays of a pod."""
        self.unheard.pop(pod, None)
        for running in [running for (of, _), running in self._running.items() if of == pod]:
            self._drop(running.request)

    def close(self) -> None:
        """Drop all replays."""
        for running in list(self._running.values()):
            self._drop(running.request)

    def timeout_ms(self) -> int | None:
        """Give how long to wait for anything before `receive` is to be called; None where there is nothing to do."""
        if any(running.is_paused for running in self._running.values()):
            return _PAUSE_MS
        return _WAIT_MS if self._running else None

    def receive(self) -> None:
        """Read what has come, and give up what does not come."""
        now = time.monotonic()
        for running in list(self._running.values()):
            if self._pauses(running) or self._read(running):
                running.heard_at = now
            elif now - running.heard_at > ANSWER_S and _key(running.request) in self._running:
                self._drop(running.request)
                self._fail(running.request, f"no answer for {ANSWER_S} s")

    def _pauses(self, running: _Running) -> bool:
        """Leave what comes where it is while there is no room for it."""
        pauses = not self._has_room(running.request.like.pod or "")
        if pauses and not running.is_paused:
            self._readable.unregister(running.socket)
        elif running.is_paused and not pauses:
            self._readable.register(running.socket)
        running.is_paused = pauses
        return pauses

    def _read(self, running: _Running) -> bool:
        """Deliver a burst of answers; say whether there were any."""
        request = running.request
        for number in range(_BURST):
            if not self._has_room(request.like.pod or ""):
                break
            try:
                frames = running.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return number > 0
            if len(frames) < 2 or len(frames[-2]) != 8 or (len(frames) > 3 and len(frames[-3]) > MAX_TOPIC_BYTES):
                self._drop(request)
                self._fail(request, f"an answer of {len(frames)} frames that is none")
                return True
            if not frames[-1]:
                self._drop(request)
                self._tell(request, Note.ENDED)
                return True
            topic = frames[-3] if len(frames) > 3 else b""
            if len(frames) > 3 and not topic.startswith(request.filter):
                self._note_unheard(request, topic)
            self._deliver(_like(request.like, topic=topic, seq=int.from_bytes(frames[-2], "big"), payload=frames[-1]))
        self._readable.again(running.socket)
        return True

    def _note_unheard(self, request: Request, topic: bytes) -> None:
        pod = request.like.pod
        if pod not in self.unheard:
            self.unheard[pod] = topic
            self._log.error("topic_unheard", pod=pod, filter=request.filter[:80], topic=topic[:80])

    def _fail(self, request: Request, why: str) -> None:
        self.failed += 1
        self._log.warning("replay_failed", pod=request.like.pod, endpoint=request.endpoint, reason=why)
        self._tell(request, Note.FAILED)

    def _tell(self, request: Request, note: Note) -> None:
        self._deliver(_like(request.like, note=note))

    def _drop(self, request: Request) -> None:
        running = self._running.pop(_key(request), None)
        if running is not None:
            if not running.is_paused:
                self._readable.unregister(running.socket)
            running.socket.close(0)


def _key(request: Request) -> tuple[str | None, str]:
    return request.like.pod, request.like.endpoint


def _like(
    like: Message, *, topic: bytes = b"", seq: int = 0, payload: bytes = b"", note: Note | None = None
) -> Message:
    return Message(
        topic=topic,
        seq=seq,
        payload=payload,
        pod=like.pod,
        model=like.model,
        endpoint=like.endpoint,
        copies=like.copies,
        replay=like.replay,
        note=note,
    )
