"""Recovery against a simulated engine: whatever is lost, late or restarted, nothing wrong is ever called exact."""

from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvevents import held as holding
from kvevents import recovery as recoveries
from kvevents.actions import Ask, Begin, Deliver, Doubt, Whole
from kvevents.message import Message
from kvevents.recovery import COOL_DOWN_S, MOST_COOL_DOWN_S, MOST_SILENCE_S, PATIENCE_S, SILENCE_S, Recovery
from kvevents.stream import Stream, Verdict

CONNECTED = "connected"
END = "end"


def said(life, seq, what=""):
    """A message: its payload says of which life of the engine it is."""
    return Message(b"kv@pod-a@m", seq, f"{life}:{seq:02}:{what}".encode())


def told(actions):
    """What actions say, in short."""
    texts = []
    for action in actions:
        match action:
            case Deliver(messages):
                texts.append(" ".join(["deliver", *(str(message.seq) for message in messages)]))
            case Ask(_, start):
                texts.append(f"ask {start}")
            case _:
                texts.append(type(action).__name__.lower())
    return texts


class Engine:
    """A publisher and the ring of its last messages."""

    def __init__(self, ring):
        self.ring = deque(maxlen=ring)
        self.lives = [[]]

    @property
    def published(self):
        """All that was published in this life."""
        return self.lives[-1]

    def publish(self, what=""):
        message = said(len(self.lives) - 1, len(self.published), what)
        self.published.append(message)
        self.ring.append(message)
        return message

    def restart(self):
        self.ring.clear()
        self.lives.append([])

    def replay(self, start):
        return [message for message in self.ring if message.seq >= start]

    def cache(self):
        """What it takes to know its cache: the messages from the last clear on."""
        return since_clear(self.published)

    @property
    def has_all(self):
        return len(self.ring) == len(self.published)


def since_clear(messages):
    clears = [at for at, message in enumerate(messages) if message.payload.endswith(b"clear")]
    return messages[clears[-1] :] if clears else messages


class Consumer:
    """Applies what it is told to, and judges the numbers as `kvevents.apply` does."""

    def __init__(self):
        self.stream = Stream()
        self.applied = []
        self.is_exact = False
        self.has_cleared = False
        """The last thing of note was a clear."""

    def take(self, actions):
        for action in actions:
            if isinstance(action, Begin):
                self.stream, self.applied, self.is_exact, self.has_cleared = Stream(), [], False, False
            elif isinstance(action, Deliver):
                self.apply(action.messages)
            elif isinstance(action, Doubt):
                self.is_exact = False
            elif isinstance(action, Whole):
                self.is_exact = True

    def apply(self, messages):
        assert messages
        for message in messages:
            assert message not in self.applied
            assert self.stream.last is None or message.seq > self.stream.last
            verdict = self.stream.observe(message.seq)
            if verdict in (Verdict.GAP, Verdict.LATE):
                self.is_exact = self.has_cleared = False
            elif verdict is Verdict.FIRST:
                self.is_exact = True
            self.applied.append(message)
            if message.payload.endswith(b"clear"):
                self.is_exact = self.has_cleared = True


