"""Live messages of one publisher that wait for others, which were asked for again."""

from collections import deque

from kvevents.message import Message

HELD_MESSAGES = 2_048
HELD_BYTES = 4 * 1024 * 1024
"""How much is held back of one publisher; beyond that the oldest go, and are asked for like other lost ones."""


class Held:
    """Messages in the order in which they came, their numbers going up."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._bytes = 0
        self.dropped = 0
        """Messages that had to go."""

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def first(self) -> Message:
        """The oldest one, where there is any."""
        return self._messages[0]

    @property
    def last(self) -> Message:
        """The newest one, where there is any."""
        return self._messages[-1]

    def add(self, message: Message) -> None:
        """Hold one back."""
        self._messages.append(message)
        self._bytes += len(message.payload)
        while len(self._messages) > HELD_MESSAGES or (self._bytes > HELD_BYTES and len(self._messages) > 1):
            self.pop()
            self.dropped += 1

    def pop(self) -> None:
        """Hold the oldest one back no longer."""
        self._bytes -= len(self._messages.popleft().payload)

    def clear(self) -> list[Message]:
        """Hold nothing back any more; give what was."""
        messages = list(self._messages)
        self._messages.clear()
        self._bytes = 0
        return messages
