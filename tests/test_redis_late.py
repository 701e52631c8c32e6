"""What a builder said on a connection that it gave up, when it arrives after what it said since.

A network may hold bytes for longer than anybody waits for an answer, and deliver them all the same. Whatever is late
must change nothing: neither bring back what is gone, nor take away what came.
"""

import itertools
from contextlib import contextmanager, suppress

import pytest

from indexer import AllBlocksCleared, IndexUnavailable, MemoryIndex, Source
from indexer.redis.scripts import RELEASE_DYING
from kvevents.faults import Proxy

from .conftest import MODEL, NEEDS_REDIS, removed, stored
from .redis_fleet import begun, nothing_waits, same_content, tokens_of, unlock, until
from .redis_server import somewhere

pytestmark = NEEDS_REDIS
A, B = Source("a"), Source("b")


class Place:
    """A prefix of its own in Redis, seen directly and through a proxy, and what was opened there."""

    def __init__(self, server):
        self._server = server
        self._direct = somewhere(server)
        self.proxy = Proxy("127.0.0.1", server.port)
        self._made = []

    def opened(self, *sources):
        """Open an index that has nothing to do with the proxy."""
        self._made.append(begun(self._direct, sources))
        return self._made[-1]

    def behind_proxy(self, *sources):
        """Open an index whose connections go through the proxy."""
        options = self._direct.partition("?")[2].replace("timeout=5", "timeout=0.1")
        self._made.append(begun(f"redis://127.0.0.1:{self.proxy.port}/0?{options}", sources))
        return self._made[-1]

    def hold(self):
        """Keep what is said from now on on the connections that there are; new ones are free."""
        self.proxy.stall(new_ones=False)

    def arrive(self):
        """Deliver what was kept, and wait until Redis has done it."""
        assert self.proxy.held
        self.proxy.resume()
        until(lambda: not self.proxy.held)
        self._server.client.ping()

    def sweep(self, index):
        """Sweep, whoever did it last."""
        unlock(index)
        while index.sweep():
            pass

    def close(self):
        for index in self._made:
            index.close()
        self.proxy.close()


@pytest.fixture
def place(redis_server):
    place = Place(redis_server)
    yield place
    place.close()


def written(index, source=A):
    """Let what waits be written as it is with the next event, and nothing else."""
    until(lambda: index.apply(source, []) or nothing_waits(index))


@contextmanager
def late_exchange(place, index, chosen):
    """Hold the first exchange with Redis that is chosen by its commands."""
    with pytest.MonkeyPatch.context() as patch:
        run, seen = index._store.run, []

        def watched(commands, **more):
            if not seen and chosen(commands):
                seen.append(commands)
                place.hold()
            return run(commands, **more)

        patch.setattr(index._store, "run", watched)
        yield seen


def first_with(script):
    return lambda commands: any(script in command[:2] for command in commands)


def test_a_store_that_arrives_after_the_removal(place):
    index, reader = place.behind_proxy(A), place.opened()
    index.apply(A, [stored([1], range(4))])
    place.hold()
    index.apply(A, [stored([2], [7] * 4)])  # nobody answers
    index.apply(A, [removed(2)])  # waits with it
    written(index)  # both, in one write, on a new connection
    assert tokens_of(reader, [7] * 4) == {"a": 0}
    place.arrive()
    for _ in range(5):
        index.expire()
    assert tokens_of(reader, [7] * 4) == {"a": 0}
    assert place.opened(A).stats()["held"] == 1  # as its log has it


def test_a_removal_that_arrives_after_the_next_store(place):
    index, reader = place.behind_proxy(A), place.opened()
    index.apply(A, [stored([1], range(4))])
    place.hold()
    index.apply(A, [removed(1)])
    index.apply(A, [stored([1], range(4))])
    written(index)
    assert tokens_of(reader, range(4)) == {"a": 4}
    place.arrive()
    for _ in range(5):
        index.expire()
    assert tokens_of(reader, range(4)) == {"a": 4}
    assert place.opened(A).stats()["held"] == 1