class World:
    """An engine, what is on its way from it, `Recovery` and a consumer."""

    def __init__(self, ring=100, *, replays=True):
        self.engine = Engine(ring)
        self.recovery = Recovery()
        self.consumer = Consumer()
        self.replays = replays
        self.now = 1000.0
        self.live = deque()
        self.request = None
        self.is_answered = False
        self.reply = deque()
        self.asked = []
        self.saved = None

    def do(self, actions, most=1):
        """Take actions; `most` is how often an event may ask."""
        asks = [action for action in actions if isinstance(action, Ask)]
        assert len(asks) <= most
        assert len({ask.replay for ask in self.asked + asks}) == len(self.asked + asks)
        for ask in asks:
            self.asked.append(ask)
            self.request, self.is_answered, self.reply = ask, False, deque()
        assert self.recovery.is_active == (self.request is not None)
        self.consumer.take(actions)
        if self.consumer.has_cleared:
            self.consumer.has_cleared = False
            self.recovery.emptied()

    # ---- the engine and the network

    def publish(self, count=1, *, lost=False, what=""):
        for _ in range(count):
            message = self.engine.publish(what)
            if not lost:
                self.live.append(message)

    def restart(self, lost=0, *, noted=True):
        """Restart in place; the first messages have no listener yet."""
        self.engine.restart()
        self.publish(lost, lost=True)
        if noted:
            self.live.append(CONNECTED)

    def answer(self, *, start=None, lost=(), ends=True):
        """Let the engine answer: what it has now is on its way."""
        if self.request is not None and self.replays and not self.is_answered:
            self.is_answered = True
            messages = self.engine.replay(self.request.start if start is None else start)
            self.reply.extend(message for at, message in enumerate(messages) if at not in lost)
            if ends:
                self.reply.append(END)

    # ---- the machine

    def connect(self):
        self.live.append(CONNECTED)
        self.hear()

    def hear(self, count=None):
        """Feed live messages to the machine, up to the next note of a connection together."""
        left = len(self.live) if count is None else count
        while self.live and left > 0:
            if self.live[0] == CONNECTED:
                self.live.popleft()
                self.do(self.recovery.connected(self.now))
                left -= 1
                continue
            batch = []
            while self.live and self.live[0] != CONNECTED and left > 0:
                batch.append(self.live.popleft())
                left -= 1
            if self.recovery.goes_on(batch, self.now):
                self.do([Deliver(batch)])
            else:
                self.do(self.recovery.live(batch, self.now), most=len(batch))

    def read(self, count=None):
        """Feed replies to the machine."""
        left = len(self.reply) if count is None else count
        while self.reply and left > 0:
            if self.reply[0] == END:
                self.reply.popleft()
                ended, self.request = self.request, None
                self.do(self.recovery.ended(ended.replay, self.now), most=2)
                return
            batch = []
            while self.reply and self.reply[0] != END and left > 0:
                batch.append(self.reply.popleft())
                left -= 1
            self.do(self.recovery.replayed(self.request.replay, batch, self.now))

    def fail(self):
        if self.request is not None:
            failed, self.request, self.reply = self.request, None, deque()
            self.do(self.recovery.failed(failed.replay, self.now))

    def spoil(self):
        """Lose the last message that was delivered on the way into the index."""
        if self.consumer.applied:
            self.consumer.applied.pop()
            self.consumer.is_exact = False
            self.recovery.spoiled(self.now)

    def save(self):
        """Keep what another process can go on from."""
        self.saved = (
            self.recovery.position,
            self.consumer.stream.last,
            list(self.consumer.applied),
            self.consumer.is_exact,
        )

    def move(self):
        """Go on in another process: what came since is not known there."""
        if self.saved is not None:
            position, last, applied, is_exact = self.saved
            self.recovery, self.consumer = Recovery(position=position), Consumer()
            self.consumer.stream.last, self.consumer.applied, self.consumer.is_exact = last, list(applied), is_exact
            self.request, self.reply, self.asked = None, deque(), []
            self.live = deque([CONNECTED])

    def tick(self, seconds=1.0):
        self.now += seconds
        before = self.request
        actions = self.recovery.tick(self.now)
        if before is not None and not self.recovery.is_active:
            self.request, self.reply = None, deque()
        self.do(actions)

    def serve(self):
        """Let everything that is asked for be answered, without time passing."""
        for _ in range(12):
            self.answer()
            if not self.reply:
                return
            self.read()
        pytest.fail("it asks and asks")

    def settle(self, seconds=200.0, step=5.0):
        """Let nothing more be lost, and time pass."""
        passed = 0.0
        while passed < seconds:
            self.hear()
            self.serve()
            self.tick(step)
            passed += step
        self.serve()

    def check(self):
        if self.consumer.is_exact:
            assert since_clear(self.consumer.applied) == self.engine.cache()

    def check_exact(self):
        assert self.consumer.is_exact
        self.check()


@pytest.fixture
def world():
    return World()


def following(count, **more):
    """A world in which so many messages were heard and are known to be all."""
    world = World(**more)
    world.connect()
    world.serve()
    for _ in range(count):
        world.publish()
        world.hear()
        world.serve()
    world.check_exact()
    world.asked.clear()
    return world


def run(*seqs, life=0):
    return [said(life, seq) for seq in seqs]


def test_all_there_is_is_asked_for_when_the_first_message_is_late():
    recovery = Recovery()
    assert told(recovery.live(run(5), 0)) == ["ask 0"]
    assert recovery.is_active
    assert told(recovery.live(run(6), 0)) == []
    assert told(recovery.replayed(1, run(0, 1, 2), 0)) == ["begin", "deliver 0 1 2"]
    assert told(recovery.replayed(1, run(3, 4, 5), 0)) == ["deliver 3 4 5"]
    assert told(recovery.ended(1, 0)) == ["deliver 6", "whole"]
    assert not recovery.is_active


def test_what_is_known_stays_when_the_first_messages_cannot_be_had():
    recovery = Recovery()
    assert told(recovery.connected(0)) == ["ask 0"]
    assert told(recovery.replayed(1, run(4, 5), 0)) == ["deliver 4 5"]
    assert told(recovery.ended(1, 0)) == []


