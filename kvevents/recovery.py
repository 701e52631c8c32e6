"""What to do about messages that are missing: which to apply, in which order, and what to ask for again.

Decisions only: numbers and replies in, actions out; no I/O, no clock of its own. PUB/SUB loses messages, but an engine
keeps its last batches and sends them again from any number on (vLLM: 10,000 of them, WIRE A4). One machine follows one
publisher. While a replay is on its way, live messages are held back, so that all is applied in the engine's order.

An engine that restarted in place numbers from 0 again. A number that goes back proves it; one that goes on proves
nothing. So whenever something is asked for, it is asked for from the last message on that was applied: the engine that
sent it has it still, with the same bytes.
"""

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import NamedTuple

import xxhash

from kvevents.actions import Action, Ask, Begin, Deliver, Doubt, Whole
from kvevents.held import Held
from kvevents.message import Message

SAID_MESSAGES = 16_384
"""Of how many messages of a replay it is remembered what they said, for live ones that come after it and say the same.
What comes later still is taken for a restart, which costs another replay."""

PATIENCE_S = 15.0
"""How long a replay may say nothing before it counts as failed, whoever forgot it."""

SILENCE_S = 5.0
MOST_SILENCE_S = 60.0
"""After how long without a message a publisher is asked whether there was a last one: first, and at most."""

COOL_DOWN_S = 1.0
MOST_COOL_DOWN_S = 60.0
"""How long nothing is asked for after a replay failed: first, and at most."""


class Position(NamedTuple):
    """How far a publisher was followed: to go on from there in another process."""

    last: int
    """Number of the last message that was applied."""
    digest: int
    """Of what it said."""
    is_whole: bool
    """No message is missing among those that were applied."""


class _Why(Enum):
    START = auto()
    """Nothing is known yet: all that there is, and where that is not from the first message on, what there is."""
    CHECK = auto()
    """From the last message on that was applied."""
    HEAL = auto()
    """Something is missing for good: all that there is, but only if that is from the first message on."""


class _Replay:
    """One that is on its way."""

    __slots__ = ("delivered", "heard_at", "is_idle", "is_retry", "is_used", "number", "why")

    def __init__(self, number: int, why: _Why, now: float) -> None:
        self.number = number
        self.why = why
        self.heard_at = now
        self.is_used = False
        """It said something that is of use."""
        self.is_idle = False
        """It said something that is of no use: it does not go back far enough."""
        self.is_retry = False
        """There is more than what one before said."""
        self.delivered = 0
        """Messages that were not known before."""


class Recovery:
    """See the module. `now` is any clock in seconds that does not go back.

    `first` is the number of a publisher's first message. With a `position` it goes on from there, as after a lost
    connection.
    """

    def __init__(self, first: int = 0, position: Position | None = None) -> None:
        self._first = first
        self._last = position.last if position else None
        self._digest = position.digest if position else 0
        self._is_whole = position.is_whole if position else True
        """No message is missing among those that were applied."""
        self._has_begun = position is not None
        """What was known before this publisher is forgotten."""
        self._is_unsure = position is not None
        """The next message may be of another publisher than the last one."""
        self.is_restored = position is not None
        """It was not yet asked what it said since its position."""
        self._said: dict[int, int] = {}
        """Digests of what replays said, by number, until live messages are past it: they may say the same."""
        self._replay: _Replay | None = None
        self._replays = 0
        self._held = Held()
        self._ask_at = 0.0
        self._cool_down = COOL_DOWN_S
        self._heal_at = self._heal_next = 0.0
        self._heard_at = 0.0
        self._silence = SILENCE_S
        self.recovered = 0
        """Messages that came by a replay and were not known before."""

    def __repr__(self) -> str:
        return f"Recovery(last={self._last}, {'replaying' if self._replay else 'live'}, {len(self._held)} held)"

    @property
    def dropped(self) -> int:
        """Messages that were held back and had to go."""
        return self._held.dropped

    @property
    def is_active(self) -> bool:
        """Whether a replay is on its way, and messages may be held back."""
        return self._replay is not None

    @property
    def is_behind(self) -> bool:
        """Whether messages are known to be missing that are on their way."""
        replay = self._replay
        if replay is None:
            return self.is_restored
        return self.is_restored or replay.why is _Why.START or replay.is_used or replay.is_retry or bool(self._held)

    @property
    def position(self) -> Position | None:
        """How far it was followed; None where nothing was applied."""
        return None if self._last is None else Position(self._last, self._digest, self._is_whole)

    def goes_on(self, messages: Sequence[Message], now: float) -> bool:
        """Say whether live messages only go on from the last; if so they count as applied."""
        last = self._last
        if self._replay is not None or last is None or self._is_unsure or not messages:
            return False
        if [message.seq for message in messages] != list(range(last + 1, last + 1 + len(messages))):
            return False
        self._note(messages[-1], now)
        self._silence = SILENCE_S
        self._said.clear()
        return True

    def live(self, messages: Iterable[Message], now: float) -> list[Action]:
        """Take messages from the publisher's socket."""
        actions: list[Action] = []
        for message in messages:
            self._heard_at, self._silence = now, SILENCE_S
            self._live(message, actions, now)
        return actions

    def replayed(self, replay: int, messages: Iterable[Message], now: float) -> list[Action]:
        """Take messages from a replay."""
        actions: list[Action] = []
        for message in messages:
            if self._replay is None or self._replay.number != replay:
                break
            self._replay.heard_at = now
            self._replayed(self._replay, message, actions, now)
        return actions

    def ended(self, replay: int, now: float) -> list[Action]:
        """Hear that a replay is at its end."""
        actions: list[Action] = []
        done = self._replay
        if done is None or done.number != replay:
            return actions
        if done.why is not _Why.START and not done.is_used and not done.is_idle:
            self._begin_anew(actions, now)  # who sent the last message would have it still
            return actions
        self.is_restored = False
        last, held = self._last, self._held
        if held and not done.delivered and not done.is_idle and (last is None or held.first.seq > last + 1):
            return self.failed(replay, now)  # to ask again at once would be to ask for ever
        self._replay = None
        self._cool_down = COOL_DOWN_S
        if last is None:
            self._is_whole = True  # it never said anything
        self._release(actions, now)
        if self._replay is None and self._is_whole:
            actions.append(Whole())
        return actions

    def failed(self, replay: int, now: float) -> list[Action]:
        """Hear that a replay could not be had, or not all of it."""
        actions: list[Action] = []
        done = self._replay
        if done is None or done.number != replay:
            return actions
        if done.delivered:
            self._ask(_Why.CHECK, actions, now).is_retry = True  # go on where it stopped
            return actions
        self._replay = None
        self.is_restored = False
        self._ask_at = now + self._cool_down
        self._cool_down = min(2 * self._cool_down, MOST_COOL_DOWN_S)
        self._is_whole = self._is_whole and done.why is _Why.CHECK and not done.is_retry
        if not self._is_whole or self._is_unsure:
            actions.append(Doubt())
        self._release(actions, now)
        return actions

    def connected(self, now: float) -> list[Action]:
        """Hear that the publisher's socket is connected, for the first time or again: it may be another publisher."""
        actions: list[Action] = []
        self._held.clear()  # of the connection before
        self._is_unsure = self._last is not None
        if self._replay is not None or self._may_ask(now):
            self._ask(self._start_or(_Why.CHECK), actions, now)
        return actions

    def tick(self, now: float) -> list[Action]:
        """Do what is due after some time. Call it every second or so."""
        if self._replay is not None:
            late = now - self._replay.heard_at > PATIENCE_S
            return self.failed(self._replay.number, now) if late else []
        actions: list[Action] = []
        if not self._may_ask(now):
            return actions
        if self._is_unsure:
            self._ask(_Why.CHECK, actions, now)
        elif not self._is_whole and now >= self._heal_at:
            self._ask(self._start_or(_Why.HEAL), actions, now)
        elif self._replays and now - self._heard_at > self._silence:
            self._heard_at, self._silence = now, min(2 * self._silence, MOST_SILENCE_S)
            self._ask(self._start_or(_Why.CHECK), actions, now)
        return actions

    def spoiled(self, now: float) -> None:
        """Hear that messages that were delivered could not be applied, or not all of them.

        They may be the same when they come again: it is tried at once, and then as rarely as anything.
        """
        self._is_whole = False
        self._heal_at, self._heal_next = self._heal_next, now + MOST_COOL_DOWN_S

    def emptied(self) -> None:
        """Hear that the cache was emptied by the last message: what is missing from before is of no interest."""
        self._is_whole = True

    # ---- steps

    def _live(self, message: Message, actions: list[Action], now: float) -> None:
        seq, last = message.seq, self._last
        if self._replay is not None:
            if self._held and seq <= self._held.last.seq:
                self._restarted(message, actions, now)  # what is held is of the one before
            else:
                self._held.add(message)
        elif last is None or seq > last + 1 or (seq == last + 1 and self._is_unsure):
            if not self._may_ask(now):
                self._deliver(message, actions, now)
                return
            if last is not None:
                actions.append(Doubt())
            self._held.add(message)
            self._ask(self._start_or(_Why.CHECK), actions, now)
        elif seq == last + 1:
            self._said.clear()
            self._deliver(message, actions, now)
        elif self._said.get(seq) != _digest_of(message):
            self._restarted(message, actions, now)

    def _restarted(self, message: Message, actions: list[Action], now: float) -> None:
        """Go on with a message of a publisher that began anew."""
        if self._may_ask(now):
            self._begin_anew(actions, now)
            self._held.add(message)
        else:
            self._forget(actions, is_restart=True)
            self._deliver(message, actions, now)

    def _replayed(self, replay: _Replay, message: Message, actions: list[Action], now: float) -> None:
        seq, is_first = message.seq, not replay.is_used
        if replay.is_idle:
            return
        if is_first and replay.why is not _Why.CHECK and seq > self._first:
            self._heal_at = now + MOST_COOL_DOWN_S  # it will not go back further so soon
            replay.is_idle = replay.why is _Why.HEAL
            if replay.is_idle:
                return
        elif is_first and replay.why is _Why.HEAL:
            self._forget(actions, is_restart=False)
        last = self._last
        if is_first and replay.why is _Why.CHECK and last is not None:
            if seq < last:
                return
            if seq == last and _digest_of(message) != self._digest:
                self._begin_anew(actions, now)
                return
            self._is_unsure = seq > last
        replay.is_used = True
        if last is not None and seq > last + 1:
            may_retry = not is_first and (replay.delivered > 0 or not replay.is_retry)
            self._fill(replay, seq, actions, now, with_gaps=not may_retry)
            if may_retry and self._last is not None and seq > self._last + 1:
                self._ask(_Why.CHECK, actions, now).is_retry = True  # some of it was lost on its way
                return
        if self._last is None or seq > self._last:
            self._deliver_replayed(replay, message, actions, now)

    def _fill(self, replay: _Replay, before: int, actions: list[Action], now: float, *, with_gaps: bool) -> None:
        """Deliver what is held of that which a replay lacks."""
        while self._held and self._last is not None:
            seq = self._held.first.seq
            if not self._last < seq < before or (seq > self._last + 1 and not with_gaps):
                return
            self._deliver_replayed(replay, self._held.first, actions, now)

    def _deliver_replayed(self, replay: _Replay, message: Message, actions: list[Action], now: float) -> None:
        digest = _digest_of(message)
        while self._held and self._held.first.seq <= message.seq:
            held = self._held.first
            if (digest if held.seq == message.seq else self._said.get(held.seq)) != _digest_of(held):
                self._begin_anew(actions, now)  # it restarted while it was asked
                return
            self._held.pop()
        replay.delivered += 1
        self.recovered += 1
        self._deliver(message, actions, now)
        self._said[message.seq] = digest
        if len(self._said) > SAID_MESSAGES:
            del self._said[next(iter(self._said))]

    def _release(self, actions: list[Action], now: float) -> None:
        """Go on with what was held back."""
        for message in self._held.clear():
            self._live(message, actions, now)

    def _begin_anew(self, actions: list[Action], now: float) -> None:
        """Begin with a publisher that is not the one before. It still has what it said lately."""
        self._held.clear()
        self._forget(actions, is_restart=True)
        self._ask(_Why.START, actions, now)

    def _forget(self, actions: list[Action], *, is_restart: bool) -> None:
        self._last, self._is_whole, self._is_unsure = None, True, False
        self.is_restored = False
        self._heal_at = 0.0
        self._said.clear()
        self._has_begun = True
        actions.append(Begin(is_restart))

    def _start_or(self, why: _Why) -> _Why:
        return _Why.START if self._last is None else why

    def _ask(self, why: _Why, actions: list[Action], now: float) -> _Replay:
        self._replays += 1
        self._replay = _Replay(self._replays, why, now)
        start = self._last if why is _Why.CHECK and self._last is not None else 0
        actions.append(Ask(self._replays, start))
        return self._replay

    def _may_ask(self, now: float) -> bool:
        return now >= self._ask_at

    def _deliver(self, message: Message, actions: list[Action], now: float) -> None:
        last = self._last
        if last is None:
            self._is_whole = message.seq <= self._first
            if self._is_whole and not self._has_begun:
                self._forget(actions, is_restart=False)
        elif message.seq != last + 1 or self._is_unsure:
            if self._is_unsure:
                actions.append(Doubt())
            self._is_whole = self._is_unsure = False
        self._note(message, now)
        if actions and isinstance(actions[-1], Deliver):
            actions[-1].messages.append(message)
        else:
            actions.append(Deliver([message]))

    def _note(self, message: Message, now: float) -> None:
        self._last, self._digest = message.seq, _digest_of(message)
        self._heard_at = now


def _digest_of(message: Message) -> int:
    return xxhash.xxh3_64_intdigest(message.payload)
