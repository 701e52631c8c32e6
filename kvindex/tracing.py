"""What traces say of a question: its model, its size, what was found, how long each stage took, and why it failed.

Nothing in here needs the packages of the extra ``otel``: `kvindex.spans` does, which is imported where spans are asked
for. Where they are not, or not for this question, all of `note_...` do nothing.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from indexer import IndexUnavailable
from kvindex.config import TracingConfig
from kvindex.errors import UserError
from scorer import InvalidRequest, PodMatch

if TYPE_CHECKING:
    from kvindex.spans import Spans

_FIELD = re.compile(r"[a-z_]\w*(?:\[\d+\])*(?:\.\w+(?:\[\d+\])*)*(?=: )")
_FIELD_CHARACTERS = 80
_NAME = re.compile(r"[!#$%&'*+.^`|~\w-]+", re.ASCII)
_VALUE = re.compile(r"[ -~]*")


class Stage(NamedTuple):
    """A part of an answer's time."""

    name: str
    begun: float
    """By `time.perf_counter`."""
    seconds: float


class Trace:
    """What is noted of one question of which spans are made. Never its tokens, its text or its salt."""

    def __init__(self) -> None:
        self.attributes: dict[str, str | int] = {}
        self.stages: list[Stage] = []
        self.error: BaseException | None = None
        self.status = ""
        """What the carrier calls an answer that is none: ``Bad Request``, ``INVALID_ARGUMENT``."""
        self.wrong = ""
        """What was wrong, in words that hold nothing of the prompt."""

    def add(self, name: str, count: int) -> None:
        """Add to a number: a batch says of its questions what they have together."""
        self.attributes[name] = int(self.attributes.get(name, 0)) + count

    def raise_to(self, name: str, count: int) -> None:
        """Keep the largest number."""
        self.attributes[name] = max(int(self.attributes.get(name, 0)), count)


UNDER_WAY: ContextVar[Trace | None] = ContextVar("kvindex_trace", default=None)
"""That of the question which is answered here, also in a thread that `asyncio.to_thread` runs."""


def note(name: str, value: str | int) -> None:
    """Say something of the question; what was said first holds, so that a batch has its first question's model."""
    trace = UNDER_WAY.get()
    if trace is not None:
        trace.attributes.setdefault(name, value)


def note_found(matches: Sequence[PodMatch], *, tokens: int, block_size: int, most: int) -> None:
    """Say what was asked for and found: `most` is how many blocks the best pod holds."""
    trace = UNDER_WAY.get()
    if trace is not None:
        trace.add("kvindex.prompt_tokens", tokens)
        trace.attributes["kvindex.block_size"] = block_size
        trace.raise_to("kvindex.pods", len({match.pod for match in matches if match.blocks}))
        trace.add("kvindex.best_blocks", most)


def note_stages(begun: float, stages: Mapping[str, float]) -> None:
    """Say how many seconds each stage took, one after the other from `begun` on (`time.perf_counter`)."""
    trace = UNDER_WAY.get()
    if trace is not None:
        for name, seconds in stages.items():
            if seconds > 0:
                trace.stages.append(Stage(name, begun, seconds))
                begun += seconds


def note_error(error: BaseException) -> None:
    """Say why there is no answer. Of what a client sent only the name of the field is told on, never a value."""
    trace = UNDER_WAY.get()
    if trace is not None:
        trace.error = error
        if isinstance(error, IndexUnavailable):
            trace.wrong = str(error)  # of the database alone
        elif isinstance(error, InvalidRequest) and (field := _FIELD.match(str(error))):
            trace.wrong = field[0][:_FIELD_CHARACTERS]


def open_tracing(config: TracingConfig, running: ExitStack) -> "Spans | None":
    """Make what makes spans, None where the configuration names no collector; `running` sends the last ones.

    Raises `UserError` for an endpoint or a header that cannot be one, and when the packages of the extra are not there.
    """
    if not config.endpoint:
        return None
    _check(config)
    try:
        from kvindex.spans import Spans
    except ImportError as error:
        raise UserError(
            f"tracing.endpoint {config.endpoint}: {error}; install 'kv-cache-indexer[otel]', or leave the key out"
        ) from error
    try:
        spans = Spans(config)
    except (ValueError, RuntimeError, ImportError) as error:  # of what the SDK reads in the environment itself
        raise UserError(f"tracing.endpoint {config.endpoint}: {error}; see the variables OTEL_...") from error
    running.callback(spans.close)
    return spans


def _check(config: TracingConfig) -> None:
    try:
        url = urlsplit(config.endpoint)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and not url.query
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"tracing.endpoint {config.endpoint!r}: expected http://HOST:PORT of an OTLP collector")
    for name, value in config.headers.items():
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise UserError(f"tracing.headers {name!r}: a header has a name and a value of ASCII in one line")