def test_a_publisher_may_count_from_one():
    recovery = Recovery(first=1)
    recovery.connected(0)
    assert told(recovery.replayed(1, run(1, 2), 0)) == ["begin", "deliver 1 2"]
    assert told(recovery.ended(1, 0)) == ["whole"]


def test_messages_that_only_go_on_need_no_decision():
    recovery = Recovery()
    assert not recovery.goes_on(run(0), 0)
    recovery.connected(0)
    recovery.replayed(1, run(0, 1), 0)
    assert not recovery.goes_on(run(2), 0)
    recovery.ended(1, 0)
    assert recovery.goes_on(run(2, 3), 0)
    assert not recovery.goes_on(run(4, 6), 0)
    assert not recovery.goes_on(run(3), 0)
    assert told(recovery.live(run(4, 5), 0)) == ["deliver 4 5"]
    assert repr(recovery) == "Recovery(last=5, live, 0 held)"


def test_a_gap_is_filled_while_live_messages_wait():
    world = following(3)
    world.publish(2, lost=True)
    world.publish(2)
    world.hear()
    assert told(world.asked) == ["ask 2"]
    assert repr(world.recovery) == "Recovery(last=2, replaying, 2 held)"
    assert not world.consumer.is_exact
    world.answer()
    world.publish()
    world.hear()
    world.read()
    world.check_exact()
    assert len(world.consumer.applied) == 8


def test_messages_that_come_live_and_in_a_replay_are_applied_once():
    world = following(3)
    world.publish(lost=True)
    world.publish(3)
    world.hear(1)
    world.answer()
    world.hear(1)
    world.read(4)
    world.hear(1)
    world.read()
    world.check_exact()


def test_a_gap_that_the_ring_does_not_reach_stays_until_a_clear():
    world = following(3, ring=2)
    world.publish(3, lost=True)
    world.publish()
    world.settle()
    assert [message.seq for message in world.consumer.applied] == [0, 1, 2, 5, 6]
    assert not world.consumer.is_exact
    world.publish(what="clear")
    world.publish()
    world.settle()
    world.check_exact()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_numbers_that_go_back_are_a_restart(lost):
    world = following(3)
    world.restart(lost, noted=False)
    world.publish()
    world.hear()
    assert world.consumer.applied == []
    world.serve()
    world.check_exact()
    assert told(world.asked) == ["ask 0"]


@pytest.mark.parametrize("lost", [4, 5, 9])
def test_a_restart_that_looks_like_a_gap_is_found_by_the_last_payload(lost):
    world = following(3)
    world.restart(lost, noted=False)
    world.publish()
    world.hear()
    world.serve()
    world.check_exact()
    assert told(world.asked) == ["ask 2", "ask 0"]


@pytest.mark.parametrize("lost", [0, 1, 3, 9])
def test_a_restart_that_says_nothing_is_found_in_the_silence(lost):
    world = following(3)
    world.restart(lost, noted=False)
    world.tick(SILENCE_S + 1)
    world.serve()
    world.check_exact()
    assert told(world.asked) == ["ask 2", "ask 0"]


@pytest.mark.parametrize("lost", [0, 1, 2, 3, 4])
def test_a_new_connection_is_asked_who_it_is(lost):
    world = following(3)
    world.restart(lost)
    world.publish()
    world.hear()
    world.serve()
    world.check_exact()


def test_a_new_connection_to_the_same_publisher_loses_nothing():
    world = following(3)
    world.publish(2, lost=True)
    world.connect()
    world.serve()
    world.check_exact()
    assert told(world.asked) == ["ask 2"]


@pytest.mark.parametrize("answered", ["before", "after"])
@pytest.mark.parametrize("lost", [0, 1, 2, 3, 4, 5, 7])
def test_a_restart_while_a_replay_is_on_its_way(lost, answered):
    world = following(3)
    world.publish(lost=True)
    world.publish(2)
    world.hear()
    if answered == "before":
        world.answer()
    world.restart(lost, noted=False)
    world.publish(2)
    world.hear()
    world.read()
    world.settle()
    world.check_exact()


def test_what_restarted_while_it_was_asked_for_all_is_asked_again():
    recovery = Recovery()
    recovery.connected(0)
    recovery.replayed(1, run(0, 1), 0)
    recovery.live(run(1, 2, life=1), 0)
    assert told(recovery.replayed(1, run(2), 0)) == ["begin", "ask 0"]
    assert told(recovery.replayed(1, run(3), 0)) == []  # nobody waits for this one any more
    assert told(recovery.ended(1, 0)) == told(recovery.failed(1, 0)) == []
    assert told(recovery.replayed(2, run(0, 1, 2, life=1), 0)) == ["deliver 0 1 2"]
    assert told(recovery.ended(2, 0)) == ["whole"]


