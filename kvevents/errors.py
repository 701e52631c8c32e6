"""Exceptions of this package.

* `KVEventsError`
    * `DecodeError` (also a `ValueError`): a payload is no batch of events; `reason` is the word it is counted under
    * `SubscriptionError` (also a `ValueError`): an endpoint or identity cannot be used as given
    * `PoolClosed`: the pool does not run
"""


class KVEventsError(Exception):
    """Base of everything this package raises on purpose."""


class DecodeError(KVEventsError, ValueError):
    """A payload is no batch of events."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class SubscriptionError(KVEventsError, ValueError):
    """An endpoint or identity cannot be used as given; the message names it and the remedy."""


class PoolClosed(KVEventsError):
    """The pool was closed, or never started."""
