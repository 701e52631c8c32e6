"""A pool that goes on from a snapshot: real publishers, and what they said while nobody listened."""

import socket

import pytest

from indexer import InvalidQuestion, Limits, Source, open_index, snapshots
from kvevents import EventPool, Message, position
from kvevents import pool as pools
from kvevents import recovery as recoveries
from kvevents.testing import Publisher, stored
from kvevents.wire import decode_batch

from .conftest import HAS_CORE, MODEL
from .test_replay import POD, Engine, is_exact, status, until

IMPLS = ["python", "native"] if HAS_CORE else ["python"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pools, "_EXPIRE_EVERY_S", 0.02)
    monkeypatch.setattr(recoveries, "COOL_DOWN_S", 0.05)


@pytest.fixture(params=IMPLS)
def url(request):
    return f"memory://?impl={request.param}"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "snapshot"


def followed(engine, url, path, *, events=20, **more):
    """Follow an engine for a while, and write a snapshot."""
    index = open_index(url)
    with EventPool(index) as pool:
        engine.follow(pool, **more)
        for _ in range(events):
            engine.store()
        until(lambda: is_exact(index, engine))
        snapshots.write_snapshot(path, pool.snapshot())
    index.close()


def resumed(url, path, **more):
    index = open_index(url)
    pool = EventPool(index, **more)
    pool.load(snapshots.read_snapshot(path))
    return index, pool


def test_what_was_said_meanwhile_is_asked_for_and_no_more(url, path):
    engine = Engine()
    followed(engine, url, path)
    engine.remove(7)
    engine.store()
    index, pool = resumed(url, path)
    assert status(index).blocks == 20
    assert status(index).degraded.startswith("behind: loaded")
    assert pool.sequences() == {Source(POD): 19}
    engine.publisher.answer_delay_s = 1.0  # else it is over before anybody looks
    with pool:
        engine.follow(pool)
        assert pool.awaited()[POD] in ("connection", "replay")
        engine.publisher.answer_delay_s = 0.0
        until(lambda: is_exact(index, engine))
        until(lambda: not pool.awaited())
        assert pool.stats()["recovered_total"] == 2
        engine.store()
        until(lambda: is_exact(index, engine))
    engine.publisher.close()


def test_a_ring_that_goes_back_to_the_snapshot_is_all_it_takes(url, path):
    engine = Engine(buffer_steps=5)
    index = open_index(url)
    with EventPool(index) as pool:
        engine.follow(pool)
        until(lambda: is_exact(index, engine))
        for _ in range(20):
            engine.store()
            until(lambda: is_exact(index, engine))
        snapshots.write_snapshot(path, pool.snapshot())
    for _ in range(4):
        engine.store()
    cold, warm = open_index(url), open_index(url)
    with EventPool(cold) as pool:
        engine.follow(pool)
        until(lambda: status(cold).blocks == 5 and status(cold).degraded.startswith("gap"))
    with EventPool(warm) as pool, pytest.raises(InvalidQuestion):
        pool.load(())
    pool = EventPool(warm)
    pool.load(snapshots.read_snapshot(path))
    with pool:
        engine.follow(pool)
        until(lambda: is_exact(warm, engine))
    engine.publisher.close()


def test_what_the_ring_has_lost_is_a_gap(url, path):
    engine = Engine(buffer_steps=5)
    followed(engine, url, path, events=5)
    for _ in range(9):
        engine.store()
    index, pool = resumed(url, path)
    with pool:
        engine.follow(pool)
        until(lambda: status(index).degraded.startswith("gap"))
        assert status(index).blocks == 10
    engine.publisher.close()


def test_an_engine_that_restarted_meanwhile_begins_anew(url, path):
    engine = Engine()
    followed(engine, url, path)
    engine.restart()
    for _ in range(25):
        engine.store()
    index, pool = resumed(url, path)
    with pool:
        engine.follow(pool)
        until(lambda: is_exact(index, engine))
        assert pool.stats()["restarts_total"] == 1
    engine.publisher.close()