def test_the_last_messages_before_a_silence_are_found():
    world = following(3)
    world.publish(2, lost=True)
    world.tick(SILENCE_S)
    assert not world.asked
    world.tick()
    world.serve()
    world.check_exact()
    assert told(world.asked) == ["ask 2"]


def test_the_longer_a_silence_the_more_seldom_it_is_asked():
    world = following(3)
    world.publish()
    world.hear()
    times = []
    for _ in range(300):
        world.tick()
        if world.request is not None:
            times.append(world.now)
            world.serve()
    pauses = [round(after - before) for before, after in pairwise(times)]
    assert pauses == [11, 21, 41, *[round(MOST_SILENCE_S) + 1] * 3]


def test_a_replay_that_does_not_go_back_to_what_was_asked_for_says_more():
    world = following(3)
    world.publish(2, lost=True)
    world.tick(SILENCE_S + 1)
    world.answer(start=0)
    world.read()
    world.check_exact()


def test_holes_in_a_replay_are_filled_with_what_came_live():
    world = following(1)
    world.publish(lost=True)
    world.publish(3)
    world.hear()
    world.answer(lost={2, 3})
    world.read()
    world.check_exact()
    assert told(world.asked) == ["ask 0"]


def test_holes_in_a_replay_are_asked_for_again_once():
    world = following(1)
    world.publish(4, lost=True)
    world.tick(SILENCE_S + 1)
    world.answer(lost={2})
    world.read()
    assert told(world.asked) == ["ask 0", "ask 1"]
    world.answer(lost={1})
    world.read()
    assert [message.seq for message in world.consumer.applied] == [0, 1, 3, 4]
    assert not world.consumer.is_exact
    world.settle()
    world.check_exact()
    assert told(world.asked)[2] == "ask 0"


def test_what_came_live_after_a_hole_that_stays_is_applied():
    world = following(1)
    world.publish(3, lost=True)
    world.publish()
    world.publish(lost=True)
    world.hear()
    world.answer(lost={1, 4})  # 0 2 3 5
    world.read()
    world.answer(lost={1, 4})
    world.read()
    assert [message.seq for message in world.consumer.applied] == [0, 2, 3, 4, 5]


def test_a_replay_that_never_answers_is_given_up():
    world = following(3)
    world.replays = False
    world.publish(lost=True)
    world.publish()
    world.hear()
    world.tick(PATIENCE_S)
    assert world.recovery.is_active
    world.tick()
    assert not world.recovery.is_active
    assert [message.seq for message in world.consumer.applied] == [0, 1, 2, 4]
    assert not world.consumer.is_exact
    world.replays = True
    world.settle()
    world.check_exact()


def test_the_more_replays_fail_the_more_seldom_they_are_asked_for():
    world = World()
    world.publish(lost=True)
    world.publish()
    world.hear()
    times = []
    for _ in range(140):
        if world.request is not None:
            times.append(world.now)
            world.fail()
            world.publish(2)  # what comes meanwhile is applied
            world.hear()
        world.tick()
    pauses = [after - before for before, after in pairwise(times)]
    assert pauses == [COOL_DOWN_S, 2, 4, 8, 16, 32, MOST_COOL_DOWN_S]
    world.settle()
    world.check_exact()
    world.publish(lost=True)
    world.publish()
    world.hear()
    world.fail()
    world.tick(COOL_DOWN_S)
    assert world.recovery.is_active


def test_gaps_and_restarts_are_followed_where_there_are_no_replays():
    world = World(replays=False)
    world.publish(2)
    world.hear()
    world.fail()
    assert world.consumer.is_exact
    world.publish(lost=True)
    world.publish()
    world.hear()
    assert not world.consumer.is_exact
    world.restart(noted=False)
    world.publish(2)
    world.hear()
    world.check_exact()
    world.restart(1, noted=False)
    world.publish()
    world.hear()
    assert len(world.consumer.applied) == 1
    assert not world.consumer.is_exact


@pytest.mark.parametrize(("name", "value"), [("HELD_MESSAGES", 3), ("HELD_BYTES", 17)])
def test_what_is_held_back_is_bounded_and_the_oldest_is_asked_for_again(monkeypatch, name, value):
    world = following(3)
    monkeypatch.setattr(holding, name, value)
    world.publish(2)
    world.publish(lost=True)
    world.hear()
    world.publish(1)
    world.hear()
    world.answer()
    world.publish(8)
    world.hear()
    assert len(world.recovery._held) == 3
    assert world.recovery._held._bytes == 15
    assert world.recovery.dropped == 6
    world.read()
    assert told(world.asked) == ["ask 4", "ask 6"]
    world.serve()
    world.check_exact()
    assert world.recovery._held._bytes == 0


