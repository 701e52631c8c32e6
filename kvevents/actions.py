"""What recovery says is to be done."""

from typing import NamedTuple, TypeAlias

from kvevents.message import Message


class Deliver(NamedTuple):
    """Apply these, in this order."""

    messages: list[Message]


class Ask(NamedTuple):
    """Ask for a replay from a number on. What an earlier one still says is of no interest any more."""

    replay: int
    start: int


class Begin(NamedTuple):
    """What follows is all that the cache ever held: forget what is known of it first."""

    is_restart: bool
    """Because the engine began anew, not because it says all of it again."""


class Doubt(NamedTuple):
    """Messages are missing, and asked for: until further notice what is known may be wrong."""


class Whole(NamedTuple):
    """Nothing is missing: what is known is all there is."""


Action: TypeAlias = Deliver | Ask | Begin | Doubt | Whole
