"""When recovery asks: in a silence, how long it waits, and the more seldom the less it helps."""

from itertools import pairwise

import pytest

from kvevents.actions import Ask
from kvevents.recovery import COOL_DOWN_S, MOST_COOL_DOWN_S, MOST_SILENCE_S, PATIENCE_S, SILENCE_S, Recovery

from .recovering import World, following, late, run, told


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


def test_a_failed_question_in_a_silence_changes_nothing():
    world = following(2)
    world.tick(SILENCE_S + 1)
    world.publish()
    world.hear()
    world.fail()
    world.check_exact()
    world.tick(COOL_DOWN_S)
    assert told(world.asked) == ["ask 1"]


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
