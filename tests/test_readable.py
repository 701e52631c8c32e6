"""Waiting for sockets through their descriptors, against what was sent."""

import random

import pytest
import zmq

from kvevents.readable import Readable


@pytest.fixture
def paired():
    """Make pairs of connected sockets."""
    context, opened = zmq.Context(), []

    def pair(number):
        one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        one.bind(f"inproc://pair-{number}")
        other.connect(f"inproc://pair-{number}")
        opened.extend([one, other])
        return one, other

    yield pair
    for socket in opened:
        socket.close(0)
    context.term()


def read(socket, most):
    """Read up to so many messages; give them, and whether there were no more."""
    found = []
    try:
        while len(found) < most:
            found.append(int(socket.recv(zmq.NOBLOCK)))
    except zmq.Again:
        return found, True
    return found, False


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_was_sent_is_overlooked(paired, seed):
    rng = random.Random(seed)
    readable, pairs = Readable(), [paired(number) for number in range(40)]
    sent, got = [[] for _ in pairs], [[] for _ in pairs]
    numbers = {}
    for number, (_, there) in enumerate(pairs):
        if rng.random() < 0.3:  # before anybody watches
            pairs[number][0].send(b"%d" % len(sent[number]))
            sent[number].append(len(sent[number]))
        readable.register(there)
        numbers[there] = number
    for _ in range(400):
        for number in rng.sample(range(40), rng.randrange(4)):
            for _ in range(rng.choice([1, 1, 2, 30])):
                pairs[number][0].send(b"%d" % len(sent[number]))
                sent[number].append(len(sent[number]))
            if rng.random() < 0.2:  # a descriptor that was told, and looked at in between
                readable.again(pairs[number][1])
                pairs[number][1].send(b"")
        while got != sent:
            ready = readable.wait(10_000)
            assert ready
            for socket in ready:
                found, is_empty = read(socket, rng.choice([1, 3, 100]))
                got[numbers[socket]] += found
                if not is_empty:
                    readable.again(socket)
    for socket in readable.wait(0):  # told of something that was read already
        assert read(socket, 1) == ([], True)
    readable.close()


def test_what_is_not_watched_is_not_named(paired):
    readable, (one, other) = Readable(), paired(0)
    readable.register(other)
    assert readable.wait(0) == {other}  # it may have had something before
    one.send(b"1")
    readable.unregister(other)
    assert readable.wait(0) == set()
    readable.register(other)
    assert readable.wait(None) == {other}
    readable.close()