def test_one_message_may_be_larger_than_all_that_is_held_back(monkeypatch):
    monkeypatch.setattr(holding, "HELD_BYTES", 3)
    recovery = Recovery()
    recovery.live(run(1), 0)
    assert (len(recovery._held), recovery.dropped) == (1, 0)
    recovery.live(run(2), 0)
    assert (len(recovery._held), recovery.dropped) == (1, 1)


def test_what_was_spoiled_is_asked_for_from_the_first_message_on():
    world = following(3)
    world.spoil()
    world.settle()
    world.check_exact()
    assert told(world.asked)[0] == "ask 0"


def test_what_is_spoiled_each_time_it_comes_is_not_asked_for_all_the_time():
    recovery = Recovery()
    recovery.connected(0)
    recovery.replayed(1, run(0, 1, 2), 0)
    recovery.ended(1, 0)
    asks = 0
    for now in range(120):
        recovery.live(run(3 + now), now)  # no silence
        if not now:
            recovery.spoiled(now)
        for action in recovery.tick(now):
            if isinstance(action, Ask):
                asks += 1
                assert action.start == 0
                recovery.replayed(action.replay, run(*range(4 + now)), now)
                recovery.spoiled(now)
                recovery.ended(action.replay, now)
    assert asks == 3


def test_what_was_spoiled_before_a_clear_is_of_no_interest():
    world = following(3)
    world.spoil()
    world.publish(what="clear")
    world.hear()
    world.tick()
    world.check_exact()
    assert not world.asked


def test_an_engine_that_has_said_nothing_is_known():
    world = World()
    world.connect()
    world.fail()
    world.tick()
    world.serve()
    world.check_exact()


@pytest.mark.parametrize("number", [0, 2])
def test_replays_that_lack_what_was_heard_are_not_asked_for_again_at_once(number):
    recovery = Recovery()
    recovery.connected(0)
    recovery.live(run(number), 0)
    assert "ask 0" not in told(recovery.ended(1, 0))
    assert told(recovery.tick(COOL_DOWN_S - 0.1)) == []


def test_a_replay_that_lacks_the_messages_of_a_gap_is_not_asked_for_again_at_once():
    world = following(2)
    world.publish(lost=True)
    world.publish()
    world.hear()
    world.answer(lost={1, 2})
    world.read()
    assert [message.seq for message in world.consumer.applied] == [0, 1, 3]
    assert told(world.asked) == ["ask 1"]
    world.settle()
    world.check_exact()


def test_what_a_replay_said_that_stopped_halfway_is_gone_on_from():
    world = World()
    world.publish(6, lost=True)
    world.connect()
    world.answer(lost={4, 5}, ends=False)
    world.read()
    world.tick(PATIENCE_S + 1)
    assert told(world.asked) == ["ask 0", "ask 3"]
    world.serve()
    world.check_exact()


@pytest.mark.parametrize("lost", [{2, 3}, {1}])
def test_what_failed_halfway_is_not_called_exact(lost):
    world = World()
    world.publish(4, lost=True)
    world.connect()
    world.answer(lost=lost, ends=False)
    world.read()
    world.fail()
    world.fail()
    assert not world.consumer.is_exact
    world.tick(COOL_DOWN_S)
    world.serve()
    world.check_exact()


def test_long_replays_of_which_only_the_beginning_arrives_are_put_together():
    world = World()
    world.publish(20, lost=True)
    world.connect()
    for _ in range(10):
        world.answer(lost=range(4, 20), ends=False)
        world.read()
        world.publish()
        world.hear()
        world.tick(PATIENCE_S + 1)
    world.serve()
    world.check_exact()


def test_a_failed_question_in_a_silence_changes_nothing():
    world = following(2)
    world.tick(SILENCE_S + 1)
    world.publish()
    world.hear()
    world.fail()
    world.check_exact()
    world.tick(COOL_DOWN_S)
    assert told(world.asked) == ["ask 1"]


def late(ring=4):
    """A world in which the ring did not reach back to the first message."""
    world = World(ring)
    world.publish(8, lost=True)
    world.connect()
    world.serve()
    return world


def test_a_ring_that_does_not_reach_back_is_not_read_again_so_soon():
    world = late()
    assert [message.seq for message in world.consumer.applied] == [4, 5, 6, 7]
    for _ in range(round(MOST_COOL_DOWN_S) - 1):
        world.publish()
        world.hear()
        world.tick()
        assert told(world.asked) == ["ask 0"]
    world.tick()
    assert told(world.asked) == ["ask 0", "ask 0"]


