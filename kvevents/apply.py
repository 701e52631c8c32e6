"""From messages to the index: decode them, read their numbers, say who they are from, apply their events."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias, cast

from structlog.typing import FilteringBoundLogger

from indexer import Copies, Decoded, Index, InvalidQuestion, LimitReached, Source
from kvevents.errors import DecodeError
from kvevents.hearing import LastHeard, Notes, last_heard
from kvevents.message import FLEET_WIDE, Message, Note, Publisher, parse_topic
from kvevents.position import PodPosition, PublisherPosition, RankPosition
from kvevents.recovery import Action, Ask, Begin, Deliver, Doubt, Recovery, Whole
from kvevents.stream import Stream, Verdict
from kvevents.trust import ASKED_AGAIN, GAP, MISSED_START, NO_EVENTS_YET, RECONNECTED, RESTORED, UNSURE, Trust
from kvevents.wire import batch_time, decode_batches, name_errors

_NEXT = Verdict.NEXT
_HEALED = frozenset({Verdict.FIRST, Verdict.RESTART})
_UNKNOWN_PAST = frozenset({Verdict.LATE, Verdict.RESTART_LATE})


OnGap: TypeAlias = Literal["keep", "drop"]
"""What to do with the blocks of a source of whose messages some are missing for good."""

AskAgain: TypeAlias = Callable[[Publisher, int, int], None]
"""Asks a publisher for a replay, by its number, from a number of a message on. It must not wait."""


class _Flow(NamedTuple):
    """What one publisher says of one source."""

    source: Source
    stream: Stream
    notes: Notes


class Applier:
    """Applies the messages of one shard. One thread at a time."""

    def __init__(
        self,
        index: Index,
        *,
        model: str,
        copies: Copies,
        log: FilteringBoundLogger,
        on_gap: OnGap = "keep",
        ask: AskAgain | None = None,
    ) -> None:
        self._index = index
        self._on_gap: OnGap = on_gap
        self._ask = ask
        self._recoveries: dict[Publisher, Recovery] = {}
        self._trust = Trust(index, self._sources_of)
        self._unreachable: dict[Publisher, bool] = {}
        """Publishers that cannot be reached, and whether what they said is forgotten."""
        self._heard: dict[Publisher, float] = {}
        """When a publisher spoke last."""
        self._now = 0.0
        """When the messages came that are being applied."""
        self._restored: dict[Publisher, PublisherPosition] = {}
        """Publishers that were loaded from a snapshot and not followed since."""
        self._restored_at = 0.0
        self._anew: set[Publisher] = set()
        """Publishers that say all that their caches hold from their next message on."""
        self._model = model
        self._copies: Copies = copies
        self._log = log
        self._flows: dict[Publisher, dict[int, _Flow]] = {}
        self.counters: Counter[str] = Counter()
        self.sequences: dict[Source, int] = {}

    def apply(self, publisher: Publisher, messages: Sequence[Message]) -> None:
        """Apply messages of a publisher in order. What cannot be used is counted and logged, never raised.

        Where its messages can be asked for again, those that are missing are, and what came after them waits.
        """
        recovery = self._recoveries.get(publisher)
        if recovery is None:
            self._apply_unaided(publisher, messages)
            return
        now = time.monotonic()
        is_live = not any(message.replay or message.note for message in messages)
        if is_live and recovery.goes_on(messages, now):
            self._apply(publisher, messages)
            return
        for (replay, note), some in groupby(messages, lambda message: (message.replay, message.note)):
            if note is Note.CONNECTED:
                actions = recovery.connected(now)
            elif note is Note.ENDED:
                actions = recovery.ended(replay, now)
            elif note is Note.FAILED:
                actions = recovery.failed(replay, now)
            else:
                come, before = list(some), recovery.recovered
                actions = recovery.replayed(replay, come, now) if replay else recovery.live(come, now)
                self.counters["recovered_total"] += recovery.recovered - before
            self._act(publisher, recovery, actions)

    def _apply_unaided(self, publisher: Publisher, messages: Sequence[Message]) -> None:
        """Apply messages that cannot be asked for again.

        After a new connection their numbers prove nothing: an engine that began anew may have overtaken the old ones.
        """
        if all(message.note is None for message in messages):
            self._apply(publisher, messages)
            return
        for note, some in groupby(messages, lambda message: message.note):
            if note is None:
                self._apply(publisher, list(some))
                continue
            for flow in self._flows.get(publisher, {}).values():
                if flow.stream.last is not None:
                    self._trust.judge(publisher, flow.source, RECONNECTED)

    def follow(self, publisher: Publisher, *, replays: bool, model: str = "") -> None:
        """Hear that a publisher is subscribed, of a `model` if that is known, and whether its messages can be asked for
        again.

        One that was loaded from a snapshot goes on from there. Where the pod is another one by now, what was loaded of
        it is forgotten.
        """
        restored = self._restored.get(publisher)
        mine = {known for known in self._restored if known.pod == publisher.pod}
        is_another = restored is None or (model and restored.model != model)
        if mine and is_another and mine >= self._publishers(publisher.pod):
            self.forget(publisher.pod, keep=False)
        restored = self._restored.pop(publisher, None)
        if replays:
            position = restored.position if restored else None
            self._recoveries[publisher] = Recovery(_first_of(publisher.pod), position)
            if restored and position:
                for rank in restored.ranks:
                    self._trust.judge(publisher, Source(publisher.pod, rank.rank), rank.verdict)
                return  # behind, until it was asked
        self._trust.call_behind(publisher, "")

    def positions(self, pod: str, models: Mapping[Source, str]) -> PodPosition:
        """Say how far the publishers of a pod were followed. `models` names those of sources."""
        known = self._publishers(pod) | {publisher for publisher in self._restored if publisher.pod == pod}
        return PodPosition(pod, [self._position(publisher, models) for publisher in sorted(known)])

    def _position(self, publisher: Publisher, models: Mapping[Source, str]) -> PublisherPosition:
        flows = self._flows.get(publisher, {})
        position = self._recoveries[publisher].position if publisher in self._recoveries else None
        verdicts = {flow.source: self._trust.verdict(flow.source) for flow in flows.values()}
        if publisher in self._restored and self._restored[publisher].position:
            position = self._restored[publisher].position
            verdicts |= {Source(publisher.pod, rank.rank): rank.verdict for rank in self._restored[publisher].ranks}
        return PublisherPosition(
            publisher.endpoint,
            next((models.get(flow.source, "") for flow in flows.values()), ""),
            [RankPosition(rank, flow.stream.last, verdicts[flow.source]) for rank, flow in sorted(flows.items())],
            *(position or ()),
        )

    def restore(self, pod: PodPosition) -> None:
        """Go on with a pod whose sources were loaded from a snapshot, from where it was followed.

        Until it is known what was said since, none of them counts as exact.
        """
        self._restored_at = now = time.monotonic()
        for known in pod.publishers:
            publisher = Publisher(pod.pod, known.endpoint)
            self._restored[publisher] = known
            self._heard[publisher] = now
            flows = {}
            for rank in known.ranks:
                stream = Stream(first=_first_of(pod.pod))
                flow = flows[rank.rank] = _Flow(Source(pod.pod, rank.rank), stream, Notes())
                flow.stream.last = rank.last
                if rank.last is not None:
                    self.sequences[flow.source] = rank.last
            if flows:
                self._flows[publisher] = flows
            for flow in flows.values():
                self._trust.judge(publisher, flow.source, RECONNECTED)
            if known.position is not None:
                self._trust.call_behind(publisher, RESTORED)

    def catching_up(self) -> set[str]:
        """Give the pods of which it is not known yet what they said: since their snapshot, or at all."""
        return {
            publisher.pod
            for publisher, recovery in list(self._recoveries.items())
            if recovery.is_behind and publisher not in self._unreachable
        }

    def not_followed(self, endpoints: Collection[str]) -> dict[Publisher, float]:
        """Give the publishers that were loaded from a snapshot, and for how many seconds nobody has subscribed them.

        Those that come by these endpoints are not subscribed.
        """
        since = time.monotonic() - self._restored_at
        return {publisher: since for publisher in self._restored if publisher.endpoint not in endpoints}

    @property
    def is_recovering(self) -> bool:
        """Whether messages wait for others that were asked for again."""
        return any(recovery.is_active for recovery in list(self._recoveries.values()))

    @property
    def dropped_held(self) -> int:
        """Messages that waited for others and had to go."""
        return sum(recovery.dropped for recovery in list(self._recoveries.values()))

    def tick(self) -> None:
        """Ask again for what may be missing without a word, and give up what does not come."""
        now = time.monotonic()
        for publisher, recovery in self._recoveries.items():
            self._act(publisher, recovery, recovery.tick(now))

    def _act(self, publisher: Publisher, recovery: Recovery, actions: Sequence[Action]) -> None:
        """Do what recovery says. As long as a source is behind it is called that, whatever its messages' numbers
        say.
        """
        if recovery.is_behind:
            self._trust.call_behind(publisher, RESTORED if recovery.is_restored else ASKED_AGAIN)
        for action in actions:
            match action:
                case Deliver(messages):
                    self._apply(publisher, messages)
                case Ask(replay, start):
                    if self._ask is not None:
                        self._ask(publisher, replay, start)
                case Begin(is_restart):
                    self._begin_anew(publisher, "restarts_total" if is_restart else "rebuilds_total")
                case Doubt() | Whole():
                    for source in self._sources_of(publisher):
                        self._trust.judge(publisher, source, UNSURE if isinstance(action, Doubt) else "")
        if not recovery.is_behind:
            self._trust.call_behind(publisher, "")

    def _begin_anew(self, publisher: Publisher, counter: str) -> None:
        """Forget what a publisher said: its engine began anew, or says all of it again."""
        flows = self._flows.get(publisher, {})
        if not flows:
            self._anew.add(publisher)
        for flow in flows.values():
            self.counters[counter] += flow.stream.last is not None
            self._log.info("begins_anew", pod=flow.source.pod, rank=flow.source.rank)
            flow.stream.last = None
            with suppress(InvalidQuestion):  # it may have been forgotten meanwhile
                self._index.restart(flow.source)

    def _sources_of(self, publisher: Publisher) -> list[Source]:
        flows = self._flows.get(publisher, {})
        if flows:
            return [flow.source for flow in flows.values()]
        source = Source(publisher.pod)  # as it was registered when it was subscribed, unless others speak for it
        return [] if source in self._sources() else [source]

    def hear_unreachable(self, unreachable: Mapping[Publisher, float], visitors: Collection[str]) -> None:
        """Hear which publishers cannot be reached, and for how long: 1 is when they stop being scored, 2 when what they
        hold is forgotten. All others can be reached.

        `visitors` are endpoints that are not subscribed: pods connect to them, or nobody follows them any more. Of
        those nothing is kept, as they may never come again.
        """
        for publisher, long in unreachable.items():
            if long >= 1 and publisher not in self._unreachable:
                self._unreachable[publisher] = False
                self.counters["unreachable_total"] += 1
                self._log.warning("unreachable", pod=publisher.pod, endpoint=publisher.endpoint)
                self._trust.call_unreachable(publisher, is_so=True)
            if long >= 2 and not self._unreachable[publisher]:
                self._unreachable[publisher] = True
                self._log.info("forgotten", pod=publisher.pod, endpoint=publisher.endpoint)
                self.counters["forgotten_total"] += 1
                if publisher.endpoint in visitors and all(
                    other == publisher or self._unreachable.get(other) for other in self._publishers(publisher.pod)
                ):
                    self.forget(publisher.pod, keep=False)
                else:
                    self._forget_unreachable(publisher)
        for publisher in [publisher for publisher in self._unreachable if unreachable.get(publisher, 0.0) < 1]:
            del self._unreachable[publisher]
            self._log.info("reachable", pod=publisher.pod, endpoint=publisher.endpoint)
            self._trust.call_unreachable(publisher, is_so=False)

    def _forget_unreachable(self, publisher: Publisher) -> None:
        """Forget what a publisher said that will hardly come back as the same engine."""
        self._trust.call_behind(publisher, "")
        if publisher in self._recoveries:
            self._recoveries[publisher] = Recovery(_first_of(publisher.pod))
        for source in self._sources_of(publisher):
            self._trust.judge(publisher, source, NO_EVENTS_YET)
            with suppress(InvalidQuestion):
                self._index.restart(source)
        for flow in self._flows.get(publisher, {}).values():
            flow.stream.last = None
        self._trust.show(publisher)

    def _publishers(self, pod: str) -> set[Publisher]:
        return {publisher for publisher in [*self._flows, *self._recoveries] if publisher.pod == pod}

    def silences(self, endpoints: Collection[str]) -> dict[Publisher, float]:
        """Give for how many seconds the publishers that came by these endpoints have said nothing."""
        now = time.monotonic()
        return {publisher: now - at for publisher, at in self._heard.items() if publisher.endpoint in endpoints}

    def _apply(self, publisher: Publisher, messages: Sequence[Message]) -> None:
        """Apply messages in order.

        Batches that simply follow each other go to the index together: the more at once, the cheaper each.
        """
        self._heard[publisher] = self._now = time.monotonic()
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
        last: _Flow | None = None
        seq = 0
        is_emptied = is_live = False
        for message, batch in zip(messages, decoded, strict=True):
            if isinstance(batch, DecodeError):
                self._discard(message, batch.reason, str(batch))
                if publisher in self._recoveries:
                    self._recoveries[publisher].spoiled(time.monotonic())
                continue
            flows = self._flows.get(publisher, {})
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
            if batch.discards:
                self._note_discards(flow.source, batch, seq)
            due.append(batch)
            if batch.clears:
                self._hand_over(flow, due, seq, is_live=is_live)
                self._trust.judge(publisher, flow.source, "")  # an empty cache is a known one
                is_emptied = True
                due = []
        if last is not None:
            self._hand_over(last, due, seq, is_live=is_live)
        if is_emptied and publisher in self._recoveries:
            self._recoveries[publisher].emptied()

    def _apply_plain(
        self, publisher: Publisher, messages: Sequence[Message]
    ) -> tuple[int, Sequence[Decoded | DecodeError]]:
        """Do what `_apply_each` does for messages that only go on; give how many, and the batches of the others.

        Nearly all only go on. The index reads these itself: little of their time is under the interpreter lock.
        """
        decoder, flows = self._index.decoder, self._flows.get(publisher, {})
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

    def distrust(self, pod: str) -> None:
        """Call the sources of a pod degraded whose messages may not have been applied."""
        for publisher, recovery in self._recoveries.items():
            if publisher.pod == pod:
                recovery.spoiled(time.monotonic())
        for source in [source for source in self._sources() if source.pod == pod]:
            self._trust.call_failed(source)

    def _hand_over(self, flow: _Flow, due: list[Decoded], seq: int, *, is_live: bool) -> None:
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

    def heard(self) -> dict[Source, LastHeard]:
        """Say when each source was heard. May be called from any thread."""
        flows = [
            (self._heard.get(publisher, 0.0), list(known.values())) for publisher, known in self._flows.copy().items()
        ]
        # what was loaded from a snapshot was not heard yet
        return last_heard((flow.source, at, flow.notes) for at, some in flows for flow in some if flow.notes.messages)

    def _sources(self) -> set[Source]:
        return {flow.source for flows in self._flows.values() for flow in flows.values()}

    def _begin(self, publisher: Publisher, message: Message, batch: Decoded) -> _Flow | None:
        source = Source(publisher.pod, batch.rank or 0)
        if not source.pod:
            self._discard(message, "no_identity", "empty topic, and the endpoint was not subscribed for a pod")
            return None
        if source not in self._sources() and not self._register(source, message, batch):
            return None
        if publisher in self._anew:
            self._anew.discard(publisher)
            if any(status.blocks for status in self._index.sources() if status.source == source):
                self._index.restart(source)
        flow = _Flow(source, Stream(first=_first_of(source.pod)), Notes())
        self._flows.setdefault(publisher, {})[source.rank] = flow
        return flow

    def _follow(self, publisher: Publisher, flow: _Flow, verdict: Verdict, seq: int) -> None:
        """Say to the index what a number other than the one that was due means."""
        source, stream, notes = flow
        if verdict is Verdict.GAP:
            self.counters["gaps_total"] += 1
            notes.gaps += 1
            self.counters["missing_total"] += stream.missing
            self._log.warning("gap", pod=source.pod, rank=source.rank, missing=stream.missing, seq=seq)
            if self._on_gap == "drop":
                self._index.restart(source)
            self._trust.judge(publisher, source, GAP)
            return
        if verdict in (Verdict.RESTART, Verdict.RESTART_LATE):
            self.counters["restarts_total"] += 1
            self._log.info("restart", pod=source.pod, rank=source.rank, seq=seq)
            self._index.restart(source)
        if verdict in _UNKNOWN_PAST:
            self._trust.judge(publisher, source, MISSED_START)
        elif verdict in _HEALED:
            self._trust.judge(publisher, source, "")

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
        self._recoveries = {publisher: known for publisher, known in self._recoveries.items() if publisher.pod != pod}
        self._trust.forget(pod)
        self._restored = {publisher: known for publisher, known in self._restored.items() if publisher.pod != pod}
        self._unreachable = {publisher: gone for publisher, gone in self._unreachable.items() if publisher.pod != pod}
        self._heard = {publisher: at for publisher, at in self._heard.items() if publisher.pod != pod}
        self._anew = {publisher for publisher in self._anew if publisher.pod != pod}
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


def _first_of(pod: str) -> int:
    """Give the number of a publisher's first message: storage connectors number theirs from 1 (WIRE B4)."""
    return 1 if pod in FLEET_WIDE else 0
