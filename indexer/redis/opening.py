"""From the URL of an index in Redis to its connection and its layout."""

from indexer.redis.cluster import AsyncClusterStore, ClusterStore
from indexer.redis.layout import PARTS, Layout
from indexer.redis.store import AsyncServerStore, AsyncStore, ServerStore, Store
from indexer.redis.url import RedisUrl


def open_store(url: RedisUrl) -> Store:
    """Make a connection for threads. Nothing is sent yet."""
    return ClusterStore(url) if url.is_cluster else ServerStore(url)


def open_async_store(url: RedisUrl) -> AsyncStore:
    """Make a connection for an event loop. Nothing is sent yet."""
    return AsyncClusterStore(url) if url.is_cluster else AsyncServerStore(url)


def layout_of(url: RedisUrl) -> Layout:
    """Give the names of keys."""
    return Layout(url.prefix, parts=PARTS if url.is_cluster else 1)