def test_gaps_are_filled_also_where_the_beginning_is_missing():
    world = late()
    for _ in range(2):
        world.publish(lost=True)
        world.publish()
        world.hear()
        world.serve()
        world.tick(MOST_COOL_DOWN_S)
        world.serve()
    assert [message.seq for message in world.consumer.applied] == list(range(4, 12))
    assert not world.consumer.is_exact


def test_silences_are_asked_about_also_where_the_beginning_is_missing():
    world = late()
    world.publish(2, lost=True)
    world.tick(SILENCE_S + 1)
    world.serve()
    assert [message.seq for message in world.consumer.applied] == list(range(4, 10))


def test_a_replay_that_said_nothing_is_asked_for_again_in_the_silence():
    world = World()
    world.publish(2, lost=True)
    world.connect()
    world.answer(lost={0, 1})
    world.read()
    world.settle()
    world.check_exact()


def test_a_new_connection_is_asked_who_it_is_also_when_that_has_to_wait():
    world = following(3)
    world.tick(SILENCE_S + 1)
    world.fail()
    world.restart(3)
    world.hear()
    assert told(world.asked) == ["ask 2"]
    world.tick(COOL_DOWN_S)
    world.publish()  # it has the number that is due
    world.hear()
    world.serve()
    world.check_exact()


def test_what_a_new_connection_says_before_it_can_be_asked_is_in_doubt():
    world = following(3)
    world.tick(SILENCE_S + 1)
    world.fail()
    world.restart(3)
    world.publish()
    world.hear()
    assert [message.seq for message in world.consumer.applied] == [0, 1, 2, 3]
    assert not world.consumer.is_exact
    world.settle()
    world.check_exact()


def test_what_a_new_connection_says_when_it_can_be_asked_waits_for_the_answer():
    world = following(3)
    world.tick(SILENCE_S + 1)
    world.fail()
    world.restart(3)
    world.hear()
    world.now += COOL_DOWN_S
    world.publish()
    world.hear()
    assert told(world.asked) == ["ask 2", "ask 2"]
    world.serve()
    world.check_exact()


@pytest.mark.parametrize("heard", [0, 3])
def test_a_connection_made_while_a_replay_is_on_its_way_is_asked_too(heard):
    world = following(heard)
    world.tick(SILENCE_S + 1)
    world.publish()
    world.hear()
    world.answer(lost={1})
    world.restart(4)
    world.publish()
    world.hear()
    world.serve()
    world.check_exact()


def test_an_answer_without_the_last_message_says_nothing_of_who_it_is():
    world = following(3)
    world.restart(4, noted=False)
    world.tick(SILENCE_S + 1)
    world.answer(lost={0})
    world.read()
    assert [message.seq for message in world.consumer.applied] == [0, 1, 2, 3]
    assert not world.consumer.is_exact
    world.settle()
    world.check_exact()


def test_a_connection_that_cannot_be_asked_is_in_doubt_until_it_is():
    world = following(3)
    world.connect()
    world.fail()
    assert not world.consumer.is_exact
    world.tick(COOL_DOWN_S)
    world.serve()
    world.check_exact()
    assert told(world.asked) == ["ask 2", "ask 2"]


def test_messages_that_come_live_after_the_replay_that_has_them_are_no_restart():
    world = World()
    world.publish(3)
    world.do(world.recovery.connected(world.now))
    world.serve()
    world.check_exact()
    world.hear()
    world.publish()
    world.hear()
    world.check_exact()
    assert told(world.asked) == ["ask 0"]


def test_messages_that_come_live_during_the_replay_after_the_one_that_has_them_are_no_restart():
    world = World()
    world.publish(3)
    world.do(world.recovery.connected(world.now))
    world.serve()
    world.tick(SILENCE_S + 1)
    world.hear(2)
    world.publish()
    world.serve()
    world.hear()
    world.check_exact()
    assert told(world.asked) == ["ask 0", "ask 2"]


def test_a_restart_heard_from_its_first_message_on_is_whole_without_replays():
    recovery = Recovery()
    recovery.connected(0)
    recovery.failed(1, 0)
    assert told(recovery.live(run(4), 0)) == ["deliver 4"]
    assert told(recovery.live(run(0, 1, life=1), 0)) == ["begin", "deliver 0 1"]
    assert told(recovery.tick(COOL_DOWN_S)) == []


def test_a_first_message_begins_also_without_replays():
    recovery = Recovery()
    recovery.connected(0)
    recovery.failed(1, 0)
    assert told(recovery.live(run(0, 1), 0)) == ["begin", "deliver 0 1"]
    assert told(recovery.tick(COOL_DOWN_S)) == []


