"""From messages to the index: decode them, read their numbers, say who they are from, apply their events."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, cast

from structlog.typing import FilteringBoundLogger

from indexer import Copies, Decoded, Index, IndexerError, LimitReached, Source
from kvevents.errors import DecodeError
from kvevents.message import FLEET_WIDE, Message, Publisher, parse_topic
from kvevents.stream import Stream, Verdict
from kvevents.wire import decode_batches, name_errors

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
        self._flows: dict[Publisher, dict[int, _Flow]] = {}
        self.counters: Counter[str] = Counter()
        self.sequences: dict[Source, int] = {}

    def apply(self, publisher: Publisher, messages: Sequence[Message]) -> None:
        """Apply messages of a publisher in order. What cannot be used is counted and logged, never raised.

        Batches that simply follow each other go to the index together: the more at once, the cheaper each.
        """
        if publisher not in self._flows:
            self._apply_each(publisher, messages[:1], self._decode(messages[:1]))
            messages = messages[1:]  # what is known now may be all that the others need
        if messages:
            applied, decoded = self._apply_plain(publisher, messages)
            self._apply_each(publisher, messages[applied:], decoded)

    def _apply_each(
        self, publisher: Publisher, messages: Sequence[Message], decoded: Sequence[Decoded | DecodeError]
    ) -> None:
        due: list[Decoded] = []
        source: Source | None = None
        seq = 0
        for message, batch in zip(messages, decoded, strict=True):
            if isinstance(batch, DecodeError):
                self._discard(message, batch.reason, str(batch))
                continue
            flows = self._flows.get(publisher, {})
            flow = flows.get(batch.rank or 0) or self._begin(publisher, message, batch)
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

    def _apply_plain(
        self, publisher: Publisher, messages: Sequence[Message]
    ) -> tuple[int, Sequence[Decoded | DecodeError]]:
        """Do what `_apply_each` does for messages that only go on; give how many, and the batches of the others.

        Nearly all only go on. The index reads these itself: little of their time is under the interpreter lock.
        """
        decoder, flows = self._index.decoder, self._flows.get(publisher, {})
        if decoder is None or len(flows) != 1:
            return 0, self._decode(messages)
        ((source, stream),) = flows.values()
        seqs = [message.seq for message in messages]
        if not stream.goes_on(seqs):
            return 0, self._decode(messages)
        applied, events, rest = decoder.apply_payloads(source, [message.payload for message in messages], seqs[0])
        if applied:
            stream.last = seqs[applied - 1]
            self._note_applied(source, applied, events, stream.last)
        return applied, name_errors(rest)

    def _decode(self, messages: Sequence[Message]) -> list[Decoded | DecodeError]:
        return decode_batches([message.payload for message in messages], self._index)

    def distrust(self, pod: str) -> None:
        """Call the sources of a pod degraded whose messages may not have been applied."""
        for source in [source for source in self._sources() if source.pod == pod]:
            with suppress(IndexerError):  # it may have been forgotten meanwhile
                self._index.degrade(source, FAILED)

    def _hand_over(self, source: Source, due: list[Decoded], seq: int) -> None:
        if due:
            events = [batch.events for batch in due]
            self._index.apply_all(source, events, last_seq=seq)
            self._note_applied(source, len(due), sum(map(len, events)), seq)

    def _note_applied(self, source: Source, messages: int, events: int, seq: int) -> None:
        self.counters["events_total"] += events
        self.counters["applied_total"] += messages
        self.sequences[source] = seq

    def _sources(self) -> set[Source]:
        return {flow.source for flows in self._flows.values() for flow in flows.values()}

    def _begin(self, publisher: Publisher, message: Message, batch: Decoded) -> _Flow | None:
        source = Source(publisher.pod, batch.rank or 0)
        if not source.pod:
            self._discard(message, "no_identity", "empty topic, and the endpoint was not subscribed for a pod")
            return None
        if source not in self._sources() and not self._register(source, message, batch):
            return None
        # storage connectors number their messages from 1 (WIRE B4)
        flow = _Flow(source, Stream(first=1 if source.pod in FLEET_WIDE else 0))
        self._flows.setdefault(publisher, {})[source.rank] = flow
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

    def _register(self, source: Source, message: Message, batch: Decoded) -> bool:
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
            return False
        return True

    def forget(self, pod: str, *, keep: bool) -> None:
        """Forget a pod's sequence numbers, and its blocks unless they are to be kept for somebody else."""
        self._flows = {publisher: flows for publisher, flows in self._flows.items() if publisher.pod != pod}
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
