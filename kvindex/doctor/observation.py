"""What was seen of one publisher in some seconds, without a judgement."""

from collections import Counter
from statistics import median
from typing import Any, TypeVar

import msgspec

from kvevents import (
    BlockStored,
    DecodeError,
    Heard,
    LinkChange,
    ReplayAnswer,
    decode_batch,
    parse_topic,
)

_T = TypeVar("_T")
_MOST_NAMES = 64
_MOST_HASHES = 1_000_000
_MOST_ROOTS = 64
_MOST_TOKENS = 65_536
_MOST_LAGS = 4_096
_MOST_TEXT = 80

_VLLM = (
    "type block_hashes parent_block_hash token_ids block_size lora_id medium lora_name extra_keys group_idx "
    "kv_cache_spec_kind kv_cache_spec_sliding_window locality ownership session_id lookahead_token_ids cache_salt"
)
"""Keys of vLLM's events to 0.33, and of SGLang's of 0.5."""
_MOONCAKE = (
    "event_id timestamp event_type model_name additional_salt tenant_id backend_id group_id dp_rank object_key "
    "seq_hashes base_block_idx parent_hash connector_block_hash"
)
"""Keys of RFC 1527 and of Mooncake's master events."""
_KNOWN_KEYS = frozenset(f"{_VLLM} {_MOONCAKE}".split())
_STORED_FIELDS = 11
"""Fields after the tag of the longest tagged array there is, vLLM 0.22 and 0.23."""
_REMOVED_FIELDS = 3


class ReplaySeen(msgspec.Struct):
    """What the replay socket answered."""

    endpoint: str
    count: int
    first: int | None
    last: int | None
    is_complete: bool
    is_reached: bool
    studied: int
    """How many of its messages were looked into."""


