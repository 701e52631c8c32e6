"""Exceptions of this package.

* `KVEventsError`
    * `DecodeError` (also a `ValueError`): a payload is no batch of events; `reason` is the word it is counted under
    * `SubscriptionError` (also a `ValueError`): an endpoint or identity cannot be used as given
    * `DiscoveryError`: a source of pods cannot be asked, or says what makes no sense
    * `PodTaken`: a pod cannot be registered under a name
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


class DiscoveryError(KVEventsError):
    """A source of pods cannot be asked now, or says what makes no sense; what it said before holds."""


class PodTaken(KVEventsError):
    """A pod cannot be registered under this name, or not here."""


class PoolClosed(KVEventsError):
    """The pool was closed, or never started."""