def test_messages_that_only_go_on_end_a_silence():
    world = following(1)
    for _ in range(100):
        world.tick()
        world.serve()
    world.asked.clear()
    assert not world.recovery.goes_on([], world.now)
    world.publish()
    world.hear()
    world.tick(SILENCE_S + 1)
    assert told(world.asked) == ["ask 1"]


def test_what_nobody_asked_for_is_not_heard():
    recovery = Recovery()
    assert recovery.tick(SILENCE_S + 1) == []
    assert recovery.replayed(1, run(0), 0) == recovery.ended(1, 0) == recovery.failed(1, 0) == []


def test_holes_are_not_filled_with_what_comes_after_them_or_is_of_another_life():
    world = following(3)
    world.publish(4, lost=True)
    world.publish()
    world.hear()
    world.answer(lost={2, 3})  # 2 3 6 7, and 7 is held
    world.read()
    assert told(world.asked) == ["ask 2", "ask 3"]
    world.serve()
    world.check_exact()
    world.asked.clear()
    world.publish(3, lost=True)
    world.tick(SILENCE_S + 1)
    world.answer(lost={1})  # 7 9 10
    world.restart(1, noted=False)
    world.publish()
    world.hear()
    world.read()
    assert told(world.asked) == ["ask 7", "ask 7"]
    world.serve()
    world.check_exact()


def test_a_hole_is_not_filled_with_what_leaves_another():
    world = following(3)
    world.publish(2, lost=True)
    world.publish()
    world.hear()
    world.publish(lost=True)
    world.answer(lost={1, 2, 3})  # 2 6, and 5 is held
    world.read()
    assert told(world.asked) == ["ask 2", "ask 2"]
    world.serve()
    world.check_exact()


@pytest.mark.parametrize("lost", [0, 1])
def test_live_messages_wait_also_for_a_replay_that_does_not_reach_back(lost):
    world = late()
    world.tick(MOST_COOL_DOWN_S)
    world.answer()
    world.publish(lost, lost=True)
    world.publish()
    world.hear()
    world.serve()
    assert [message.seq for message in world.consumer.applied] == list(range(4, 9 + lost))
    assert not world.consumer.is_exact


def test_live_messages_wait_for_an_answer_that_says_nothing_new():
    world = following(2)
    world.tick(SILENCE_S + 1)
    world.answer()
    world.publish()
    world.hear()
    world.read()
    world.check_exact()
    world.publish(lost=True)
    world.publish()
    world.hear()
    assert told(world.asked) == ["ask 1", "ask 2"]


def test_a_replay_that_goes_on_is_waited_for():
    recovery = Recovery()
    recovery.connected(0)
    recovery.replayed(1, run(0), PATIENCE_S - 1)
    assert recovery.tick(2 * PATIENCE_S - 2) == []
    assert told(recovery.tick(2 * PATIENCE_S)) == ["ask 0"]


@pytest.mark.parametrize("how", ["live", "goes_on"])
def test_live_messages_end_a_silence_and_the_memory_of_replays(how):
    recovery = Recovery()
    recovery.connected(0)
    recovery.replayed(1, run(0), 0)
    recovery.ended(1, 0)
    for number, now in [(2, 10), (3, 30)]:
        assert told(recovery.tick(now)) == ["ask 0"]
        recovery.replayed(number, run(0), now)
        recovery.ended(number, now)
    assert recovery._said
    getattr(recovery, how)(run(1), 30)
    assert not recovery._said
    assert told(recovery.tick(31 + SILENCE_S)) == ["ask 1"]


OPS = st.one_of(
    st.tuples(st.just("publish"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("clear")),
    st.tuples(st.just("hear"), st.integers(1, 4)),
    st.tuples(st.just("restart"), st.integers(0, 6)),
    st.tuples(st.just("blip")),
    st.tuples(st.just("answer"), st.frozensets(st.integers(0, 6), max_size=3), st.booleans()),
    st.tuples(st.just("read"), st.integers(1, 5)),
    st.tuples(st.just("fail")),
    st.tuples(st.just("tick"), st.sampled_from([0.5, 1.0, 6.0, 16.0, 61.0])),
    st.tuples(st.just("spoil")),
    st.tuples(st.just("save")),
    st.tuples(st.just("move")),
)


def play(world, ops):
    for name, *args in ops:
        match name:
            case "publish":
                world.publish(args[0], lost=args[1])
            case "clear":
                world.publish(what="clear")
            case "restart":
                world.restart(args[0])
            case "blip":
                world.live.append(CONNECTED)
            case "answer":
                world.answer(lost=args[0], ends=args[1])
            case "spoil":
                world.spoil()
            case _:
                getattr(world, name)(*args)


@settings(max_examples=600, deadline=None)
@given(st.lists(OPS, max_size=30), st.sampled_from([100, 100, 4, 2, 1]), st.sampled_from([100, 3, 1]), st.booleans())
def test_what_is_called_exact_at_rest_is_and_what_can_be_had_becomes_exact(ops, ring, held, is_connected):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holding, "HELD_MESSAGES", held)
        world = World(ring)
        if is_connected:
            world.live.append(CONNECTED)
        play(world, ops)
        world.settle()
        world.check()
        if world.asked and world.engine.has_all:
            world.check_exact()


