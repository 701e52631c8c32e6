"""From a URL to an index."""

import warnings
from urllib.parse import parse_qsl, urlsplit

from indexer import _impl
from indexer.base import Index, Limits
from indexer.errors import InvalidQuestion
from indexer.memory import MemoryIndex
from indexer.redis.url import SCHEMES


def open_index(url: str = "memory://", *, limits: Limits | None = None) -> Index:
    """Open the index that a URL names.

    ``memory://`` is an index in this process, in Rust where the compiled core is installed, else in plain Python, with
    one warning; ``memory://?impl=native`` and ``memory://?impl=python`` ask for one of them. ``redis://``,
    ``rediss://``, ``valkey://``, ``valkeys://``, ``unix://`` and ``redis+cluster://`` are an index in Redis or Valkey,
    see `RedisIndex`.

    Raises `InvalidQuestion` for a URL that names no index of this version, or a core that is not installed.
    """
    if url.partition("://")[0].lower() in SCHEMES:
        from indexer.redis.index import RedisIndex

        return RedisIndex(url, limits)
    secret, at, rest = url.rpartition("@")
    shown = f"{secret.partition('://')[0]}://...@{rest}" if at else url
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidQuestion(f"index URL {shown!r}: {error}") from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme != "memory" or parts.netloc or parts.path:
        raise InvalidQuestion(
            f"index URL {shown!r}: expected memory://, memory://?impl=python, redis://host:port/0, ..."
        )
    asked = options.pop("impl", "")
    if asked not in ("", "native", "python") or options:
        raise InvalidQuestion(f"index URL {url!r}: the only option is impl, native or python")
    if asked == "native" and _impl.missing:
        raise InvalidQuestion(f"index URL {url!r}: the core cannot be loaded: {_impl.missing}; {_impl.REMEDY}")
    if not asked and _impl.unasked:
        warnings.warn(
            "the compiled core is not installed: the index runs in plain Python, about ten times slower; "
            f"{_impl.REMEDY}, or say KVINDEX_IMPL=python",
            RuntimeWarning,
            stacklevel=2,
        )
    if (asked or _impl.implementation) == "python":
        return MemoryIndex(limits)
    from indexer.native import NativeIndex

    return NativeIndex(limits)
