"""The queue of one worker: ordered for each publisher, fair between them, bounded."""

import threading
from collections import deque

from kvevents.message import Message

MAX_TAKEN, MAX_TAKEN_BYTES = 64, 1 << 20
"""How much of one publisher a worker takes at a time: the more, the cheaper each message; the less, the sooner others
have their turn, and questions theirs."""


class ShardQueue:
    """Messages by publisher, for one taker. Publishers take turns, so that a noisy one does not starve the others.

    Over `max_messages` or `max_bytes` the oldest message of the publisher with the most waiting goes; its numbers then
    have a gap, which says what was lost. Nothing is dropped silently: `dropped` counts.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._waiting: dict[tuple[str, str], deque[tuple[int, Message]]] = {}
        self._turns: deque[tuple[str, str]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._in_work: int | None = None
        self._tickets = 0
        self.messages = 0
        self.bytes = 0
        self.dropped = 0

    def put(self, publisher: tuple[str, str], message: Message, *, wait: bool) -> None:
        """Add a message. When full, `wait` for room, else drop as described."""
        size = len(message.payload)
        with self._changed:
            if wait:
                while not self._closed and self.messages and not self._fits(size):
                    self._changed.wait()
            else:
                while self.messages and not self._fits(size):
                    self._drop_oldest()
            queue = self._waiting.get(publisher)
            if queue is None:
                queue = self._waiting[publisher] = deque()
                self._turns.append(publisher)
            queue.append((self._tickets, message))
            self._tickets += 1
            self.messages += 1
            self.bytes += size
            self._changed.notify_all()

    def _fits(self, size: int) -> bool:
        return self.messages < self._max_messages and self.bytes + size <= self._max_bytes

    def _drop_oldest(self) -> None:
        queue = max(self._waiting.values(), key=len)
        _, gone = queue.popleft()
        self.messages -= 1
        self.bytes -= len(gone.payload)
        self.dropped += 1

    def take(self, timeout: float | None) -> list[Message]:
        """Give the next messages of the publisher whose turn it is; none after `timeout` s or when closed.

        Call `done` when they are applied.
        """
        with self._changed:
            while True:
                while self._turns:
                    publisher = self._turns.popleft()
                    queue = self._waiting[publisher]
                    first = queue[0][0] if queue else None
                    taken: list[Message] = []
                    size = 0
                    while queue and len(taken) < MAX_TAKEN and size < MAX_TAKEN_BYTES:
                        message = queue.popleft()[1]
                        size += len(message.payload)
                        taken.append(message)
                    if queue:
                        self._turns.append(publisher)
                    else:
                        del self._waiting[publisher]
                    if taken:
                        self.messages -= len(taken)
                        self.bytes -= size
                        self._in_work = first
                        return taken
                if self._closed or not self._changed.wait(timeout):
                    return []

    def discard(self, pod: str) -> None:
        """Forget what waits from a pod that is no longer followed."""
        with self._changed:
            for publisher, queue in self._waiting.items():
                if publisher[0] == pod:
                    self.messages -= len(queue)
                    self.bytes -= sum(len(message.payload) for _, message in queue)
                    queue.clear()
            self._changed.notify_all()

    def done(self) -> None:
        """Say that the messages taken last are applied."""
        with self._changed:
            self._in_work = None
            self._changed.notify_all()

    def mark(self) -> int:
        """Give a mark behind everything put so far."""
        with self._changed:
            return self._tickets

    def join(self, mark: int, timeout: float) -> bool:
        """Wait until everything before a mark is applied or dropped; say whether that was in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._oldest() >= mark, timeout)

    def _oldest(self) -> int:
        heads = [queue[0][0] for queue in self._waiting.values() if queue]
        return min([*heads, self._tickets if self._in_work is None else self._in_work, self._tickets])

    def close(self) -> None:
        """Let `take` and `put` wait no longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed
