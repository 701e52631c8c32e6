"""Exceptions of this package.

* `IndexerError`
    * `InvalidQuestion` (also a `ValueError`): a prompt, URL or argument cannot be used as given
    * `LimitReached`: a configured bound would be exceeded
    * `IndexUnavailable`: the database that holds the index does not answer
    * `SnapshotError`: a snapshot cannot be written, or not be used
"""


class IndexerError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidQuestion(IndexerError, ValueError):
    """An argument cannot be used as given; the message names it, its value and what is expected."""


class LimitReached(IndexerError):
    """A configured bound would be exceeded; the message names the bound and the setting that raises it."""


class IndexUnavailable(IndexerError):
    """The database that holds the index does not answer, or not as it should; the message says which and how."""


class SnapshotError(IndexerError):
    """A snapshot cannot be written, or is damaged or foreign; the message names it, the place and the remedy."""
