"""Exceptions of this package.

* `ScorerError`
    * `InvalidRequest` (also a `ValueError`): a question cannot be answered as asked; the message names the field
        * `TemplateFailed`: a chat template refused the messages, is wrong itself, or took more than it may
    * `NoTokenizer`: nothing turns text for this model into tokens; the message names the places looked at
    * `Unavailable`: a question cannot be answered now; asked again later it may be
"""


class ScorerError(Exception):
    """Base of everything this package raises on purpose."""


class InvalidRequest(ScorerError, ValueError):
    """A question cannot be answered as asked; the message names the field, its value and what is expected."""


class NoTokenizer(ScorerError):
    """There is no tokenizer, or no chat template, for a model; the message names the places looked at."""


class TemplateFailed(InvalidRequest):
    """A chat template refused the messages, is wrong itself, or took more time or memory than it may."""


class Unavailable(ScorerError):
    """Too many questions wait, or the remote tokenizer does not answer: ask again later."""


def numbered(error: ScorerError, number: int, name: str = "") -> ScorerError:
    """Give the same error about one of many questions: `name` is what holds them, `number` which one."""
    return type(error)(f"{name}[{number}]{'.' if isinstance(error, InvalidRequest) else ': '}{error}")