def test_a_write_that_arrives_after_several_others(place):
    index, reader = place.behind_proxy(A), place.opened()
    index.apply(A, [stored([1], range(4))])
    place.hold()
    index.apply(A, [stored([2], [7] * 4)])
    written(index)
    index.apply(A, [removed(2)])
    index.apply(A, [stored([3], [8] * 4)])
    place.arrive()
    assert tokens_of(reader, [7] * 4) == {"a": 0}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_record_that_arrives_after_its_slots_are_anothers(place, when):
    index, other, reader = place.behind_proxy(A), place.opened(B), place.opened()
    index.apply(A, [stored([1], range(4))])
    place.hold()
    index.apply(A, [stored([2], [7] * 4)])
    index.restart(A)
    written(index)
    place.sweep(other)
    other.apply(B, [stored([1], [9] * 4)])  # under the number that was A's
    if when == "before":
        assert tokens_of(reader, [9] * 4) == {"a": 0, "b": 4}
    place.arrive()
    if when == "meanwhile":
        tokens_of(reader, [9] * 4)  # it reads the records while the late one is there
    for _ in range(5):
        index.expire()
        other.expire()
    assert tokens_of(place.opened(), [9] * 4) == {"a": 0, "b": 4}
    assert tokens_of(reader, [9] * 4) == {"a": 0, "b": 4}


def test_a_claim_that_arrives_after_another_builder_followed(place):
    slow, reader = place.behind_proxy(B), place.opened()
    place.hold()
    slow.register(A, model=MODEL)  # nobody answers
    heir = place.opened(A)
    heir.apply(A, [stored([1], range(4))])
    slow.release("a")  # as it is told that its share is another's now
    place.arrive()
    heir.apply(A, [stored([2], range(4, 8), parent=1)])
    for index in (heir, slow):
        index.expire()
    assert heir.stats()["lost_sources"] == 0
    assert tokens_of(reader, range(8))["a"] == 8


def test_a_sweep_that_arrives_after_its_number_is_anothers(place):
    index, other, reader = place.behind_proxy(A), place.opened(B), place.opened()
    index.apply(A, [stored(range(10), range(40))])
    index.restart(A)
    with late_exchange(place, index, first_with(RELEASE_DYING)):
        with suppress(IndexUnavailable):
            index.sweep()
        while index.sweep():
            pass
    other.apply(B, [stored(range(10), range(40))])
    assert tokens_of(reader, range(40)) == {"a": 0, "b": 40}
    place.arrive()
    for one in (index, other):
        one.expire()
    assert tokens_of(reader, range(40)) == {"a": 0, "b": 40}


def life(index, other):
    """What happens to a source, in steps."""
    yield lambda: index.apply(A, [stored([1, 2, 3], range(12))])
    yield lambda: index.apply(A, [removed(3), stored([3], [5] * 4), stored([4], [6] * 4, medium="cpu")])
    yield lambda: index.apply(A, [stored([5], [7] * 4), removed(3)])
    yield lambda: index.restart(A)
    yield lambda: index.apply(A, [stored([1, 2, 3], range(12)), stored([1], range(4))])
    yield lambda: other.apply(B, [stored([1, 2, 3], [5] * 12), stored([4], [6] * 4, medium="cpu")])
    yield lambda: index.apply(A, [AllBlocksCleared(), stored([1], range(4))])
    yield lambda: index.forget("a")
    yield lambda: index.register(A, model=MODEL)
    yield lambda: index.apply(A, [stored([7, 8], range(8)), removed(8)])
    yield lambda: index.degrade(A, "gap")


@pytest.mark.parametrize("at", [None, *range(35)])
def test_whatever_is_late_changes_nothing(place, at):
    """Exchange number `at` is late, be it an event's, a sweep's or a registration's."""
    index, other, reader = place.behind_proxy(A), place.opened(B), place.opened()
    memory = MemoryIndex()
    for source in (A, B):
        memory.register(source, model=MODEL)
    numbers = itertools.count()
    with late_exchange(place, index, lambda commands: commands and next(numbers) == at) as seen:
        for step, expected in zip(life(index, other), life(memory, memory), strict=True):
            step()
            expected()
            with suppress(IndexUnavailable):
                index.sweep()
        written(index)
    place.sweep(other)
    if seen:
        place.arrive()
    texts = [range(12), [5] * 12, [6] * 4, [7] * 4]
    for text in texts:
        tokens_of(reader, text)
    for _ in range(3):
        for one in (index, other):
            one.expire()
            place.sweep(one)
    for text in texts:
        assert tokens_of(reader, text) == tokens_of(place.opened(), text) == tokens_of(memory, text)
    assert same_content(place.opened(), memory)
    assert nothing_waits(index, other)
    assert not index.stats()["lost_sources"]
