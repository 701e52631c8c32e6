"""An index in a cluster whose nodes die, lose what they had, and give slots to each other."""

import asyncio
import random
import threading
import time

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from indexer import AsyncRedisReader, IndexUnavailable, MemoryIndex, Prompt, RedisIndex, Source

from .conftest import MODEL, NEEDS_REDIS, POD, stored
from .redis_fleet import Fleet, begun, by_source, nothing_waits, same_content, tokens_of, until
from .redis_server import somewhere

pytestmark = NEEDS_REDIS


@pytest.fixture
def cluster(redis_cluster):
    """A cluster that a test may harm."""
    redis_cluster.flush()
    yield redis_cluster
    redis_cluster.heal()
    redis_cluster.flush()


@pytest.mark.parametrize("what", ["records", "blocks"])
def test_a_master_that_dies_while_builders_write(cluster, what):
    url = somewhere(cluster)
    fleet = Fleet(url, builders=2)
    names = RedisIndex(url)._layout.of("m")
    key = names.directory if what == "records" else names.parts[5].dying
    for _ in range(2):
        fleet.live(40)
        fleet.settle()
        dead = cluster.owner_of(key)
        killing = threading.Thread(target=cluster.kill_master_of, args=(key,))
        killing.start()
        while killing.is_alive():
            fleet.live(5)
            for builder in fleet.builders:
                builder.expire()
        killing.join()
        fleet.settle()
        cluster.restart(dead)
        fleet.live(20)
        fleet.settle()
    assert all(builder.stats()["write_failures_total"] for builder in fleet.builders)


def test_questions_while_a_master_is_dead(cluster):
    url = somewhere(cluster)
    index = begun(url, [POD])
    index.apply(POD, [stored(range(600), range(2400))])
    names = index._layout.of(MODEL)
    asked, answers, done = Prompt(range(2400), MODEL), [], threading.Event()

    def ask():
        reader = RedisIndex(url)
        while not done.is_set():
            try:
                answers.append([holding.tokens for holding in reader.match(asked)])
            except IndexUnavailable:
                answers.append(None)

    async def ask_in_a_loop():
        reader = AsyncRedisReader(url)
        while not done.is_set():
            try:
                answers.append([holding.tokens for holding in await reader.match(asked)])
            except IndexUnavailable:
                answers.append(None)
            await asyncio.sleep(0)
        await reader.close()

    threads = [threading.Thread(target=ask), threading.Thread(target=lambda: asyncio.run(ask_in_a_loop()))]
    for thread in threads:
        thread.start()
    try:
        cluster.replicate()
        cluster.kill_master_of(names.parts[9].dying)
        count = len(answers)
        until(lambda: len(answers) > count + 20 and all(answers[-10:]))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert None in answers
    assert {tuple(answer) for answer in answers if answer is not None} == {(2400,)}


# ---- older copies that take over


def snapshot(client):
    return {key: (max(0, client.pttl(key)), client.dump(key)) for key in client.keys()}  # noqa: SIM118


def restore(client, kept):
    client.flushall()
    for key, (ttl, value) in kept.items():
        client.restore(key, ttl, value)


@given(seed=st.integers(0, 2**32), steps=st.lists(st.sampled_from(["live", "keep", "sweep", "lose"]), max_size=12))
@settings(max_examples=25, deadline=None, phases=set(Phase) - {Phase.shrink})  # a failure takes its time to be seen
def test_nodes_whose_older_copies_take_over(redis_place, seed, steps):
    """Any node becomes what it was some time before, while the others do not."""
    clients = redis_place.clients()
    rng = random.Random(seed)
    kept = [{} for _ in clients]
    for client in clients:
        client.flushall()
    fleet = Fleet(somewhere(redis_place), builders=2)
    fleet.rng = rng
    for step in [*steps, "lose"]:
        if step == "live":
            fleet.live(rng.randrange(30))
        elif step == "keep":
            number = rng.randrange(len(clients))
            kept[number] = snapshot(clients[number])
        elif step == "sweep":
            for builder in fleet.builders:
                builder.sweep(rng.randrange(8))
        else:
            number = rng.randrange(len(clients))
            restore(clients[number], kept[number])
    # blocks of slots that were swept since may be back in a node; nobody sees them, and who takes the number finds them
    # a builder that pauses after a failure has nothing that waits, and has not looked either
    until(lambda: all(time.monotonic() > builder._flusher.retry_at for builder in fleet.builders))
    until(lambda: nothing_waits(*fleet.builders), *fleet.builders)
    for _ in range(5):
        assert fleet.agree()
        for builder in fleet.builders:
            builder.expire()


# ---- slots that move


def move(cluster, slot, *, between=lambda: None):
    """Give a hash slot to another master, key by key, as an operator does who adds a node."""
    masters = {client.execute_command("CLUSTER", "MYID"): client for client in cluster.clients()}
    owners = {name: key_range(client, slot) for name, client in masters.items()}
    (source,) = [name for name, owns in owners.items() if owns]
    target = next(name for name in masters if name != source)
    old, new = masters[source], masters[target]
    new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source)
    old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target)
    while names := old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 20):
        port = new.connection_pool.connection_kwargs["port"]
        old.execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "REPLACE", "KEYS", *names)
        between()
    for client in masters.values():
        client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target)
    return old, new


def key_range(client, slot):
    own = client.execute_command("CLUSTER", "MYID")
    for first, last, master, *_ in client.execute_command("CLUSTER", "SLOTS"):
        if first <= slot <= last:
            return master[2] == own
    return False


def test_slots_that_move_to_another_node(redis_cluster):
    url = somewhere(redis_cluster)
    fleet = Fleet(url, builders=2)
    reader = RedisIndex(url)
    fleet.live(100)
    fleet.settle()
    asked = []

    def go_on():
        fleet.live(2)
        try:
            asked.append(by_source(reader.match(Prompt(range(40), "m"))))
        except IndexUnavailable:
            asked.append(None)

    names = reader._layout.of("m")
    for key in (names.directory, names.parts[3].dying):
        move(redis_cluster, key_slot(key), between=go_on)
        fleet.live(20)
        fleet.settle()
    assert asked


def test_what_is_no_cluster_is_said_so(redis_server):
    url = redis_server.url.replace("redis://", "redis+cluster://")
    with pytest.raises(IndexUnavailable, match="cluster support disabled"):
        RedisIndex(url).match(Prompt(range(4), MODEL))


def test_any_node_will_do_to_begin_with(redis_cluster):
    ports = redis_cluster.living
    index = begun(f"redis+cluster://127.0.0.1:1,127.0.0.1:{ports[0]}/?prefix=any:", [POD])
    index.apply(POD, [stored([1], range(4))])
    for port in ports:
        assert tokens_of(RedisIndex(f"redis+cluster://127.0.0.1:{port}?prefix=any:"), range(4)) == {POD.pod: 4}
    memory = MemoryIndex()
    memory.register(POD, model=MODEL)
    memory.apply(POD, [stored([1], range(4))])
    assert same_content(index, memory)
    assert nothing_waits(index)
    assert Source("b") not in by_source(index.match(Prompt(range(4), MODEL)))
