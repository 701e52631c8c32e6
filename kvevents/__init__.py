"""KV events from the wire to the index: decoders, subscribers, the worker pool."""

from indexer import AllBlocksCleared, BlockRemoved, BlockStored
from kvevents import discovery
from kvevents.apply import OnGap
from kvevents.engine_hash import HashFindings, recognise_hashes
from kvevents.errors import DecodeError, DiscoveryError, KVEventsError, PodTaken, PoolClosed, SubscriptionError
from kvevents.listening import Heard, LinkChange, Listener, ReplayAnswer, ask_replay
from kvevents.message import Message, parse_topic
from kvevents.pool import EventPool
from kvevents.recording import Recorder, RecordingError
from kvevents.wire import Batch, decode_batch, decode_batches

__all__ = [
    "AllBlocksCleared",
    "Batch",
    "BlockRemoved",
    "BlockStored",
    "DecodeError",
    "DiscoveryError",
    "EventPool",
    "HashFindings",
    "Heard",
    "KVEventsError",
    "LinkChange",
    "Listener",
    "Message",
    "OnGap",
    "PodTaken",
    "PoolClosed",
    "Recorder",
    "RecordingError",
    "ReplayAnswer",
    "SubscriptionError",
    "ask_replay",
    "decode_batch",
    "decode_batches",
    "discovery",
    "parse_topic",
    "recognise_hashes",
]
