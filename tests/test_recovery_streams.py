"""Recovery against a simulated engine: whatever is lost, late or restarted, nothing wrong is ever called exact."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvevents import held as holding

from .recovering import CONNECTED, World, since_clear

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
