"""Recovery against a simulated engine: messages that are lost, held back, and had again."""

import pytest

from kvevents import held as holding
from kvevents import recovery as recoveries
from kvevents.recovery import COOL_DOWN_S, MOST_COOL_DOWN_S, PATIENCE_S, SILENCE_S, Recovery

from .recovering import World, following, late, run, told


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


def test_what_nobody_asked_for_is_not_heard():
    recovery = Recovery()
    assert recovery.tick(SILENCE_S + 1) == []
    assert recovery.replayed(1, run(0), 0) == recovery.ended(1, 0) == recovery.failed(1, 0) == []


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
