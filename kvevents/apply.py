"""From messages to the index: decode them, read their numbers, say who they are from, apply their events.

Messages are taken in the order in which they are given; what to do about those that are missing is `kvevents.shard`'s.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple, TypeAlias, cast

from structlog.typing import FilteringBoundLogger

from indexer import Copies, Decoded, Index, InvalidQuestion, LimitReached, Source
from kvevents.errors import DecodeError
from kvevents.hearing import LastHeard, Notes, last_heard
from kvevents.message import FLEET_WIDE, Message, Publisher, parse_topic
from kvevents.position import RankPosition
from kvevents.stream import Stream, Verdict
from kvevents.trust import GAP, MISSED_START, NO_EVENTS_YET, RECONNECTED, UNREAD, Trust
from kvevents.wire import batch_time, decode_batches, name_errors

_NEXT = Verdict.NEXT
_HEALED = frozenset({Verdict.FIRST, Verdict.RESTART})
_HARMLESS = {"unknown_event"}
"""Discards that say nothing of blocks: engines announce other things, too."""
_UNKNOWN_PAST = frozenset({Verdict.LATE, Verdict.RESTART_LATE})


OnGap: TypeAlias = Literal["keep", "drop"]
"""What to do with the blocks of a source of whose messages some are missing for good."""


class Flow(NamedTuple):
    """What one publisher says of one source."""

    source: Source
    stream: Stream
    notes: Notes


class Applied(NamedTuple):
    """What is to be known of messages that were applied."""

    is_spoiled: bool = False
    """Some could not be, or not all of it."""
    is_emptied: bool = False
    """Nothing that came before the last clear matters any more, and what came after it only went on."""


class Applier:
    """Applies messages to an index, those of each publisher in the order in which they are given.

    What their numbers mean for a source is judged here; whether missing ones can be had is for others (`Shard`).
    """

    def __init__(
        self, index: Index, *, model: str, copies: Copies, log: FilteringBoundLogger, on_gap: OnGap = "keep"
    ) -> None:
        self._index = index
        self._model = model
        self._copies: Copies = copies
        self._on_gap: OnGap = on_gap
        self._log = log
        self._anew: set[Publisher] = set()
        """Publishers that say all that their caches hold from their next message on."""
        self._spoke_at: dict[Publisher, float] = {}
        self._now = 0.0
        """When the messages came that are being applied."""
        self.flows: dict[Publisher, dict[int, Flow]] = {}
        """What each publisher speaks for, by rank."""
        self.trust = Trust(index, self.sources_of)
        self.counters: Counter[str] = Counter()
        self.sequences: dict[Source, int] = {}
        """The number applied last."""

    def apply(self, publisher: Publisher, messages: Sequence[Message]) -> Applied:
        """Apply messages of a publisher in order. What cannot be used is counted and logged, never raised.

        Batches that simply follow each other go to the index together: the more at once, the cheaper each.
        """
        self._now = time.monotonic()
        if publisher in self.flows:
            self._spoke_at[publisher] = self._now
        is_spoiled = False
        if publisher not in self.flows:
            first = self._apply_each(publisher, messages[:1], self._decode(messages[:1]))
            messages = messages[1:]  # what is known now may be all that the others need
            if not messages:
                return first
            is_spoiled = first.is_spoiled
        applied, decoded = self._apply_plain(publisher, messages)
        rest = self._apply_each(publisher, messages[applied:], decoded)
        return rest._replace(is_spoiled=True) if is_spoiled else rest

    def begin_anew(self, publisher: Publisher, counter: str) -> None:
        """Forget what a publisher said: its engine began anew, or says all of it again. `counter` counts it."""
        flows = self.flows.get(publisher, {})
        if not flows:
            self._anew.add(publisher)
        for flow in flows.values():
            self.counters[counter] += flow.stream.last is not None
            self._log.info("begins_anew", pod=flow.source.pod, rank=flow.source.rank)
            flow.stream.last = None
            with suppress(InvalidQuestion):  # it may have been forgotten meanwhile
                self._restart(flow.source)

    def drop(self, publisher: Publisher) -> None:
        """Forget what a publisher said that will hardly come back as the same engine."""
        for source in self.sources_of(publisher):
            self.trust.judge(publisher, source, NO_EVENTS_YET)
            with suppress(InvalidQuestion):
                self._restart(source)
        for flow in self.flows.get(publisher, {}).values():
            flow.stream.last = None
        self.trust.show(publisher)

    def resume(self, publisher: Publisher, ranks: Iterable[RankPosition]) -> None:
        """Go on with a publisher whose sources were loaded from a snapshot. What it said since is not known."""
        self._spoke_at[publisher] = time.monotonic()
        for rank in ranks:
            flow = Flow(Source(publisher.pod, rank.rank), Stream(first=first_of(publisher.pod)), Notes())
            self.flows.setdefault(publisher, {})[rank.rank] = flow
            flow.stream.last = rank.last
            if rank.last is not None:
                self.sequences[flow.source] = rank.last
            self.trust.judge(publisher, flow.source, RECONNECTED)

    def silences(self, endpoints: Collection[str]) -> dict[Publisher, float]:
        """Give for how many seconds the publishers that came by these endpoints have said nothing."""
        now = time.monotonic()
        return {publisher: now - at for publisher, at in self._spoke_at.items() if publisher.endpoint in endpoints}

    def forget(self, pod: str, *, keep: bool) -> None:
        """Forget a pod's sequence numbers, and its blocks unless they are to be kept for somebody else."""
        self.flows = {publisher: flows for publisher, flows in self.flows.items() if publisher.pod != pod}
        self.trust.forget(pod)
        self._spoke_at = {publisher: at for publisher, at in self._spoke_at.items() if publisher.pod != pod}
        self._anew = {publisher for publisher in self._anew if publisher.pod != pod}
        self.sequences = {source: seq for source, seq in self.sequences.items() if source.pod != pod}
        if keep:
            self._index.release(pod)
        else:
            self._index.forget(pod)

    def distrust(self, pod: str) -> None:
        """Call the sources of a pod degraded whose messages may not have been applied."""
        for source in [source for source in self.sources() if source.pod == pod]:
            self.trust.call_failed(source)

    def heard(self) -> dict[Source, LastHeard]:
        """Say when each source was heard. May be called from any thread."""
        flows = [
            (self._spoke_at.get(publisher, 0.0), list(known.values())) for publisher, known in self.flows.copy().items()
        ]
        # what was loaded from a snapshot was not heard yet
        return last_heard((flow.source, at, flow.notes) for at, some in flows for flow in some if flow.notes.messages)

    def sources(self) -> set[Source]:
        """Give all sources that anybody spoke for."""
        return {flow.source for flows in self.flows.values() for flow in flows.values()}

    def sources_of(self, publisher: Publisher) -> list[Source]:
        """Give the sources that a publisher speaks for."""
        flows = self.flows.get(publisher, {})
        if flows:
            return [flow.source for flow in flows.values()]
        source = Source(publisher.pod)  # as it was registered when it was subscribed, unless others speak for it
        return [] if source in self.sources() else [source]

    def _apply_each(
        self, publisher: Publisher, messages: Sequence[Message], decoded: Sequence[Decoded | DecodeError]
    ) -> Applied:
        due: list[Decoded] = []
        last: Flow | None = None
        seq = 0
        is_spoiled = is_emptied = is_live = False
        for message, batch in zip(messages, decoded, strict=True):
            if isinstance(batch, DecodeError):
                self._discard(message, batch.reason, str(batch))
                is_spoiled, is_emptied = True, False
                continue
            flows = self.flows.get(publisher, {})
            flow = flows.get(batch.rank or 0) or self._begin(publisher, message, batch)
            if flow is None:
                continue
            verdict = flow.stream.observe(message.seq)
            if last is not None and (verdict is not _NEXT or flow is not last):
                self._hand_over(last, due, seq, is_live=is_live)
                due = []
            last, seq, is_live = flow, message.seq, not message.replay
            if verdict is not _NEXT:
                is_emptied = False
                self._follow(publisher, flow, verdict, seq)
            due.append(batch)
            if batch.clears:
                self._hand_over(flow, due, seq, is_live=is_live)
                self.trust.renew(flow.source)
                self.trust.judge(publisher, flow.source, "")  # an empty cache is a known one
                is_emptied = True
                due = []
            if batch.discards:
                self._note_discards(publisher, flow.source, batch, seq)
        if last is not None:
            self._hand_over(last, due, seq, is_live=is_live)
        return Applied(is_spoiled, is_emptied)

    def _apply_plain(
        self, publisher: Publisher, messages: Sequence[Message]
    ) -> tuple[int, Sequence[Decoded | DecodeError]]:
        """Do what `_apply_each` does for messages that only go on; give how many, and the batches of the others.

        Nearly all only go on. The index reads these itself: little of their time is under the interpreter lock.
        """
        decoder, flows = self._index.decoder, self.flows.get(publisher, {})
        if decoder is None or len(flows) != 1:
            return 0, self._decode(messages)
        ((source, stream, notes),) = flows.values()
        seqs = [message.seq for message in messages]
        if not stream.goes_on(seqs):
            return 0, self._decode(messages)
        applied, events, rest = decoder.apply_payloads(source, [message.payload for message in messages], seqs[0])
        if applied:
            stream.last = seqs[applied - 1]
            self._note_applied(source, applied, events, stream.last)
            notes.messages += applied
            if self._now >= notes.due and not messages[applied - 1].replay:
                notes.sample(self._now, batch_time(messages[applied - 1].payload))
        return applied, name_errors(rest)

    def _decode(self, messages: Sequence[Message]) -> list[Decoded | DecodeError]:
        return decode_batches([message.payload for message in messages], self._index)

    def _hand_over(self, flow: Flow, due: list[Decoded], seq: int, *, is_live: bool) -> None:
        if due:
            events = [batch.events for batch in due]
            self._index.apply_all(flow.source, events, last_seq=seq)
            self._note_applied(flow.source, len(due), sum(map(len, events)), seq)
            flow.notes.messages += len(due)
            if is_live and self._now >= flow.notes.due:
                flow.notes.sample(self._now, due[-1].ts)

    def _note_applied(self, source: Source, messages: int, events: int, seq: int) -> None:
        self.counters["events_total"] += events
        self.counters["applied_total"] += messages
        self.sequences[source] = seq

    def _begin(self, publisher: Publisher, message: Message, batch: Decoded) -> Flow | None:
        source = Source(publisher.pod, batch.rank or 0)
        if not source.pod:
            self._discard(message, "no_identity", "empty topic, and the endpoint was not subscribed for a pod")
            return None
        if source.rank:
            self._forget_guess(source.pod)
        if source not in self.sources() and not self._register(source, message, batch):
            return None
        if publisher in self._anew:
            self._anew.discard(publisher)
            if any(status.blocks for status in self._index.sources() if status.source == source):
                self._restart(source)
        flow = Flow(source, Stream(first=first_of(source.pod)), Notes())
        self.flows.setdefault(publisher, {})[source.rank] = flow
        self._spoke_at[publisher] = self._now
        return flow

    def _forget_guess(self, pod: str) -> None:
        """Forget that a pod was taken to have a rank 0 before any of its ranks spoke."""
        if any(source.pod == pod for source in self.sources()):
            return
        known = [status for status in self._index.sources() if status.source.pod == pod]
        if [status.source for status in known] == [Source(pod)] and known[0].last_seq is None:
            self._index.forget(pod)

    def _follow(self, publisher: Publisher, flow: Flow, verdict: Verdict, seq: int) -> None:
        """Say to the index what a number other than the one that was due means."""
        source, stream, notes = flow
        if verdict is Verdict.GAP:
            self.counters["gaps_total"] += 1
            notes.gaps += 1
            self.counters["missing_total"] += stream.missing
            self._log.warning("gap", pod=source.pod, rank=source.rank, missing=stream.missing, seq=seq)
            if self._on_gap == "drop":
                self._restart(source)
            self.trust.judge(publisher, source, GAP)
            return
        if verdict in (Verdict.RESTART, Verdict.RESTART_LATE):
            self.counters["restarts_total"] += 1
            self._log.info("restart", pod=source.pod, rank=source.rank, seq=seq)
            self._restart(source)
        if verdict in _UNKNOWN_PAST:
            self.trust.judge(publisher, source, MISSED_START)
        elif verdict in _HEALED:
            self.trust.judge(publisher, source, "")

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

    def _restart(self, source: Source) -> None:
        self.trust.renew(source)
        self._index.restart(source)

    def _note_discards(self, publisher: Publisher, source: Source, batch: Decoded, seq: int) -> None:
        if batch.discards.keys() - _HARMLESS:
            self.trust.judge(publisher, source, UNREAD)
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


def first_of(pod: str) -> int:
    """Give the number of a publisher's first message: storage connectors number theirs from 1 (WIRE B4)."""
    return 1 if pod in FLEET_WIDE else 0
