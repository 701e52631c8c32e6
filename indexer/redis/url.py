"""URLs of an index in Redis."""

from typing import NamedTuple
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

from indexer.errors import InvalidQuestion

_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
"""Schemes of one server, and those that the client library knows."""

CLUSTER = "+cluster"

SCHEMES = (*_SCHEMES, "unix", *(scheme + CLUSTER for scheme in _SCHEMES))

_TIMEOUT_S = 1.0
_PORT = 6379


class RedisUrl(NamedTuple):
    """A URL taken apart."""

    shown: str
    """Without the password."""
    urls: tuple[str, ...]
    """For the client library: that of the server, or of each node of a cluster that is known."""
    prefix: str
    timeout_s: float
    is_cluster: bool

    def of_node(self, host: str, port: int) -> str:
        """Give the URL of another node of the same cluster."""
        parts = urlsplit(self.urls[0])
        user = parts.netloc.rpartition("@")[0]
        return urlunsplit(parts._replace(netloc=f"{user}@{_place(host, port)}" if user else _place(host, port)))


def parse_url(text: str) -> RedisUrl:
    """Read ``redis://user:password@host:port/db?prefix=kvindex:&timeout=1.0``, or one of a cluster.

    That is ``redis+cluster://user:password@host:port,host:port?...``: some of its nodes, from which the others are
    known. Raises `InvalidQuestion` for options that are not known.
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
    user, at, place = parts.netloc.rpartition("@")
    if not place.strip(",") and parts.scheme != "unix":
        raise InvalidQuestion(f"index URL without a host: expected one, as in {parts.scheme}://localhost:{_PORT}")
    shown = f"{parts.scheme}://{place}{parts.path}"
    query = urlencode(options)
    if not parts.scheme.endswith(CLUSTER):
        if not parts.hostname and parts.scheme != "unix":
            raise InvalidQuestion(f"index URL without a host: expected one, as in {parts.scheme}://localhost:{_PORT}")
        scheme = _SCHEMES.get(parts.scheme, parts.scheme)
        # written out: the library that takes URLs apart puts no // before the path of a socket
        url = f"{scheme}://{parts.netloc}{parts.path}" + (f"?{query}" if query else "")
        return RedisUrl(shown, (url,), prefix, timeout_s, is_cluster=False)
    if parts.path.strip("/") not in ("", "0") or options.get("db", "0") != "0":
        raise InvalidQuestion(f"index URL {shown}: a cluster has no databases but 0")
    scheme = _SCHEMES[parts.scheme.removesuffix(CLUSTER)]
    urls = [urlunsplit((scheme, f"{user}{at}{_node(one, shown)}", "", "", "")) for one in place.split(",") if one]
    return RedisUrl(shown, tuple(urls), prefix, timeout_s, is_cluster=True)


def _node(place: str, shown: str) -> str:
    parts = SplitResult("", place, "", "", "")
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidQuestion(f"index URL {shown}: {error}") from None
    if not host:
        raise InvalidQuestion(f"index URL {shown}: a node without a host")
    return _place(host, port or _PORT)


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
