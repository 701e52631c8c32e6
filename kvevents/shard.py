"""The publishers of one worker: who is followed and since where, what is missing of them, who cannot be reached."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import TypeAlias

from structlog.typing import FilteringBoundLogger

from indexer import Copies, Index, Source
from kvevents.actions import Action, Ask, Begin, Deliver, Doubt, Whole
from kvevents.apply import Applier, OnGap, first_of
from kvevents.message import Message, Note, Publisher
from kvevents.position import PodPosition, PublisherPosition, RankPosition
from kvevents.recovery import Recovery
from kvevents.trust import ASKED_AGAIN, RECONNECTED, RESTORED, UNSURE

AskAgain: TypeAlias = Callable[[Publisher, int, int], None]
"""Asks a publisher for a replay, by its number, from a number of a message on. It must not wait."""


class Shard:
    """Follows publishers, and hands what they say to an `Applier` in their engines' order. One thread at a time."""

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
        self.applier = Applier(index, model=model, copies=copies, log=log, on_gap=on_gap)
        self._ask = ask
        self._log = log
        self._recoveries: dict[Publisher, Recovery] = {}
        self._unreachable: dict[Publisher, bool] = {}
        """Publishers that cannot be reached, and whether what they said is forgotten."""
        self._restored: dict[Publisher, PublisherPosition] = {}
        """Publishers that were loaded from a snapshot and not followed since."""
        self._restored_at = 0.0

    def apply(self, publisher: Publisher, messages: Sequence[Message]) -> None:
        """Apply messages of a publisher. What cannot be used is counted and logged, never raised.

        Where its messages can be asked for again, those that are missing are, and what came after them waits.
        """
        recovery = self._recoveries.get(publisher)
        if recovery is None:
            if any(message.note for message in messages):
                self._apply_unaided(publisher, messages)
            else:
                self._apply(publisher, messages)
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
                self.applier.counters["recovered_total"] += recovery.recovered - before
            self._act(publisher, recovery, actions)

    def _apply(self, publisher: Publisher, messages: Sequence[Message]) -> None:
        applied = self.applier.apply(publisher, messages)
        recovery = self._recoveries.get(publisher)
        if recovery is None:
            return
        if applied.is_spoiled:
            recovery.spoiled(time.monotonic())
        if applied.is_emptied:
            recovery.emptied()

    def _apply_unaided(self, publisher: Publisher, messages: Sequence[Message]) -> None:
        """Apply messages that cannot be asked for again.

        After a new connection their numbers prove nothing: an engine that began anew may have overtaken the old ones.
        """
        for note, some in groupby(messages, lambda message: message.note):
            if note is None:
                self._apply(publisher, list(some))
                continue
            for flow in self.applier.flows.get(publisher, {}).values():
                if flow.stream.last is not None:
                    self.applier.trust.judge(publisher, flow.source, RECONNECTED)

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
            self._recoveries[publisher] = Recovery(first_of(publisher.pod), position)
            if restored and position:
                for rank in restored.ranks:
                    self.applier.trust.judge(publisher, Source(publisher.pod, rank.rank), rank.verdict)
                return  # behind, until it was asked
        self.applier.trust.call_behind(publisher, "")

    def restore(self, pod: PodPosition) -> None:
        """Go on with a pod whose sources were loaded from a snapshot, from where it was followed.

        Until it is known what was said since, none of them counts as exact.
        """
        self._restored_at = time.monotonic()
        for known in pod.publishers:
            publisher = Publisher(pod.pod, known.endpoint)
            self._restored[publisher] = known
            self.applier.resume(publisher, known.ranks)
            if known.position is not None:
                self.applier.trust.call_behind(publisher, RESTORED)

    def positions(self, pod: str, models: Mapping[Source, str]) -> PodPosition:
        """Say how far the publishers of a pod were followed. `models` names those of sources."""
        known = self._publishers(pod) | {publisher for publisher in self._restored if publisher.pod == pod}
        return PodPosition(pod, [self._position(publisher, models) for publisher in sorted(known)])

    def _position(self, publisher: Publisher, models: Mapping[Source, str]) -> PublisherPosition:
        flows = self.applier.flows.get(publisher, {})
        position = self._recoveries[publisher].position if publisher in self._recoveries else None
        verdicts = {flow.source: self.applier.trust.verdict(flow.source) for flow in flows.values()}
        if publisher in self._restored and self._restored[publisher].position:
            position = self._restored[publisher].position
            verdicts |= {Source(publisher.pod, rank.rank): rank.verdict for rank in self._restored[publisher].ranks}
        return PublisherPosition(
            publisher.endpoint,
            next((models.get(flow.source, "") for flow in flows.values()), ""),
            [RankPosition(rank, flow.stream.last, verdicts[flow.source]) for rank, flow in sorted(flows.items())],
            *(position or ()),
        )

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

    def hear_unreachable(self, unreachable: Mapping[Publisher, float], visitors: Collection[str]) -> None:
        """Hear which publishers cannot be reached, and for how long: 1 is when they stop being scored, 2 when what they
        hold is forgotten. All others can be reached.

        `visitors` are endpoints that are not subscribed: pods connect to them, or nobody follows them any more. Of
        those nothing is kept, as they may never come again.
        """
        for publisher, long in unreachable.items():
            if long >= 1 and publisher not in self._unreachable:
                self._unreachable[publisher] = False
                self.applier.counters["unreachable_total"] += 1
                self._log.warning("unreachable", pod=publisher.pod, endpoint=publisher.endpoint)
                self.applier.trust.call_unreachable(publisher, is_so=True)
            if long >= 2 and not self._unreachable[publisher]:
                self._unreachable[publisher] = True
                self._log.info("forgotten", pod=publisher.pod, endpoint=publisher.endpoint)
                self.applier.counters["forgotten_total"] += 1
                if publisher.endpoint in visitors and all(
                    other == publisher or self._unreachable.get(other) for other in self._publishers(publisher.pod)
                ):
                    self.forget(publisher.pod, keep=False)
                else:
                    self._forget_unreachable(publisher)
        for publisher in [publisher for publisher in self._unreachable if unreachable.get(publisher, 0.0) < 1]:
            del self._unreachable[publisher]
            self._log.info("reachable", pod=publisher.pod, endpoint=publisher.endpoint)
            self.applier.trust.call_unreachable(publisher, is_so=False)

    def _forget_unreachable(self, publisher: Publisher) -> None:
        """Forget what a publisher said that will hardly come back as the same engine."""
        self.applier.trust.call_behind(publisher, "")
        if publisher in self._recoveries:
            self._recoveries[publisher] = Recovery(first_of(publisher.pod))
        self.applier.drop(publisher)

    def forget(self, pod: str, *, keep: bool) -> None:
        """Forget a pod's sequence numbers, and its blocks unless they are to be kept for somebody else."""
        self._recoveries = {publisher: known for publisher, known in self._recoveries.items() if publisher.pod != pod}
        self._restored = {publisher: known for publisher, known in self._restored.items() if publisher.pod != pod}
        self._unreachable = {publisher: gone for publisher, gone in self._unreachable.items() if publisher.pod != pod}
        self.applier.forget(pod, keep=keep)

    def distrust(self, pod: str) -> None:
        """Call the sources of a pod degraded whose messages may not have been applied."""
        for publisher, recovery in self._recoveries.items():
            if publisher.pod == pod:
                recovery.spoiled(time.monotonic())
        self.applier.distrust(pod)

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
            self.applier.trust.call_behind(publisher, RESTORED if recovery.is_restored else ASKED_AGAIN)
        for action in actions:
            match action:
                case Deliver(messages):
                    self._apply(publisher, messages)
                case Ask(replay, start):
                    if self._ask is not None:
                        self._ask(publisher, replay, start)
                case Begin(is_restart):
                    self.applier.begin_anew(publisher, "restarts_total" if is_restart else "rebuilds_total")
                case Doubt() | Whole():
                    for source in self.applier.sources_of(publisher):
                        self.applier.trust.judge(publisher, source, UNSURE if isinstance(action, Doubt) else "")
        if not recovery.is_behind:
            self.applier.trust.call_behind(publisher, "")

    def _publishers(self, pod: str) -> set[Publisher]:
        return {publisher for publisher in [*self.applier.flows, *self._recoveries] if publisher.pod == pod}
