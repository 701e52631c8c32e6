"""KV events from the wire to the index: decoders, subscribers, the worker pool."""

from indexer import AllBlocksCleared, BlockRemoved, BlockStored
from kvevents.apply import OnGap
from kvevents.engine_hash import HashFindings, recognise_hashes
from kvevents.errors import DecodeError, KVEventsError, PoolClosed, SubscriptionError
from kvevents.listening import Heard, LinkChange, Listener, ReplayAnswer, ask_replay
from kvevents.message import Message, parse_topic
from kvevents.pool import EventPool
from kvevents.recording import Recorder, RecordingError, pods_of
from kvevents.wire import Batch, decode_batch, decode_batches

__all__ = [
    "AllBlocksCleared",
    "Batch",
    "BlockRemoved",
    "BlockStored",
    "DecodeError",
    "EventPool",
    "HashFindings",
    "Heard",
    "KVEventsError",
    "LinkChange",
    "Listener",
    "Message",
    "OnGap",
    "PoolClosed",
    "Recorder",
    "RecordingError",
    "ReplayAnswer",
    "SubscriptionError",
    "ask_replay",
    "decode_batch",
    "decode_batches",
    "parse_topic",
    "pods_of",
    "recognise_hashes",
]