def test_without_replay_nobody_knows_what_was_said_meanwhile(url, path):
    engine = Engine(replay=None)
    index = open_index(url)
    with EventPool(index) as pool:
        pool.subscribe(POD, engine.publisher.endpoint, model=MODEL)
        engine.publisher.wait_for_subscribers()
        engine.store()
        until(lambda: is_exact(index, engine))
        snapshots.write_snapshot(path, pool.snapshot())
    until(lambda: engine.publisher.subscribers == 0)
    index, pool = resumed(url, path)
    assert status(index).degraded.startswith("unsure")
    with pool:
        pool.subscribe(POD, engine.publisher.endpoint, model=MODEL)
        engine.publisher.wait_for_subscribers()
        engine.store()
        until(lambda: status(index).blocks == 2)
        assert status(index).degraded.startswith("unsure")
        assert not pool.awaited()
        engine.clear()
        until(lambda: is_exact(index, engine))
    engine.publisher.close()


def test_replays_that_are_switched_off_meanwhile_leave_it_unsure(url, path):
    engine = Engine()
    followed(engine, url, path)
    index, pool = resumed(url, path)
    with pool:
        pool.subscribe(POD, engine.publisher.endpoint, model=MODEL)
        assert status(index).degraded.startswith("unsure")
    engine.publisher.close()


def test_a_replay_that_is_refused_leaves_it_unsure_until_it_is_had(url, path, monkeypatch):
    from kvevents import replays

    monkeypatch.setattr(replays, "ANSWER_S", 0.1)
    engine = Engine()
    followed(engine, url, path)
    index, pool = resumed(url, path)
    with pool:
        pool.subscribe(POD, engine.publisher.endpoint, replay="tcp://127.0.0.1:9", model=MODEL)
        until(lambda: status(index).degraded.startswith("unsure"))
        assert not pool.awaited()
    engine.publisher.close()


@pytest.mark.parametrize("what", ["endpoint", "model"])
def test_a_pod_that_is_another_by_now_begins_anew(url, path, what):
    engine = Engine()
    followed(engine, url, path)
    index, pool = resumed(url, path)
    with pool:
        if what == "endpoint":
            engine.publisher.close()
            engine = Engine()
            engine.follow(pool)
        else:
            until(lambda: engine.publisher.subscribers == 0)
            pool.subscribe(POD, engine.publisher.endpoint, model="another")
            engine.publisher.wait_for_subscribers()
            assert status(index).model == "another"
        assert status(index).blocks == 0
        engine.store()
        until(lambda: status(index).blocks == 1)
    engine.publisher.close()


def test_several_publishers_of_a_pod_go_on_each_by_itself(url, path):
    engines = [Publisher("tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0", rank=rank) for rank in (0, 1)]
    index = open_index(url)

    def follow(pool):
        for engine in engines:
            pool.subscribe(POD, engine.endpoint, replay=engine.replay, model=MODEL)

    def exact(index, blocks):
        known = {s.source.rank: (s.blocks, s.degraded) for s in index.sources()}
        return known == {0: (blocks, ""), 1: (blocks, "")}

    for rank, engine in enumerate(engines):
        engine.publish([stored("vllm-map", [rank + 1], None, [rank] * 4, 4)])
    with EventPool(index) as pool:
        follow(pool)
        until(lambda: exact(index, 1))
        snapshots.write_snapshot(path, pool.snapshot())
    for rank, engine in enumerate(engines):
        engine.publish([stored("vllm-map", [rank + 11], rank + 1, [rank] * 4, 4)])
    index, pool = resumed(url, path)
    assert len(index.sources()) == 2
    with pool:
        follow(pool)
        until(lambda: exact(index, 2))
        assert pool.stats()["recovered_total"] == 2
    for engine in engines:
        engine.close()