class Observation(msgspec.Struct):
    """See the module. All counts are of what was seen since it was made, and all names of it are bounded."""

    endpoint: str
    seconds: float = 0.0
    links: Counter[str] = msgspec.field(default_factory=Counter)
    """What became of connections, in `kvevents.LinkEvent`'s words."""
    messages: int = 0
    """Live ones."""
    bad_frames: int = 0
    topics: Counter[str] = msgspec.field(default_factory=Counter)
    first_seq: int | None = None
    last_seq: int | None = None
    missing: int = 0
    """Numbers that were left out."""
    restarts: int = 0
    """How often numbers went back."""
    undecodable: Counter[str] = msgspec.field(default_factory=Counter)
    """Whole messages, by reason."""
    discards: Counter[str] = msgspec.field(default_factory=Counter)
    """Single events, by reason."""
    shapes: Counter[str] = msgspec.field(default_factory=Counter)
    """Events by shape: ``map``, ``array``, ``short array`` (without medium or adapter's name), ``packed``."""
    unknown_fields: Counter[str] = msgspec.field(default_factory=Counter)
    block_sizes: Counter[int] = msgspec.field(default_factory=Counter)
    lags: list[float] = msgspec.field(default_factory=list)
    """Seconds from the engine's time to ours, of live messages."""
    roots: list[BlockStored] = msgspec.field(default_factory=list)
    """The first stores at a prompt's start, of those that are not very long."""
    replay: ReplaySeen | None = None
    parents: list[int | bytes] = msgspec.field(default_factory=list)
    """Blocks that live stores follow."""
    names: set[int | bytes] = msgspec.field(default_factory=set)
    """Blocks that were announced, live or in the replay."""
    is_full: bool = False
    """Whether there were more of them than are remembered."""

    @property
    def lag(self) -> float | None:
        """The middle of all lags, None where nothing came."""
        return median(self.lags) if self.lags else None

    @property
    def orphans(self) -> int:
        """Live stores that follow a block nobody announced."""
        return sum(parent not in self.names for parent in self.parents)

    @property
    def pods(self) -> set[str]:
        """The pods that topics name."""
        return {parse_topic(topic.encode()).pod for topic in self.topics if topic.count("@") >= 2}

    @property
    def models(self) -> set[str]:
        """The models that topics name."""
        return {parse_topic(topic.encode()).model for topic in self.topics if topic.count("@") >= 2}

    def take(self, what: Heard | LinkChange) -> None:
        """Look at what a listener gave."""
        if isinstance(what, LinkChange):
            self.links[what.event] += 1
            return
        self.messages += 1
        if len(what.frames) != 3 or len(what.frames[1]) != 8:
            self.bad_frames += 1
            return
        topic, number, payload = what.frames
        _count(self.topics, topic.decode(errors="replace")[: 4 * _MOST_TEXT])
        seq = int.from_bytes(number, "big")
        if self.last_seq is not None:
            self.restarts += seq <= self.last_seq
            self.missing += max(0, seq - self.last_seq - 1)
        self.first_seq = seq if self.first_seq is None else self.first_seq
        self.last_seq = seq
        ts = self._study(payload, is_live=True)
        if ts is not None and len(self.lags) < _MOST_LAGS:
            self.lags.append(what.arrival - ts)

    def take_replay(self, endpoint: str, answer: ReplayAnswer) -> None:
        """Look at what a replay socket answered."""
        self.replay = ReplaySeen(
            endpoint,
            answer.received,
            answer.first,
            answer.last,
            answer.is_complete,
            answer.is_reached,
            len(answer.messages),
        )
        if answer.topic is not None:
            _count(self.topics, answer.topic.decode(errors="replace")[: 4 * _MOST_TEXT])
        for _, payload in answer.messages:
            self._study(payload, is_live=False)

    def _study(self, payload: bytes, *, is_live: bool) -> float | None:
        try:
            batch = decode_batch(payload)
            raw = msgspec.msgpack.decode(payload)
        except (DecodeError, msgspec.DecodeError, RecursionError) as error:
            self.undecodable[error.reason if isinstance(error, DecodeError) else "bad_msgpack"] += 1
            return None
        self.discards.update(batch.discards)
        for item in raw["events"] if isinstance(raw, dict) else raw[1]:
            self._shape(item)
        for event in batch.events:
            if isinstance(event, BlockStored):
                self._store(event, is_live=is_live)
        return batch.ts

    def _store(self, event: BlockStored, *, is_live: bool) -> None:
        if event.block_size:
            _count(self.block_sizes, event.block_size)
        if len(self.names) < _MOST_HASHES:
            self.names.update(event.block_hashes)
        else:
            self.is_full = True
        if is_live and event.parent_block_hash is not None and len(self.parents) < _MOST_HASHES:
            self.parents.append(event.parent_block_hash)
        is_short = len(event.token_ids) <= _MOST_TOKENS
        if event.parent_block_hash is None and is_short and len(self.roots) < _MOST_ROOTS:
            self.roots.append(event)

    def _shape(self, item: Any) -> None:  # noqa: ANN401  (off the wire)
        if isinstance(item, dict):
            self.shapes["map"] += 1
            for key in item.keys() - _KNOWN_KEYS:
                _count(self.unknown_fields, str(key)[:_MOST_TEXT])
        elif isinstance(item, list) and item:
            fields = len(item) - 1
            is_stored = item[0] == "BlockStored"
            self.shapes["short array" if is_stored and fields < 7 else "array"] += 1
            most = _STORED_FIELDS if is_stored else _REMOVED_FIELDS
            if fields > most:
                _count(self.unknown_fields, f"item {most + 1} of {str(item[0])[:_MOST_TEXT]}")
        elif isinstance(item, bytes):
            self.shapes["packed"] += 1


def _count(counter: Counter[_T], name: _T) -> None:
    """Count a name that came off the wire: only so many different ones are remembered."""
    if name in counter or len(counter) < _MOST_NAMES:
        counter[name] += 1
