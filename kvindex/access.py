"""Who may ask: bearer tokens, the same ones for HTTP and gRPC."""

import re
from collections.abc import Iterator, Sequence
from hmac import compare_digest
from pathlib import Path

from msgspec import UNSET
from prometheus_client import Counter
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from kvindex.answers import Carrier
from kvindex.config import AccessConfig
from kvindex.errors import UserError

REFUSED = "this service wants a token that it knows: Authorization: Bearer TOKEN"
"""What is said to those without one; never which ones there are."""

_TOKEN = re.compile(r"[!-~]+")
_SCHEME = b"bearer "


def read_tokens(config: AccessConfig) -> list[str]:
    """Give all tokens that hold, the one of the configuration first; none where everybody may ask.

    Raises `UserError`, which names the key, for an empty token, one that no header can carry, and a file without any.
    """
    tokens = []
    if config.token is not UNSET:
        tokens.append(usable_token(config.token, "access.token"))
    if config.token_file is not UNSET:
        try:
            lines = Path(config.token_file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"access.token_file {config.token_file!r}: {_reason(error)}") from error
        found = [
            usable_token(line, f"access.token_file {config.token_file!r}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        if not found:
            raise UserError(f"access.token_file {config.token_file!r}: no token in it; write one a line")
        tokens += found
    return tokens


def usable_token(text: str, where: str) -> str:
    """Give a token without the blanks around it. Raises `UserError`, without the token, for one that cannot be sent."""
    token = text.strip()
    if not token:
        raise UserError(f"{where}: empty; name a token, or leave it out")
    if not _TOKEN.fullmatch(token):
        raise UserError(f"{where}: a token has letters, digits and signs of ASCII, and no blanks")
    return token


def _reason(error: OSError | ValueError) -> str:
    # what a decoder says has the bytes in it
    return str(error.strerror) if isinstance(error, OSError) else "no text in UTF-8"


class Access(Collector):
    """Knows the tokens, and counts whom it refused. Without tokens everybody may ask. May be asked from any thread."""

    def __init__(self, tokens: Sequence[str] = ()) -> None:
        self._tokens = _as_sent(tokens)
        refused = Counter("kvindex_unauthorized_total", "Questions without a token that holds", ["by"], registry=None)
        self._refused = {"http": refused.labels("http"), "grpc": refused.labels("grpc")}
        self._all = refused

    def renew(self, tokens: Sequence[str]) -> bool:
        """Let these tokens hold from now on and no others; say whether they are others than before."""
        before, self._tokens = self._tokens, _as_sent(tokens)
        return self._tokens != before

    def allows(self, authorization: bytes, by: Carrier) -> bool:
        """Say whether the value of a header `Authorization` holds, b"" where there was none."""
        if not self._tokens:
            return True
        given = authorization[len(_SCHEME) :].strip() if authorization[: len(_SCHEME)].lower() == _SCHEME else b""
        # all of them are compared, and each to its end: the time must not tell how much was right
        if sum(compare_digest(given, token) for token in self._tokens):
            return True
        self._refused[by].inc()
        return False

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        yield from self._all.collect()


def _as_sent(tokens: Sequence[str]) -> list[bytes]:
    return [token.encode() for token in tokens]
