"""Builders of an index in Redis that are killed: another goes on from the logs that they left."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import AllBlocksCleared, Limits, MemoryIndex, Prompt, RedisIndex, Source
from indexer.redis.log import log_blocks

from .conftest import MODEL, NEEDS_REDIS, POD, blocks_in, removed, stored
from .redis_fleet import begun, same_content, same_sources, tokens_of, unlock
from .redis_server import somewhere
from .test_index import CONTENTS, MEDIA, PARENT, PODS, Model, event_of

pytestmark = NEEDS_REDIS
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "store", "offload", "remove", "remove", "clear", "restart", "kill"]),
        st.sampled_from(PODS),
        st.sampled_from(sorted(CONTENTS)),
        st.sampled_from(MEDIA),
    ),
    max_size=60,
)


@given(operations=OPERATIONS)
@settings(max_examples=80, deadline=None)
def test_a_builder_goes_on_after_one_that_was_killed(redis_place, operations):
    where = somewhere(redis_place)
    index, model = begun(where, PODS), Model()
    for what, source, name, medium in operations:
        copies = model.copies[source]
        held = {block for (_, block), count in copies.items() if count}
        if what == "store":
            chain = [name]  # an engine stores a block only after its parent
            while PARENT[chain[0]] is not None:
                chain.insert(0, PARENT[chain[0]])
            for block in chain:
                if block == name or block not in held:
                    index.apply(source, [event_of(block, medium)])
                    copies[medium, block] += 1
        elif what == "offload" and name in held:
            index.apply(source, [event_of(name, medium, tokens=False)])
            copies[medium, name] += 1
        elif what == "remove":
            index.apply(source, [removed(name, medium=medium)])
            copies[medium, name] = max(0, copies[medium, name] - 1)
        elif what == "clear":
            index.apply(source, [AllBlocksCleared()])
            copies.clear()
        elif what == "restart":
            index.restart(source)
            copies.clear()
        elif what == "kill":
            index = begun(where, PODS)
    for tokens in [*CONTENTS.values(), [9, 9], [1, 1, 2, 2, 3, 3, 9]]:
        got = {holding.source: holding.tokens for holding in index.match(Prompt(tokens, MODEL))}
        assert got == {source: model.match(source, tokens) for source in PODS}
    held = sum(bool(count) for copies in model.copies.values() for count in copies.values())
    assert index.stats()["held"] == sum(status.blocks for status in index.sources()) == held
    for source in PODS:  # what was stored before still has to be found by whoever removes it
        for (medium, name), count in model.copies[source].items():
            index.apply(source, [removed(name, medium=medium)] * count)
    assert index.stats()["held"] == 0
    unlock(index)
    assert blocks_in(index) == 0


def scripted(number):
    """Event `number` of a stream: 16 blocks that follow each other, and in the end none of the first ones is left."""
    tokens, first = range(64 * number, 64 * (number + 1)), 16 * number
    made = [stored(range(first + 1, first + 17), tokens)]
    if number >= 40:
        made.append(removed(*range(first - 640 + 1, first - 640 + 17)))
    return made


BUILDER = """
import sys
from indexer import RedisIndex
from tests.conftest import MODEL, POD
from tests.test_redis_killed import scripted
index = RedisIndex(sys.argv[1])
index.register(POD, model=MODEL, copies="set")
for number in range(1_000_000):
    index.apply(POD, scripted(number))
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [5, 60, 201])
def test_a_builder_that_is_killed_while_it_writes(redis_url, after):
    command = [sys.executable, "-c", BUILDER, redis_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        for _ in range(after):
            number = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        number = max([number, *(int(line) for line in process.stdout if line.endswith("\n"))])
    assert process.returncode == -signal.SIGKILL
    index, memory = RedisIndex(redis_url), MemoryIndex()
    for one in (index, memory):
        one.register(POD, model=MODEL, copies="set")
    for step in range(number + 50):
        memory.apply(POD, scripted(step))
        if step > number:
            index.apply(POD, scripted(step))
    for step in range(number + 50):
        asked = Prompt(range(64 * step, 64 * (step + 1)), MODEL)
        assert index.match(asked) == memory.match(asked)
    assert index.stats()["held"] == memory.stats()["held"] == 640
    assert same_content(index, memory)


@pytest.mark.parametrize("medium", ["disk", "gpu"])
def test_what_a_log_says_outlives_its_builder(redis_url, medium):
    index, memory = RedisIndex(redis_url), MemoryIndex()
    names = [7, 2**64 - 1, 2**64, -3, b"digest" * 5, 2**64 + 5]
    for one in (index, memory):
        one.register(POD, model=MODEL, degraded="gap")
        one.apply(POD, [stored(names, range(24), medium=medium)])
        one.apply(POD, [stored([b"alias", 2**63], range(8), medium=medium), stored([7], range(4), medium=medium)])
        one.apply(POD, [stored([2**64], range(8, 12), parent=2**64 - 1, medium=medium)] * 2)
        one.apply(POD, [removed(2**64, 2**64 + 5, medium=medium)])
    index = RedisIndex(redis_url)
    index.register(POD, model=MODEL)
    assert same_content(index, memory)
    assert same_sources(index, memory)
    for name in [7, 7, b"alias", 2**64, 2**64, 2**64 - 1, 2**63]:
        for one in (index, memory):
            one.apply(POD, [removed(name, medium=medium)])
        assert index.match(Prompt(range(24), MODEL)) == memory.match(Prompt(range(24), MODEL))
        assert same_content(index, memory)


def test_whether_blocks_age_outlives_the_builder(redis_url):
    limits = Limits(silent_tier_ttl_s=0.0)
    index = RedisIndex(redis_url, limits)
    index.register(POD, model=MODEL)
    index.apply(POD, [stored([1], range(4), medium="disk"), stored([1], range(4), medium="cpu")])
    index.apply(POD, [removed(99, medium="disk")])  # from now on removals are announced there
    index = RedisIndex(redis_url, limits)
    index.register(POD, model=MODEL)
    index.expire()
    assert index.sources()[0].tiers == {"disk": 1, "cpu": 0}


def test_what_is_known_of_a_source_without_blocks_outlives_its_builder(redis_url):
    index, memory = RedisIndex(redis_url), MemoryIndex()
    for one in (index, memory):
        one.register(POD, model=MODEL)
        one.apply(POD, [stored([1], range(4), group_idx=1, kind="sliding_window", sliding_window=5)])
        one.apply(POD, [AllBlocksCleared()])
        one.degrade(POD, "gap")
    index = begun(redis_url, [POD])
    assert index.stats()["rewritten_total"] == 0
    assert same_sources(index, memory)
    for one in (index, memory):
        one.apply(POD, [stored([2, 3], range(8), group_idx=0)])
    assert index.match(Prompt(range(8), MODEL)) == memory.match(Prompt(range(8), MODEL))


def test_copies_of_a_block_that_aged_out_do_not_outlive_it(redis_url):
    index = begun(redis_url, [POD], limits=Limits(silent_tier_ttl_s=0.0))
    index.apply(POD, [stored([1], range(4), medium="cpu")] * 2)
    index.expire()
    index.apply(POD, [stored([1], range(4), medium="cpu")])
    index = begun(redis_url, [POD])
    index.apply(POD, [removed(1, medium="cpu")])
    assert tokens_of(index, range(4)) == {POD.pod: 0}


@pytest.mark.parametrize(
    "harm",
    [
        lambda log: log[:-3],
        lambda log: log + b"\0",
        lambda log: log + b"\0\0\0\4abcd",
        lambda log: b"\xff\xff\xff\xff" + log,
        lambda log: log + b"\0\0\0\1\xc1",
        lambda log: log + b"\0\0\0\2\x91\x00",
        lambda log: log + log_blocks([1, 2], [3], held=True),
        lambda log: log + b"\0\0\0\4\x93\x00\xc0\xc0",
        lambda log: log + b"\0\0\0\6\x93\x00\x91\x90\xa1x",
        lambda log: b"somebody else's",
    ],
)
def test_a_log_that_cannot_be_read_ends_no_builder(redis_url, harm):
    index = begun(redis_url, [POD, Source("b")])
    for source in (POD, Source("b")):
        index.apply(source, [stored([1, 2], range(8))])
        index.apply(source, [stored([3, 4], range(8, 16), parent=2)])
    run = index._store.run
    log = index._layout.of(MODEL).home.log(0)
    run([("SET", log, harm(run([("GET", log)])[0] or b""))])
    index = begun(redis_url, [POD, Source("b")])
    said = tokens_of(index, range(16))
    assert said["b"] == 16
    assert said[POD.pod] in (0, 16)  # from its engine it will hear the rest
    index.restart(POD)
    for number in range(20):  # others come and go, and get the numbers that are free
        index.register(Source(f"other-{number}"), model=MODEL)
        index.apply(Source(f"other-{number}"), [stored([1], [9] * 4)])
        index.expire()
    index.apply(POD, [stored([1], range(4))])
    expected = {"b": 16, POD.pod: 4} | {f"other-{number}": 0 for number in range(20)}
    assert tokens_of(index, range(16)) == tokens_of(RedisIndex(redis_url), range(16)) == expected


def test_a_log_stays_short(redis_url):
    index, memory = RedisIndex(redis_url), MemoryIndex()
    for one in (index, memory):
        one.register(POD, model=MODEL)
        one.apply(POD, [stored([5000, 5000], [3] * 4), stored([5000], [3] * 4)])
        for number in range(100):
            one.apply(POD, [stored(range(200), [number] * 800), removed(*range(200))])
            one.apply(POD, [stored([5000], [3] * 4), removed(5000)])
    size = sum(index._store.run([("STRLEN", part.log(0)) for part in index._layout.of(MODEL).parts]))
    assert size < 60_000
    assert same_content(index, memory)
    index = begun(redis_url, [POD])
    assert index.stats()["held"] == 1
    assert same_content(index, memory)
