"""KV events from the wire to the index: decoders, subscribers, the worker pool."""

from indexer import AllBlocksCleared, BlockRemoved, BlockStored
from kvevents import discovery
from kvevents.apply import OnGap
from kvevents.errors import DecodeError, DiscoveryError, KVEventsError, PodTaken, PoolClosed, SubscriptionError
from kvevents.message import Message, parse_topic
from kvevents.pool import EventPool
from kvevents.wire import Batch, decode_batch, decode_batches

__all__ = [
    "AllBlocksCleared",
    "Batch",
    "BlockRemoved",
    "BlockStored",
    "DecodeError",
    "DiscoveryError",
    "EventPool",
    "KVEventsError",
    "Message",
    "OnGap",
    "PodTaken",
    "PoolClosed",
    "SubscriptionError",
    "decode_batch",
    "decode_batches",
    "discovery",
    "parse_topic",
]