@settings(max_examples=300, deadline=None)
@given(st.lists(OPS, max_size=30))
def test_without_replays_what_is_called_exact_lacks_no_message_and_is_of_one_life(ops):
    world = World(replays=False)
    play(world, ops)
    world.settle()
    known = world.consumer.applied
    if world.consumer.is_exact and known:
        lives = [life for life in world.engine.lives if known[-1] in life]
        assert since_clear(known) == since_clear(lives[0][: known[-1].seq + 1])


def test_it_is_behind_only_while_something_is_known_to_be_on_its_way():
    recovery = Recovery()
    assert not recovery.is_behind
    recovery.connected(0)
    assert recovery.is_behind  # nothing is known yet
    recovery.replayed(1, run(0, 1), 0)
    recovery.ended(1, 0)
    assert not recovery.is_behind
    recovery.connected(0)
    assert not recovery.is_behind  # only asked whether there is more
    recovery.replayed(2, run(1), 0)
    assert recovery.is_behind
    recovery.ended(2, 0)
    recovery.connected(0)
    recovery.live(run(2), 0)
    assert recovery.is_behind


def moved(world):
    """The same world in another process."""
    world.save()
    world.publish(2)
    world.hear()
    world.move()
    return world


def test_who_goes_on_from_a_position_asks_for_what_was_said_since():
    world = moved(following(3))
    assert world.recovery.is_behind
    assert world.recovery.is_restored
    world.hear()
    assert [ask.start for ask in world.asked] == [2]
    world.serve()
    assert not world.recovery.is_restored
    assert not world.recovery.is_behind
    world.check_exact()
    assert [message.seq for message in world.consumer.applied] == [0, 1, 2, 3, 4]


def test_who_goes_on_from_a_position_hears_that_the_engine_is_another():
    world = moved(following(3))
    world.engine.restart()
    world.publish(6, lost=True)
    world.hear()
    world.serve()
    world.check_exact()
    assert len(world.consumer.applied) == 6
    assert not world.recovery.is_restored


@pytest.mark.parametrize("how", ["fail", "tick"])
def test_a_position_that_cannot_be_asked_about_is_in_doubt(how):
    world = moved(following(3, replays=True))
    world.replays = False
    world.hear()
    assert world.recovery.is_behind
    world.fail() if how == "fail" else world.tick(16.0)
    assert not world.recovery.is_restored
    assert not world.consumer.is_exact
    world.replays = True
    world.settle()
    world.check_exact()


def test_live_messages_that_go_on_from_a_position_prove_nothing():
    world = moved(following(3))
    world.engine.restart()
    world.publish(5, lost=True)
    world.publish()  # its number would be the one that is due
    world.live.appendleft(CONNECTED)
    world.hear()
    world.serve()
    world.check_exact()


def test_who_goes_on_from_a_position_asks_before_it_believes_what_comes():
    known = following(3).recovery.position
    assert told(Recovery(position=known).live(run(3), 0)) == ["doubt", "ask 2"]
    assert not Recovery(position=known).goes_on(run(3), 0)


def test_it_is_behind_when_a_replay_stopped_in_the_middle():
    recovery = Recovery()
    recovery.connected(0)
    recovery.replayed(1, run(0, 1), 0)
    assert told(recovery.failed(1, 0)) == ["ask 1"]
    assert recovery.is_behind
    assert told(recovery.failed(2, 0)) == ["doubt"]
    assert not recovery.is_behind


@pytest.mark.parametrize(("late_by", "asks"), [(3, 0), (4, 1)])
def test_what_a_replay_said_is_remembered_for_as_long_as_it_may_come_again(monkeypatch, late_by, asks):
    monkeypatch.setattr(recoveries, "SAID_MESSAGES", 3)
    world = following(3)
    world.publish(6)
    late = list(world.live)
    world.live.clear()
    world.publish(lost=True)
    world.connect()
    world.serve()
    world.check_exact()
    world.asked.clear()
    world.live.append(late[len(late) + 1 - late_by])
    world.hear()
    assert len(world.asked) == asks
    world.serve()
    world.check_exact()
