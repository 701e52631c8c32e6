"""Waiting for sockets through their descriptors, against what was sent."""

import random

import pytest
import zmq

from kvevents.readable import Readable


@pytest.fixture
def context():
    with zmq.Context() as made:
        made.set(zmq.BLOCKY, 0)
        yield made


def pair(context, number):
    one, other = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    one.bind(f"inproc://pair-{number}")
    other.connect(f"inproc://pair-{number}")
    return one, other


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
def test_nothing_that_was_sent_is_overlooked(context, seed):
    rng = random.Random(seed)
    readable, pairs = Readable(), [pair(context, number) for number in range(40)]
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
    assert readable.wait(0) == set()
    readable.close()
    for one, other in pairs:
        one.close(0)
        other.close(0)


def test_what_is_not_watched_is_not_named(context):
    readable, (one, other) = Readable(), pair(context, 0)
    readable.register(other)
    assert readable.wait(0) == {other}  # it may have had something before
    one.send(b"1")
    readable.unregister(other)
    assert readable.wait(0) == set()
    readable.register(other)
    assert readable.wait(None) == {other}
    readable.close()
    one.close(0)
    other.close(0)