def test_pods_that_nobody_follows_any_more_are_forgotten(url, path):
    engine = Engine()
    index = open_index(url)
    with EventPool(index) as pool:
        engine.follow(pool)
        engine.store()
        until(lambda: is_exact(index, engine))
        payload = stored("vllm-map", [5], None, [5] * 4, 4)
        with Publisher("tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0") as other:
            other.publish([payload])
            pool.subscribe("gone", other.endpoint, replay=other.replay, model=MODEL)
            until(lambda: status(index, "gone").blocks == 1)
            snapshots.write_snapshot(path, pool.snapshot())
    index, pool = resumed(url, path, pod_timeout_s=0.2)
    assert status(index, "gone").blocks == 1
    with pool:
        engine.follow(pool)
        until(lambda: not pool.awaited())
        until(lambda: status(index, "gone") is None)
        assert is_exact(index, engine)
        assert pool.stats()["forgotten_total"] == 1
        snapshots.write_snapshot(path, pool.snapshot())
    assert [position.decode(part.note).pod for part in snapshots.read_snapshot(path)] == [POD]
    engine.publisher.close()


def test_pods_that_come_by_themselves_go_on_in_doubt(url, path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        at = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    index = open_index(url)
    topic = f"kv@{POD}@{MODEL}".encode()
    with EventPool(index) as pool:
        pool.bind(at)
        with Publisher(at, connect=True, topic=topic) as publisher:
            publisher.wait_for_subscribers()
            publisher.publish([stored("vllm-map", [1], None, [1] * 4, 4)])
            until(lambda: status(index) and not status(index).degraded)
            snapshots.write_snapshot(path, pool.snapshot())
    (part,) = snapshots.read_snapshot(path)
    assert [rank.last for rank in position.decode(part.note).publishers[0].ranks] == [0]
    index, pool = resumed(url, path, silent_timeout_s=0.3)
    assert status(index).degraded.startswith("unsure")
    with pool:
        pool.bind(at)
        until(lambda: status(index) is None)


def test_a_snapshot_of_a_resumed_pool_that_heard_nothing_says_the_same(url, path):
    engine = Engine()
    followed(engine, url, path)
    engine.publisher.close()
    (before,) = [position.decode(part.note) for part in snapshots.read_snapshot(path)]
    _, pool = resumed(url, path)
    (loaded,) = [position.decode(part.note) for part in pool.snapshot()]
    assert loaded == before
    with pool:
        engine.follow(pool)
        (subscribed,) = [position.decode(part.note) for part in pool.snapshot()]
    assert subscribed == before
    assert before.publishers[0].position == (19, before.publishers[0].digest, True)


def test_a_snapshot_that_cannot_be_used_leaves_nothing(url, path):
    engine = Engine()
    followed(engine, url, path)
    engine.publisher.close()
    (part,) = snapshots.read_snapshot(path)
    index = open_index(url)
    pool = EventPool(index)
    for broken in (
        snapshots.Part(b"\xc1", part.sources),
        snapshots.Part(part.note, [part.sources[0], part.sources[0]]),
        snapshots.Part(part.note, [part.sources[0][:-3]]),
        snapshots.Part(position.encode(position.PodPosition("another", [])), part.sources),
    ):
        with pytest.raises(snapshots.SnapshotError):
            pool.load([part, broken] if broken.note == b"\xc1" else [broken])
        assert index.sources() == []
        assert pool.sequences() == {}
    assert pool.load([part]) == 1
    assert status(index).blocks == 20
    with pytest.raises(InvalidQuestion, match="before anything"):
        pool.load([part])
    small = open_index(url, limits=Limits(max_sources=1))
    with pytest.raises(snapshots.SnapshotError):
        EventPool(small).load([part, snapshots.Part(position.encode(position.PodPosition(POD, [])), part.sources)])
    assert small.sources() == []


def test_what_somebody_applied_himself_is_kept_too(url, path):
    index = open_index(url)
    index.register(Source("mine"), model=MODEL)
    with Publisher("tcp://127.0.0.1:0") as publisher:
        publisher.publish([stored("vllm-map", [1], None, [1] * 4, 4)])
    pool = EventPool(index)
    batch = decode_batch(b"\x93\xcb\x00\x00\x00\x00\x00\x00\x00\x00\x90\xc0")
    index.apply(Source("mine"), batch.events)
    snapshots.write_snapshot(path, pool.snapshot())
    other, pool = resumed(url, path)
    assert [s.source for s in other.sources()] == [Source("mine")]
    with pool:
        pool.submit(Message(topic=b"kv@mine@m", seq=0, payload=b"\xc1"))
        pool.drain()
    assert other.sources()[0].degraded == index.sources()[0].degraded
