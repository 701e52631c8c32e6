"""A message as it came from a publisher, and who its topic says it is from."""

from enum import Enum, auto
from functools import lru_cache
from typing import NamedTuple

import msgspec

FLEET_WIDE = frozenset({"SHARED_STORAGE", "OBJECT_STORE"})
"""Names in the place of a pod that mean storage which any pod of the model can read (llm-d's storage connectors)."""

MAX_TOPIC_BYTES = 1_024
"""Topics name a pod and a model. Longer ones are none: they would be kept, and no bound counts them."""


class Note(Enum):
    """What is told of a publisher in between its messages."""

    CONNECTED = auto()
    """Its socket is connected, for the first time or again."""
    ENDED = auto()
    """A replay is at its end."""
    FAILED = auto()
    """A replay could not be had, or not all of it."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message: its three frames, and what is known of its publisher."""

    topic: bytes
    seq: int
    payload: bytes | memoryview
    pod: str | None = None
    """The pod, where the connection says it; else the topic does."""
    model: str = ""
    """The model, where the connection says it."""
    endpoint: str = ""
    """Where it came from. Publishers behind different endpoints number their messages apart."""
    copies: str = ""
    """``count`` or ``set`` where the subscription says it."""
    replay: int = 0
    """The replay that it is from; 0 where it came live."""
    note: Note | None = None
    """What is no message but to be heard in its place."""


class Publisher(NamedTuple):
    """Who numbers messages: a pod, and where it publishes. Its ranks number theirs apart."""

    pod: str
    endpoint: str


class Topic(NamedTuple):
    """Who a topic says it is from."""

    pod: str
    model: str


@lru_cache(maxsize=4096)
def parse_topic(topic: bytes) -> Topic:
    """Read ``kv@<pod>@<model>``. Any other text is a pod's name without a model; a model may contain ``@``."""
    text = topic.decode("utf-8", "replace")
    parts = text.split("@", 2)
    if len(parts) == 3:
        return Topic(parts[1], parts[2])
    return Topic(text, "")


def publisher_of(message: Message) -> Publisher:
    """Say who numbers a message: of the pod that the connection says, else the topic."""
    return Publisher(message.pod or parse_topic(message.topic).pod, message.endpoint)
