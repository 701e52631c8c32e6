"""Recovery against a simulated engine: engines that began anew, connections, and positions to go on from."""

import pytest

from kvevents.recovery import COOL_DOWN_S, SILENCE_S, Recovery

from .recovering import CONNECTED, World, following, moved, run, told


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
