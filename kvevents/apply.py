"""From one message to the index: decode it, read its number, say who it is from, apply its events."""

from collections import Counter
from typing import cast

from structlog.typing import FilteringBoundLogger

from indexer import AllBlocksCleared, BlockStored, Copies, Index, LimitReached, Source
from kvevents.errors import DecodeError
from kvevents.message import FLEET_WIDE, Message, parse_topic
from kvevents.stream import Stream, Verdict
from kvevents.wire import Batch, decode_batch

NO_EVENTS_YET = "no events yet: nothing was received from this source"
MISSED_START = "gap: what the engine announced before we listened is unknown"
GAP = "gap: messages were lost"

_HEALED = frozenset({Verdict.FIRST, Verdict.RESTART})
_UNKNOWN_PAST = frozenset({Verdict.LATE, Verdict.RESTART_LATE})


class Applier:
    """Applies the messages of one shard. One thread at a time."""

    def __init__(self, index: Index, *, model: str, copies: Copies, log: FilteringBoundLogger) -> None:
        self._index = index
        self._model = model
        self._copies: Copies = copies
        self._log = log
        self._streams: dict[tuple[str, Source], Stream] = {}
        self._registered: set[Source] = set()
        self.counters: Counter[str] = Counter()
        self.sequences: dict[Source, int] = {}

    def apply(self, message: Message) -> None:
        """Apply one message. What cannot be used is counted and logged, never raised."""
        try:
            batch = decode_batch(message.payload)
        except DecodeError as error:
            self._discard(message, error.reason, str(error))
            return
        pod = message.pod or parse_topic(message.topic).pod
        if not pod:
            self._discard(message, "no_identity", "empty topic, and the endpoint was not subscribed for a pod")
            return
        source = Source(pod, batch.rank or 0)
        if source not in self._registered and not self._register(source, message, batch):
            return
        for reason, count in batch.discards.items():
            self.counters[f"dropped_event_{reason}_total"] += count
        if batch.discards:
            self._log.warning("events_discarded", pod=pod, seq=message.seq, reasons=dict(batch.discards))
        self._follow(source, message)
        self._index.apply(source, batch.events)
        self.counters["events_total"] += len(batch.events)
        if any(type(event) is AllBlocksCleared for event in batch.events):
            self._index.degrade(source, "")  # an empty cache is a known one
        self.sequences[source] = message.seq
        self.counters["applied_total"] += 1

    def _follow(self, source: Source, message: Message) -> None:
        key = (message.endpoint, source)
        stream = self._streams.get(key)
        if stream is None:
            # storage connectors number their messages from 1 (WIRE B4)
            stream = self._streams[key] = Stream(first=1 if source.pod in FLEET_WIDE else 0)
        verdict = stream.observe(message.seq)
        if verdict is Verdict.NEXT:
            return
        if verdict is Verdict.GAP:
            self.counters["gaps_total"] += 1
            self.counters["missing_total"] += stream.missing
            self._log.warning("gap", pod=source.pod, rank=source.rank, missing=stream.missing, seq=message.seq)
            self._index.degrade(source, GAP)
            return
        if verdict in (Verdict.RESTART, Verdict.RESTART_LATE):
            self.counters["restarts_total"] += 1
            self._log.info("restart", pod=source.pod, rank=source.rank, seq=message.seq)
            self._index.restart(source)
        if verdict in _UNKNOWN_PAST:
            self._index.degrade(source, MISSED_START)
        elif verdict in _HEALED:
            self._index.degrade(source, "")

    def _register(self, source: Source, message: Message, batch: Batch) -> bool:
        named = next((event.model for event in batch.events if isinstance(event, BlockStored) and event.model), None)
        model = message.model or parse_topic(message.topic).model or named or self._model
        if not model:
            self._log.warning(
                "no_model",
                pod=source.pod,
                remedy="name the model where the pod is subscribed, or in the pool: scores are asked for by model",
            )
        copies = cast("Copies", message.copies or self._copies)
        try:
            self._index.register(source, model=model, copies=copies, fleet_wide=source.pod in FLEET_WIDE)
        except LimitReached as error:
            self._discard(message, "too_many_sources", str(error))
            return False
        self._registered.add(source)
        return True

    def forget(self, pod: str) -> None:
        """Forget a pod's blocks and sequence numbers."""
        self._registered = {source for source in self._registered if source.pod != pod}
        self._streams = {key: stream for key, stream in self._streams.items() if key[1].pod != pod}
        self.sequences = {source: seq for source, seq in self.sequences.items() if source.pod != pod}
        self._index.forget(pod)

    def _discard(self, message: Message, reason: str, detail: str) -> None:
        count = self.counters[f"dropped_{reason}_total"] = self.counters[f"dropped_{reason}_total"] + 1
        # a broken publisher repeats itself: say it at 1, 2, 4, 8, ... times
        if count & (count - 1) == 0:
            self._log.warning(
                "message_discarded",
                topic=message.topic[:80],
                seq=message.seq,
                reason=reason,
                detail=detail,
                times=count,
            )
