"""Exceptions of this package.

* `ScorerError`
    * `InvalidRequest` (also a `ValueError`): a question cannot be answered as asked; the message names the field
"""


class ScorerError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidRequest(ScorerError, ValueError):
    """A question cannot be answered as asked; the message names the field, its value and what is expected."""
