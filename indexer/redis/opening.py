"""From the URL of an index in Redis to its connection and the names of its keys."""

from indexer.redis.cluster import AsyncClusterStore, ClusterStore
from indexer.redis.layout import PARTS, Layout
from indexer.redis.store import AsyncServerStore, AsyncStore, ServerStore, Store
from indexer.redis.url import RedisUrl, parse_url


def opened(url: str) -> tuple[Store, Layout]:
    """Make a connection for threads. Nothing is sent yet. Raises `InvalidQuestion` for a URL that names no index."""
    parsed = parse_url(url)
    return ClusterStore(parsed) if parsed.is_cluster else ServerStore(parsed), _layout_of(parsed)


def opened_async(url: str) -> tuple[AsyncStore, Layout]:
    """Make a connection for an event loop, as `opened` does."""
    parsed = parse_url(url)
    return AsyncClusterStore(parsed) if parsed.is_cluster else AsyncServerStore(parsed), _layout_of(parsed)


def _layout_of(url: RedisUrl) -> Layout:
    return Layout(url.prefix, parts=PARTS if url.is_cluster else 1)
