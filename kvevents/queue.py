"""The queue of one worker: ordered for each publisher, fair between them, bounded."""

import threading
from collections import deque
from collections.abc import Iterable

from kvevents.message import Message, Publisher

MAX_TAKEN, MAX_TAKEN_BYTES = 64, 1 << 20
"""How much of one publisher a worker takes at a time: the more, the cheaper each message; the less, the sooner others
have their turn, and questions theirs."""


class _Group:
    """Messages that are taken at once, and when each came."""

    __slots__ = ("bytes", "messages", "tickets")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.tickets: list[int] = []
        self.bytes = 0


class _Line:
    """What waits from one publisher. There is always something."""

    __slots__ = ("groups", "messages")

    def __init__(self) -> None:
        self.groups: deque[_Group] = deque()
        self.messages = 0

    def first_to_drop(self) -> tuple[_Group, int]:
        """Give the oldest message that came live: what was asked for comes no faster than there is room, and notes are
        not said again.
        """
        for group in self.groups:
            for place, message in enumerate(group.messages):
                if not message.replay and message.note is None:
                    return group, place
        return self.groups[0], 0

    def start_group(self) -> _Group:
        group = _Group()
        self.groups.append(group)
        return group


class ShardQueue:
    """Messages by publisher, for one taker. Publishers take turns, so that a noisy one does not starve the others.

    Over `max_messages` or `max_bytes` the oldest message of the publisher with the most waiting goes; its numbers then
    have a gap, which says what was lost. Nothing is dropped silently: `dropped` counts.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._waiting: dict[Publisher, _Line] = {}
        self._turns: deque[Publisher] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._in_work: int | None = None
        self._tickets = 0
        self.messages = 0
        self.bytes = 0
        self.dropped = 0

    def put(self, publisher: Publisher, message: Message) -> None:
        """Add a message; wait for room where it is full."""
        size = len(message.payload)
        with self._changed:
            while not self._closed and self.messages and not self._fits(size):
                self._changed.wait()
            self._add(publisher, message, size)
            self._changed.notify_all()

    def put_all(self, messages: Iterable[tuple[Publisher, Message]]) -> None:
        """Add messages, each with who says it; where it is full others are dropped for them as described."""
        with self._changed:
            for publisher, message in messages:
                size = len(message.payload)
                while self.messages and not self._fits(size):
                    self._drop_oldest()
                self._add(publisher, message, size)
            self._changed.notify_all()

    def _add(self, publisher: Publisher, message: Message, size: int) -> None:
        line = self._waiting.get(publisher)
        if line is None:
            line = self._waiting[publisher] = _Line()
            self._turns.append(publisher)
            group = line.start_group()
        else:
            group = line.groups[-1]
            if len(group.messages) >= MAX_TAKEN or group.bytes >= MAX_TAKEN_BYTES:
                group = line.start_group()
        group.messages.append(message)
        group.tickets.append(self._tickets)
        group.bytes += size
        line.messages += 1
        self._tickets += 1
        self.messages += 1
        self.bytes += size

    @property
    def has_room(self) -> bool:
        """Whether it is less than half full: what can be asked for again should not push out what cannot."""
        return 2 * self.messages < self._max_messages and 2 * self.bytes < self._max_bytes

    def _fits(self, size: int) -> bool:
        return self.messages < self._max_messages and self.bytes + size <= self._max_bytes

    def _drop_oldest(self) -> None:
        publisher, line = max(self._waiting.items(), key=lambda item: item[1].messages)
        group, place = line.first_to_drop()
        size = len(group.messages.pop(place).payload)
        del group.tickets[place]
        group.bytes -= size
        line.messages -= 1
        self.messages -= 1
        self.bytes -= size
        self.dropped += 1
        if not group.messages:
            line.groups.remove(group)
        if not line.groups:
            self._leave(publisher)

    def _leave(self, publisher: Publisher) -> None:
        del self._waiting[publisher]
        self._turns.remove(publisher)

    def take(self, timeout: float | None) -> tuple[Publisher, list[Message]] | None:
        """Give the next messages of the publisher whose turn it is; None after `timeout` s or when closed.

        Call `done` when they are applied.
        """
        with self._changed:
            while not self._turns:
                if self._closed or not self._changed.wait(timeout):
                    return None
            publisher = self._turns.popleft()
            line = self._waiting[publisher]
            group = line.groups.popleft()
            line.messages -= len(group.messages)
            if line.groups:
                self._turns.append(publisher)
            else:
                del self._waiting[publisher]
            self.messages -= len(group.messages)
            self.bytes -= group.bytes
            self._in_work = group.tickets[0]
            return publisher, group.messages

    def discard(self, pod: str) -> None:
        """Forget what waits from a pod that is no longer followed."""
        with self._changed:
            for publisher in [publisher for publisher in self._waiting if publisher.pod == pod]:
                line = self._waiting[publisher]
                self.messages -= line.messages
                self.bytes -= sum(group.bytes for group in line.groups)
                self._leave(publisher)
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
        heads = [line.groups[0].tickets[0] for line in self._waiting.values()]
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
