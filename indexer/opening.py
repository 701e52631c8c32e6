"""From a URL to an index."""

from urllib.parse import parse_qsl, urlsplit

from indexer.base import Index
from indexer.errors import InvalidQuestion
from indexer.memory import MemoryIndex


def open_index(url: str = "memory://") -> Index:
    """Open the index that a URL names: ``memory://``, or ``memory://?impl=python`` to ask for that implementation.

    Raises `InvalidQuestion` for a URL that names no index of this version.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme != "memory" or parts.netloc or parts.path:
        raise InvalidQuestion(f"index URL {url!r}: expected 'memory://' or 'memory://?impl=python'")
    impl = options.pop("impl", "python")
    if impl != "python" or options:
        raise InvalidQuestion(f"index URL {url!r}: the only option is impl=python")
    return MemoryIndex()
