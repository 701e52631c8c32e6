"""Blocks that nobody sees any more are swept out of Redis, by whoever comes."""

import itertools

import pytest

from indexer import RedisIndex, Source
from indexer.redis import sweep

from .conftest import MODEL, NEEDS_REDIS, POD, blocks_in, names_in, stored
from .redis_fleet import begun, tokens_of, unlock

pytestmark = NEEDS_REDIS


def test_a_sweep_is_done_in_portions_by_whoever_comes(redis_url, monkeypatch):
    monkeypatch.setattr(sweep, "_SWEEP_BYTES", 1000)
    index = begun(redis_url, [POD, Source("b")])
    for source in (POD, Source("b")):
        for number in range(40):
            index.apply(source, [stored(range(20 * number, 20 * number + 20), [number] * 80)])
    run, names = index._store.run, index._layout.of(MODEL)
    before = sum(run([("STRLEN", part.log(0)) for part in names.parts]))
    index.forget(POD.pod)
    assert index.sweep(3) == 3
    (mark,) = run([("HGET", names.home.dying, 0)])
    assert 0 < int(mark.rpartition(b":")[2]) < before / 2
    other = RedisIndex(redis_url)
    assert other.sweep() == 0  # one at a time
    unlock(index)
    done = 0
    while portions := other.sweep(2):
        assert portions <= 2
        done += portions
    assert before / 1000 / 3 < done < before / 200
    assert index.sweep() == 0
    for key in (names.retired, *(name for part in names.parts for name in (part.log(0), part.dying, part.guard(0)))):
        assert not run([("EXISTS", key)])[0]
    assert tokens_of(other, [3] * 80) == {"b": 80}
    other.forget("b")
    assert tokens_of(other, [3] * 80) == {"b": 80}  # it never was its own
    index.forget("b")
    unlock(index)
    assert blocks_in(index) == 0
    left = {name.rpartition(b"}")[2].rpartition(b":")[2][:1] for name in names_in(index)}
    assert left <= {b"d", b"n", b"m", b"s", b"v", b"w"}
    assert not run([("BITCOUNT", names.numbers)])[0]


def test_a_log_entry_longer_than_a_portion_is_swept(redis_url, monkeypatch):
    monkeypatch.setattr(sweep, "_SWEEP_BYTES", 100)
    index = begun(redis_url, [POD])
    index.apply(POD, [stored(range(5000), [1] * 20_000), stored([6000], [2] * 4)])
    index.restart(POD)
    assert blocks_in(index) == 0


def test_numbers_of_slots_are_used_again(redis_url):
    index = begun(redis_url, [POD])
    for number in range(50):
        index.apply(POD, [stored([1, 2], [number] * 8), stored([1], [number] * 4, medium="cpu")])
        index.restart(POD)
        index.expire()
    (bits,) = index._store.run([("GET", index._layout.of(MODEL).numbers)])
    assert len(bits) == 1
    assert index.stats()["swept_total"] == 100


def test_numbers_that_nobody_came_to_use_are_found(redis_url, monkeypatch):
    index = begun(redis_url, [POD])
    index.apply(POD, [stored([1], range(4))])
    killed = begun(redis_url, [Source("b")])
    monkeypatch.setattr(killed._directory, "publish_due", lambda: None)
    killed.apply(Source("b"), [stored([1, 2], [8] * 8)])
    assert blocks_in(index) == 3
    monkeypatch.setattr(sweep, "_ORPHAN_S", 0.0)
    index.expire()
    assert blocks_in(index) == 1
    index.register(Source("c"), model=MODEL)
    index.apply(Source("c"), [stored([1], range(4))])
    assert tokens_of(index, range(4)) == {POD.pod: 4, "b": 0, "c": 4}
    assert index._store.run([("BITCOUNT", index._layout.of(MODEL).numbers)]) == [2]


@pytest.mark.parametrize("at", range(12))
def test_who_lost_the_lock_of_the_sweep_does_no_harm(redis_url, monkeypatch, at):
    """One that stands still at any step of its sweep, while others end it and use the number again, and goes on."""
    slow, quick = begun(redis_url, [POD]), RedisIndex(redis_url)
    slow.apply(POD, [stored(range(100), [1] * 400)])
    slow.restart(POD)
    run = slow._store.run
    steps = itertools.count()

    def stands_still(commands, **more):
        if next(steps) == at:
            unlock(quick)
            while quick.sweep():
                pass
            quick.register(Source("heir"), model=MODEL)
            quick.apply(Source("heir"), [stored(range(100), [1] * 400)])
        return run(commands, **more)

    monkeypatch.setattr(slow._store, "run", stands_still)
    slow.sweep()
    monkeypatch.undo()
    unlock(quick)
    for index in (quick, slow):
        while index.sweep():
            pass
        unlock(quick)
    expected = {POD.pod: 0} | ({"heir": 400} if next(steps) > at else {})
    assert tokens_of(RedisIndex(redis_url), [1] * 400) == expected
    heir = begun(redis_url, [Source("heir")])
    assert heir.stats()["held"] == 100 * ("heir" in expected)
