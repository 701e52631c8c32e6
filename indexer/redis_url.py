"""URLs of an index in Redis."""

from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from indexer.errors import InvalidQuestion

SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss", "unix": "unix"}
"""Schemes of URLs, and those that the client library knows."""

_TIMEOUT_S = 1.0


class RedisUrl(NamedTuple):
    """A URL taken apart."""

    shown: str
    """Without the password."""
    url: str
    """For the client library."""
    prefix: str
    timeout_s: float


def parse_url(text: str) -> RedisUrl:
    """Read ``redis://user:password@host:port/db?prefix=kvindex:&timeout=1.0``.

    Raises `InvalidQuestion` for options that are not known.
    """
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise InvalidQuestion(f"index URL: {error}") from None
    if parts.scheme not in SCHEMES:
        raise InvalidQuestion(f"index URL scheme {parts.scheme!r}: expected one of {', '.join(SCHEMES)}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    prefix = options.pop("prefix", "kvindex:")
    timeout = options.pop("timeout", str(_TIMEOUT_S))
    unknown = sorted(options.keys() - {"db"})
    if unknown:
        raise InvalidQuestion(f"index URL option {unknown[0]!r}: expected prefix, timeout or db")
    try:
        timeout_s = float(timeout)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s < 3600:
        raise InvalidQuestion(f"index URL option timeout={timeout!r}: expected seconds above 0")
    if not parts.hostname and parts.scheme != "unix":
        raise InvalidQuestion(f"index URL without a host: expected one, as in {parts.scheme}://localhost:6379/0")
    host = parts.netloc.rpartition("@")[2]
    shown = urlunsplit((parts.scheme, host, parts.path, "", ""))
    url = urlunsplit((SCHEMES[parts.scheme], parts.netloc, parts.path, urlencode(options), ""))
    return RedisUrl(shown, url, prefix, timeout_s)
