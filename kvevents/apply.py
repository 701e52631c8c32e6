"""From messages to the index: decode them, read their numbers, say who they are from, apply their events."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, cast

from structlog.typing import FilteringBoundLogger

from indexer import Copies, Decoded, Index, IndexerError, LimitReached, Source
from kvevents.errors import DecodeError
from kvevents.message import FLEET_WIDE, Message, parse_topic
from kvevents.stream import Stream, Verdict
from kvevents.wire import decode_batches

NO_EVENTS_YET = "no events yet: nothing was received from this source"
MISSED_START = "gap: what the engine announced before we listened is unknown"
GAP = "gap: messages were lost"
FAILED = "error: events could not be applied"

_NEXT = Verdict.NEXT
_HEALED = frozenset({Verdict.FIRST, Verdict.RESTART})
_UNKNOWN_PAST = frozenset({Verdict.LATE, Verdict.RESTART_LATE})


class _Flow(NamedTuple):
    """What one publisher says of one source."""

    source: Source
    stream: Stream


class Applier:
    """Applies the messages of one shard. One thread at a time."""

    def __init__(self, index: Index, *, model: str, copies: Copies, log: FilteringBoundLogger) -> None:
        self._index = index
        self._model = model
        self._copies: Copies = copies
        self._log = log
        self._flows: dict[tuple[str, str, int], _Flow] = {}
        self.counters: Counter[str] = Counter()
        self.sequences: dict[Source, int] = {}

    def apply(self, messages: Sequence[Message]) -> None:
        """Apply messages in order. What cannot be used is counted and logged, never raised.

        Batches that simply follow each other go to the index together: the more at once, the cheaper each.
        """
        due: list[Decoded] = []
        source: Source | None = None
        seq = 0
        decoded = decode_batches([message.payload for message in messages], self._index)
        for message, batch in zip(messages, decoded, strict=True):
            if isinstance(batch, DecodeError):
                self._discard(message, batch.reason, str(batch))
                continue
            key = (message.endpoint, message.pod or parse_topic(message.topic).pod, batch.rank or 0)
            flow = self._flows.get(key) or self._begin(key, message, batch)
            if flow is None:
                continue
            verdict = flow.stream.observe(message.seq)
            if source is not None and (verdict is not _NEXT or flow.source is not source):
                self._hand_over(source, due, seq)
                due = []
            source, seq = flow.source, message.seq
            if verdict is not _NEXT:
                self._follow(source, flow.stream, verdict, seq)
            if batch.discards:
                self._note_discards(source, batch, seq)
            due.append(batch)
            if batch.clears:
                self._hand_over(source, due, seq)
                self._index.degrade(source, "")  # an empty cache is a known one
                due = []
        if source is not None:
            self._hand_over(source, due, seq)

    def distrust(self, messages: Sequence[Message]) -> None:
        """Call the sources of messages degraded that may not have been applied."""
        pods = {message.pod or parse_topic(message.topic).pod for message in messages}
        for source in {flow.source for flow in self._flows.values() if flow.source.pod in pods}:
            with suppress(IndexerError):  # it may have been forgotten meanwhile
                self._index.degrade(source, FAILED)

    def _hand_over(self, source: Source, due: list[Decoded], seq: int) -> None:
        if due:
            events = [batch.events for batch in due]
            self._index.apply_all(source, events, last_seq=seq)
            self.counters["events_total"] += sum(map(len, events))
            self.counters["applied_total"] += len(due)
            self.sequences[source] = seq

    def _begin(self, key: tuple[str, str, int], message: Message, batch: Decoded) -> _Flow | None:
        pod = key[1]
        if not pod:
            self._discard(message, "no_identity", "empty topic, and the endpoint was not subscribed for a pod")
            return None
        known = (flow.source for flow in self._flows.values() if flow.source == key[1:])
        source = next(known, None) or self._register(Source(*key[1:]), message, batch)
        if source is None:
            return None
        # storage connectors number their messages from 1 (WIRE B4)
        flow = self._flows[key] = _Flow(source, Stream(first=1 if pod in FLEET_WIDE else 0))
        return flow

    def _follow(self, source: Source, stream: Stream, verdict: Verdict, seq: int) -> None:
        """Say to the index what a number other than the one that was due means."""
        if verdict is Verdict.GAP:
            self.counters["gaps_total"] += 1
            self.counters["missing_total"] += stream.missing
            self._log.warning("gap", pod=source.pod, rank=source.rank, missing=stream.missing, seq=seq)
            self._index.degrade(source, GAP)
            return
        if verdict in (Verdict.RESTART, Verdict.RESTART_LATE):
            self.counters["restarts_total"] += 1
            self._log.info("restart", pod=source.pod, rank=source.rank, seq=seq)
            self._index.restart(source)
        if verdict in _UNKNOWN_PAST:
            self._index.degrade(source, MISSED_START)
        elif verdict in _HEALED:
            self._index.degrade(source, "")

    def _register(self, source: Source, message: Message, batch: Decoded) -> Source | None:
        model = message.model or parse_topic(message.topic).model or batch.model or self._model
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
            return None
        return source

    def forget(self, pod: str, *, keep: bool) -> None:
        """Forget a pod's sequence numbers, and its blocks unless they are to be kept for somebody else."""
        self._flows = {key: flow for key, flow in self._flows.items() if flow.source.pod != pod}
        self.sequences = {source: seq for source, seq in self.sequences.items() if source.pod != pod}
        if keep:
            self._index.release(pod)
        else:
            self._index.forget(pod)

    def _note_discards(self, source: Source, batch: Decoded, seq: int) -> None:
        for reason, count in batch.discards.items():
            self.counters[f"dropped_event_{reason}_total"] += count
        self._log.warning("events_discarded", pod=source.pod, seq=seq, reasons=dict(batch.discards))

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
