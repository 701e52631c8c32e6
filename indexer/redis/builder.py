"""What all parts of one builder work with."""

from typing import NamedTuple

from indexer.redis.layout import Layout
from indexer.redis.standing import Standing
from indexer.redis.store import Store
from indexer.redis.writer import Writer


class Builder(NamedTuple):
    """One builder of an index in Redis. One thread at a time, but for the store."""

    store: Store
    layout: Layout
    writer: Writer
    standing: Standing
