"""An index in a Redis that loses what it had, does not answer, or is full."""

import time

import pytest

from indexer import AllBlocksCleared, IndexUnavailable, MemoryIndex, Prompt, RedisIndex, Source
from indexer.redis import sweep

from .conftest import MODEL, NEEDS_REDIS, POD, blocks_in, removed, stored
from .redis_fleet import FLEET, Fleet, begun, by_source, nothing_waits, same_content, tokens_of, unlock, until

pytestmark = NEEDS_REDIS


@pytest.mark.parametrize("how", ["killed", "flushed"])
def test_a_server_that_is_empty_is_filled_again(own_server, how):
    fleet = Fleet(own_server.url, builders=2)
    for number in range(4):
        fleet.live(30)
        fleet.settle()
        if how == "killed":
            own_server.kill()
            if number % 2:
                fleet.live(10)
            own_server.start()
        else:
            own_server.client.flushall()
        if number > 1:
            fleet.live(10)
        fleet.settle()
    assert all(builder.stats()["rewritten_total"] for builder in fleet.builders)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("then", ["store", "remove", "clear", "restart", "forget"])
def test_in_an_empty_database_nobody_gets_the_blocks_of_another(own_server, first, then):
    # who writes first gets the number that another had before
    texts, builders = [list(range(32)), list(range(100, 132))], []
    for pod, text in zip("ab", texts, strict=True):
        builders.append(begun(own_server.url, [Source(pod)]))
        builders[-1].apply(Source(pod), [stored([1, 2], text[:8])])
    reader = RedisIndex(own_server.url)
    assert tokens_of(reader, texts[0]) == {"a": 8, "b": 0}
    own_server.client.flushall()
    for number in (first, 1 - first):
        builder, source = builders[number], Source("ab"[number])
        if then == "store":
            builder.apply(source, [stored([3], texts[number][8:12], parent=2)])
        elif then == "remove":
            builder.apply(source, [removed(2)])
        elif then == "clear":
            builder.apply(source, [AllBlocksCleared()])
        elif then == "restart":
            builder.restart(source)
        else:
            builder.forget(source.pod)
        builder.expire()
        for other in builders:
            while other.sweep():
                pass
    held = {"store": 12, "remove": 4}.get(then, 0)
    pods = "ab" if then != "forget" else ""
    for index in (reader, *builders, RedisIndex(own_server.url)):
        for number, text in enumerate(texts):
            assert tokens_of(index, text) == {pod: held * (pod == "ab"[number]) for pod in pods}
    assert blocks_in(builders[0]) == 2 * held // 4
    builders = [begun(own_server.url, [Source(pod)]) for pod in pods]
    assert [builder.stats()["held"] for builder in builders] == [held // 4 for _ in pods]


def test_an_older_view_is_not_taken_for_one_of_a_new_database(own_server):
    builders = [begun(own_server.url, [Source(pod)]) for pod in "ab"]
    for pod, builder in zip("ab", builders, strict=True):
        builder.apply(Source(pod), [stored([1], [ord(pod)] * 4)])
    reader = RedisIndex(own_server.url)
    assert tokens_of(reader, [ord("a")] * 4) == {"a": 4, "b": 0}
    version = builders[0]._layout.of(MODEL).version
    before = own_server.client.get(version)
    own_server.client.flushall()
    for builder in reversed(builders):  # the other way round: numbers change hands
        builder.expire()
    for number in range(50):
        if own_server.client.get(version) == before:
            break
        builders[0].degrade(Source("a"), f"gap {number}")
    assert tokens_of(reader, [ord("a")] * 4) == {"a": 4, "b": 0}


def test_a_server_that_does_not_answer(own_server):
    fleet = Fleet(own_server.url + "?timeout=0.1", builders=2)
    fleet.live(40)
    fleet.settle()
    own_server.freeze()
    began = time.monotonic()
    with pytest.raises(IndexUnavailable, match=r"127\.0\.0\.1"):
        fleet.reader.match(Prompt(range(8), "m"))
    assert time.monotonic() - began < 2
    fleet.live(60)
    for builder in fleet.builders:
        builder.expire()
    assert time.monotonic() - began < 10
    assert all(builder.stats()["write_failures_total"] for builder in fleet.builders)
    own_server.thaw()
    fleet.settle()


def test_what_waits_for_a_server_is_bounded(own_server):
    fleet = Fleet(own_server.url + "?timeout=0.1", buffer_bytes=20_000)
    fleet.live(40)
    fleet.settle()
    (builder,) = fleet.builders
    own_server.freeze()
    for number in range(100):
        text = [number + 1000] * 80
        fleet.tell(Source("a"), "apply", (Source("a"), [stored(range(1000 * number, 1000 * number + 20), text)]))
        assert builder.stats()["write_waiting_bytes"] <= 20_000
    fleet.live(30)
    assert builder.stats()["stale_sources"] == len(FLEET)
    own_server.thaw()
    fleet.settle()
    assert builder.stats()["rewritten_total"] >= len(FLEET)


def test_a_source_whose_writes_were_dropped_is_written_anew(own_server):
    index, memory = RedisIndex(own_server.url + "?timeout=0.1", buffer_bytes=5000), MemoryIndex()
    for one in (index, memory):
        one.register(POD, model=MODEL)
        one.apply(POD, [stored([1], range(4))])
    own_server.freeze()
    for number in range(100):  # all in a slot that Redis knows
        for one in (index, memory):
            one.apply(POD, [stored([number + 2], [number] * 4)])
    assert index.stats()["write_waiting_bytes"] == 0
    own_server.thaw()
    until(lambda: nothing_waits(index), index)
    assert index.stats()["rewritten_total"] == 1
    until(lambda: same_content(index, memory), index)


def test_much_that_waited_is_written_within_the_time_for_an_answer(own_server):
    index, memory = RedisIndex(own_server.url + "?timeout=0.05"), MemoryIndex()
    for one in (index, memory):
        one.register(POD, model=MODEL)
        one.apply(POD, [stored([1], [1] * 4)])
    own_server.freeze()
    for number in range(100):
        event = stored(range(5000 * number + 10, 5000 * (number + 1)), [number] * (4 * 4990))
        for one in (index, memory):
            one.apply(POD, [event])
    own_server.thaw()
    until(lambda: nothing_waits(index), index)
    assert index.stats()["rewritten_total"] == 0
    assert same_content(RedisIndex(own_server.url + "?timeout=10"), memory)


def test_a_source_that_was_forgotten_while_nobody_answered_does_not_come_back(own_server):
    index = begun(own_server.url + "?timeout=0.1", [POD])
    index.apply(POD, [stored([1], range(4))])
    own_server.freeze()
    index.forget(POD.pod)
    own_server.thaw()
    index.register(POD, model=MODEL)
    assert index.stats()["held"] == 0
    until(lambda: tokens_of(index, range(4)) == {POD.pod: 0}, index)
    index.apply(POD, [stored([2], range(4, 8)), removed(2)])
    until(lambda: nothing_waits(index), index)
    assert blocks_in(index) == 0


def test_a_builder_that_came_while_nobody_answered_follows_its_source(own_server):
    begun(own_server.url, [POD]).apply(POD, [stored([1], range(4)), stored([2], [7] * 4)])
    own_server.freeze()
    index = begun(own_server.url + "?timeout=0.1", [POD])
    index.apply(POD, [stored([1], range(4))])
    own_server.thaw()
    until(lambda: nothing_waits(index), index)
    index.apply(POD, [stored([3], range(4, 8), parent=1)])
    reader = RedisIndex(own_server.url)
    assert tokens_of(reader, range(8)) == {POD.pod: 8}
    assert tokens_of(reader, [7] * 4) == {POD.pod: 0}
    until(lambda: blocks_in(index) == 2, index)


def test_a_write_that_is_tried_again_takes_nothing_from_who_came_in_between(redis_url, monkeypatch):
    index, other = begun(redis_url, [POD]), begun(redis_url, [Source("heir")])
    index.apply(POD, [stored(range(100), [1] * 400)])
    run = index._store.run

    def unheard(commands, **more):
        run(commands, **more)
        raise IndexUnavailable("the answer never came")

    monkeypatch.setattr(index._store, "run", unheard)
    index.restart(POD)
    monkeypatch.undo()
    while other.sweep():
        pass
    other.apply(Source("heir"), [stored(range(100), [1] * 400)])
    until(lambda: nothing_waits(index), index)
    unlock(index)
    index.sweep()
    assert tokens_of(index, [1] * 400) == {POD.pod: 0, "heir": 400}
    assert begun(redis_url, [Source("heir")]).stats()["held"] == 100


def test_a_full_server(own_server):
    fleet = Fleet(own_server.url, builders=2)
    fleet.live(40)
    fleet.settle()
    own_server.client.config_set("maxmemory-policy", "noeviction")
    own_server.client.config_set("maxmemory", own_server.client.info("memory")["used_memory"] + 100_000)
    text = [0]
    while not all(builder.stats()["write_failures_total"] for builder in fleet.builders):
        for source in (Source("a"), Source("b")):
            text = [text[0] + 1] * 2000
            fleet.tell(source, "apply", (source, [stored(range(1000 * text[0], 1000 * text[0] + 1000), text, size=2)]))
        assert text[0] < 400
    fleet.live(60)
    for builder in fleet.builders:
        builder.expire()
    assert isinstance(fleet.reader.match(Prompt(range(8), "m")), list)
    assert not nothing_waits(*fleet.builders)
    own_server.client.config_set("maxmemory", 0)
    fleet.settle()


def test_a_full_server_says_what_it_has_no_room_for(own_server, monkeypatch):
    if int(own_server.client.info("server")["redis_version"].partition(".")[0]) < 7:
        pytest.skip("before Redis 7 nothing can be freed by a script while it is full")
    index, memory = RedisIndex(own_server.url), MemoryIndex()
    reader, pods = RedisIndex(own_server.url), [Source(name) for name in "abcdef"]
    for one in (index, memory):
        for pod in pods:
            one.register(pod, model=MODEL)
    text = {pod: [number] * 16_000 for number, pod in enumerate(pods)}

    def both(what, *args):
        for one in (index, memory):
            getattr(one, what)(*args)
        for _ in range(3):
            index._flusher.retry_at = 0.0
            index.expire()
        for pod, tokens in text.items():
            found, expected = (by_source(one.match(Prompt(tokens, MODEL)))[pod] for one in (reader, memory))
            if found.degraded:
                assert found.degraded.startswith("full: ")
                assert found.tokens == 0
                shed.add(pod)
            else:
                assert found.tokens == expected.tokens

    shed = set()
    own_server.client.config_set("maxmemory-policy", "noeviction")
    own_server.client.config_set("maxmemory", own_server.client.info("memory")["used_memory"] + 1_500_000)
    for pod in pods:
        both("apply", pod, [stored(range(4000), text[pod])])
    assert 0 < len(shed) < len(pods)
    for pod in pods:  # what is shed is not written, what is there is taken out although it is full
        both("apply", pod, [removed(*range(3000, 4000))])
    for pod in pods[:4]:
        both("restart", pod)
    monkeypatch.setattr(sweep, "_ORPHAN_S", 0.0)
    until(lambda: nothing_waits(index) and same_content(index, memory), index)
    assert [holding.degraded for holding in reader.match(Prompt(text[pods[5]], MODEL))] == [""] * 6
