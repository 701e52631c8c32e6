"""The index in Redis beside the one in this process, and after all that can go wrong between it and a builder."""

import asyncio
import itertools
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from indexer import (
    AllBlocksCleared,
    IndexUnavailable,
    InvalidQuestion,
    Limits,
    MemoryIndex,
    Prompt,
    RedisIndex,
    Source,
    open_index,
    prompt,
    redis_sweep,
)
from indexer.redis_layout import holders_of
from indexer.redis_log import Replayed, log_blocks
from indexer.redis_reader import AsyncRedisReader
from indexer.redis_records import decode_records, pairs_of

from . import test_threads as threads
from .conftest import HAS_CORE, MODEL, NEEDS_REDIS, POD, block_names, blocks_in, names_in, removed, stored
from .redis_server import RedisServer
from .test_differential import LIMITS, SEEDS, SOURCES, Twins, drive, events, question, registration
from .test_index import CONTENTS, MEDIA, PARENT, PODS, Model, event_of

pytestmark = NEEDS_REDIS
PROMPTS = [prompt.Prompt]
if HAS_CORE:
    from indexer import _native

    PROMPTS.append(_native.Prompt)

FLEET = [Source("a"), Source("b"), Source("hybrid"), Source("a", 1), Source("set"), Source("other")]
"""Sources of a stream that several builders share; the first goes to the first builder, and so on in turn."""
TEXT = list(range(4 * 600))  # a prompt that is read in several rounds
SECONDS = 20
_NUMBERS = itertools.count()


def somewhere(server):
    """A prefix that nobody has used."""
    return f"{server.url}?prefix=t{next(_NUMBERS)}:&timeout=5"


@pytest.fixture
def url(redis_place):
    return somewhere(redis_place)


@pytest.fixture
def server(tmp_path):
    """A server that a test may harm."""
    server = RedisServer(tmp_path)
    yield server
    server.thaw()
    server.kill()


def by_source(holdings):
    return {holding.source: holding for holding in holdings}


def tokens_of(index, tokens, model=MODEL):
    return {holding.source.pod: holding.tokens for holding in index.match(Prompt(tokens, model))}


def until(true, *builders):
    """Let builders do what they do now and then, until something is true."""
    deadline = time.monotonic() + SECONDS
    while True:
        for builder in builders:
            builder.expire()
        if true():
            return
        assert time.monotonic() < deadline, "it never came true"


def nothing_waits(*builders):
    return all(not index.stats()["write_waiting_bytes"] + index.stats()["stale_sources"] for index in builders)


def same_sources(index, memory):
    found, expected = (
        [(s.source, s.model, s.incarnation, s.tiers, s.block_sizes, s.degraded, s.fleet_wide) for s in one.sources()]
        for one in (index, memory)
    )
    return found == expected


def same_content(index, memory):
    """Whether each bit and each log in Redis is what an index in memory has, and none is anything else."""
    run, layout = index._store.run, index._layout
    holders, logs = Counter(), []
    for tag in pairs_of(run([("HGETALL", layout.models)])[0]):
        names = layout.tagged(tag)
        for record in decode_records(pairs_of(run([("HGETALL", names.directory)])[0])):
            for known in record.slots:
                slot = memory._tracked[record.source].ledger.slots[known.medium, known.group, known.block_size]
                whole = Replayed()
                for log in run([("GET", part.log(known.number)) for part in names.parts]):
                    replayed = Replayed()
                    replayed.feed(log or b"")
                    whole.add(replayed)
                logs.append((whole.held, whole.copies) == (slot.held, slot.copies))
                for key in set(slot.held.values()):
                    holders[key] |= 1 << known.number
    found = block_names(index)
    values = [holders_of(value) for value in run([("GET", name) for name in found])]
    places = [int.from_bytes(name[-8:], "big") for name in found]
    assert len(set(places)) == len(places), "a block lies in two parts"
    return all(logs) and dict(zip(places, values, strict=True)) == holders


def unlock(index, model=MODEL):
    """Let anybody sweep now."""
    index._store.run([("DEL", index._layout.of(model).sweeper)])


class RedisTwins(Twins):
    """An index in memory and one in Redis."""

    def __init__(self, url, limits=None):
        self.both = [MemoryIndex(limits), RedisIndex(url, limits)]
        self.log = []
        self.asked = 0

    def close(self):
        assert same_content(self.both[1], self.both[0]) or self.swept()
        for source in SOURCES:
            self.do("forget", (source.pod,))
        assert blocks_in(self.both[1]) == 0
        for index in self.both:
            index.close()

    def swept(self):
        while self.both[1].sweep():
            pass
        return same_content(self.both[1], self.both[0])

    def compare(self):
        stats, other = (index.stats() for index in self.both)
        assert {name: n for name, n in stats.items() if name not in ("bytes", "blocks")}.items() <= other.items()
        assert same_sources(self.both[1], self.both[0])
        return stats

    def ask(self, about, more, asked):
        self.asked += 1
        memory, redis = self.both
        answer = memory.match(prompt.Prompt(*about, **more), **asked)
        found = redis.match(PROMPTS[self.asked % len(PROMPTS)](*about, **more), **asked)
        assert by_source(answer) == by_source(found)
        for model in ("m", "n", "unknown"):
            self.do("block_size", (model,))
        return answer


class Fleet:
    """Builders of one index in Redis that share its sources, and an index in memory that is told the same."""

    def __init__(self, url, builders=1, limits=None, **more):
        self.memory = MemoryIndex(limits)
        self.builders = [RedisIndex(url, limits, **more) for _ in range(builders)]
        self.reader = RedisIndex(url, limits)
        self.rng = random.Random(5)
        for source in FLEET:
            self.tell(source, *registration(random.Random(0), source))

    def of(self, source):
        return self.builders[FLEET.index(source) % len(self.builders)]

    def tell(self, source, what, args, more=None):
        for index in (self.memory, self.of(source)):
            getattr(index, what)(*args, **(more or {}))

    def live(self, steps):
        """Let the sources live on for a while."""
        for _ in range(steps):
            source = self.rng.choice(FLEET)
            if self.rng.random() < 0.05:
                self.tell(source, "restart", (source,))
            elif self.rng.random() < 0.05:
                self.tell(source, "degrade", (source, self.rng.choice(["", "gap"])))
            elif self.rng.random() < 0.05:
                for index in (self.memory, *self.builders):
                    index.forget(source.pod)
                for other in FLEET:
                    if other.pod == source.pod:
                        self.tell(other, *registration(random.Random(0), other))
            else:
                self.tell(source, "apply", (source, events(self.rng, source)))

    def agree(self, questions=40):
        for _ in range(questions):
            about, more, asked = question(self.rng)
            answers = [by_source(one.match(Prompt(*about, **more), **asked)) for one in (self.memory, self.reader)]
            if answers[0] != answers[1]:
                return False
        return same_sources(self.reader, self.memory)

    def settle(self):
        """Wait until nothing waits; then all has to be as in memory, and nothing else may be left."""
        until(lambda: nothing_waits(*self.builders), *self.builders)
        assert self.agree()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(redis_sweep, "_ORPHAN_S", 0.0)  # what was given up half-way leaves numbers, and else nothing
            until(lambda: same_content(self.reader, self.memory), *self.builders)
        assert self.agree()


# ---- the same answers as in memory


@given(SEEDS, st.sampled_from(LIMITS))
@settings(max_examples=60, deadline=None)
def test_random_streams(redis_place, seeds, limits):
    seeds, twins = [seed for some in seeds for seed in some], RedisTwins(somewhere(redis_place), limits)
    try:
        for _ in drive(twins, seeds, 2):
            pass
    finally:
        note("\n".join(map(repr, twins.log)))
    twins.close()


@pytest.mark.parametrize("limits", LIMITS, ids=["wide", "silent tiers age", "tight"])
def test_long_streams_in_which_everything_happens(url, limits):
    twins = RedisTwins(url, limits)
    answers = list(drive(twins, range(1200), 1))
    assert {holding.degraded.partition(":")[0] for holding in answers} >= {"", "gap", "unplaced"}
    assert max(holding.tokens for holding in answers) >= (100 if limits is LIMITS[-1] else 200)
    assert not {twins.both[1].stats()[name] for name in ("write_failures_total", "rewritten_total")} - {0}
    twins.close()


def test_a_reader_that_asked_before_learns_of_images_without_a_place(url):
    index, reader, images = RedisIndex(url), RedisIndex(url), [("cat", 0, 4)]
    index.register(POD, model=MODEL)
    index.apply(POD, [stored([1], range(4))])
    asked = partial(reader.match, Prompt(range(4), MODEL, mm_items=images))
    assert asked()[0].tokens == 0
    bare = stored([2], range(4), extras=prompt.image_extras(images, 4, range(1), bare=True), bare_images=True)
    index.apply(POD, [bare])
    assert asked()[0].tokens == 4


def test_an_event_loop_gets_the_same_answers(url):
    fleet = Fleet(url)
    fleet.live(60)

    async def ask():
        reader = AsyncRedisReader(url)
        for _ in range(60):
            about, more, asked = question(fleet.rng)
            for made in PROMPTS:
                expected = by_source(fleet.memory.match(Prompt(*about, **more), **asked))
                assert by_source(await reader.match(made(*about, **more), **asked)) == expected
        await reader.close()
        await reader.close()

    asyncio.run(ask())


# ---- builders that are killed

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


def begun(url, sources, **more):
    index = RedisIndex(url, **more)
    for source in sources:
        index.register(source, model=MODEL)
    return index


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
from tests.test_redis import scripted
index = RedisIndex(sys.argv[1])
index.register(POD, model=MODEL, copies="set")
for number in range(1_000_000):
    index.apply(POD, scripted(number))
    print(number, flush=True)
"""


@pytest.mark.parametrize("after", [5, 60, 201])
def test_a_builder_that_is_killed_while_it_writes(url, after):
    command = [sys.executable, "-c", BUILDER, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        for _ in range(after):
            number = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        number = max([number, *(int(line) for line in process.stdout if line.endswith("\n"))])
    assert process.returncode == -signal.SIGKILL
    index, memory = RedisIndex(url), MemoryIndex()
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
def test_what_a_log_says_outlives_its_builder(url, medium):
    index, memory = RedisIndex(url), MemoryIndex()
    names = [7, 2**64 - 1, 2**64, -3, b"digest" * 5, 2**64 + 5]
    for one in (index, memory):
        one.register(POD, model=MODEL, degraded="gap")
        one.apply(POD, [stored(names, range(24), medium=medium)])
        one.apply(POD, [stored([b"alias", 2**63], range(8), medium=medium), stored([7], range(4), medium=medium)])
        one.apply(POD, [stored([2**64], range(8, 12), parent=2**64 - 1, medium=medium)] * 2)
        one.apply(POD, [removed(2**64, 2**64 + 5, medium=medium)])
    index = RedisIndex(url)
    index.register(POD, model=MODEL)
    assert same_content(index, memory)
    assert same_sources(index, memory)
    for name in [7, 7, b"alias", 2**64, 2**64, 2**64 - 1, 2**63]:
        for one in (index, memory):
            one.apply(POD, [removed(name, medium=medium)])
        assert index.match(Prompt(range(24), MODEL)) == memory.match(Prompt(range(24), MODEL))
        assert same_content(index, memory)


def test_whether_blocks_age_outlives_the_builder(url):
    limits = Limits(silent_tier_ttl_s=0.0)
    index = RedisIndex(url, limits)
    index.register(POD, model=MODEL)
    index.apply(POD, [stored([1], range(4), medium="disk"), stored([1], range(4), medium="cpu")])
    index.apply(POD, [removed(99, medium="disk")])  # from now on removals are announced there
    index = RedisIndex(url, limits)
    index.register(POD, model=MODEL)
    index.expire()
    assert index.sources()[0].tiers == {"disk": 1, "cpu": 0}


def test_what_is_known_of_a_source_without_blocks_outlives_its_builder(url):
    index, memory = RedisIndex(url), MemoryIndex()
    for one in (index, memory):
        one.register(POD, model=MODEL)
        one.apply(POD, [stored([1], range(4), group_idx=1, kind="sliding_window", sliding_window=5)])
        one.apply(POD, [AllBlocksCleared()])
        one.degrade(POD, "gap")
    index = begun(url, [POD])
    assert index.stats()["rewritten_total"] == 0
    assert same_sources(index, memory)
    for one in (index, memory):
        one.apply(POD, [stored([2, 3], range(8), group_idx=0)])
    assert index.match(Prompt(range(8), MODEL)) == memory.match(Prompt(range(8), MODEL))


def test_copies_of_a_block_that_aged_out_do_not_outlive_it(url):
    index = begun(url, [POD], limits=Limits(silent_tier_ttl_s=0.0))
    index.apply(POD, [stored([1], range(4), medium="cpu")] * 2)
    index.expire()
    index.apply(POD, [stored([1], range(4), medium="cpu")])
    index = begun(url, [POD])
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
def test_a_log_that_cannot_be_read_ends_no_builder(url, harm):
    index = begun(url, [POD, Source("b")])
    for source in (POD, Source("b")):
        index.apply(source, [stored([1, 2], range(8))])
        index.apply(source, [stored([3, 4], range(8, 16), parent=2)])
    run = index._store.run
    log = index._layout.of(MODEL).home.log(0)
    run([("SET", log, harm(run([("GET", log)])[0] or b""))])
    index = begun(url, [POD, Source("b")])
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
    assert tokens_of(index, range(16)) == tokens_of(RedisIndex(url), range(16)) == expected


# ---- several writers, and readers


def test_two_builders_race_on_the_same_blocks(url, monkeypatch):
    monkeypatch.setattr(threads, "ROUNDS", 25)
    scripts = list(threads.SCRIPTS)
    builders = [begun(url, scripts[part::2]) for part in range(2)]
    for source in threads.KEEPERS:
        builders[scripts.index(source) % 2].apply(source, [threads.chunk(0, 100)])
    writing, answered = list(scripts), []

    def write(source):
        try:
            threads.perform(builders[scripts.index(source) % 2], source)
        finally:
            writing.remove(source)

    def check(holdings):
        for source in threads.KEEPERS:
            assert holdings[source].tokens == 400
        for source, holding in holdings.items():
            if source not in threads.KEEPERS:
                assert holding.tokens <= 4 * threads.LEVELS.get(source, 0)

        answered.append(holdings)

    def read():
        reader = RedisIndex(url)
        while writing:
            with suppress(IndexUnavailable):  # everything changes all the time
                check(by_source(reader.match(Prompt(threads.TOKENS, MODEL))))
            for builder in builders:
                builder.expire()

    async def read_in_a_loop():
        reader = AsyncRedisReader(url)
        while writing:
            with suppress(IndexUnavailable):
                check(by_source(await reader.match(Prompt(threads.TOKENS, MODEL))))
        await reader.close()

    threads.together(*[partial(write, source) for source in scripts], read, lambda: asyncio.run(read_in_a_loop()))
    memory = MemoryIndex()
    for source in scripts:
        memory.register(source, model=MODEL)
    for source in threads.KEEPERS:
        memory.apply(source, [threads.chunk(0, 100)])
    for source in scripts:
        threads.perform(memory, source)
    while sum(builder.sweep() for builder in builders):
        pass
    assert answered
    assert nothing_waits(*builders)
    assert same_sources(builders[0], memory)
    assert same_content(builders[0], memory)


def test_readers_see_all_of_a_pod_or_nothing(url):
    tokens = {"comes": TEXT, "decoy": [7] * len(TEXT)}
    index = begun(url, [Source(pod) for pod in tokens])
    again = {pod: stored(range(600), text) for pod, text in tokens.items()}
    writing, seen = [True], Counter()

    def write():
        try:
            for number in range(60):
                for pod, event in again.items():  # each takes the slots that the other gave up
                    how = number % 3
                    if how == 0:
                        index.apply(Source(pod), [AllBlocksCleared(), event])
                        continue
                    if how == 1:
                        index.restart(Source(pod))
                    else:
                        index.forget(pod)
                        index.register(Source(pod), model=MODEL)
                    index.expire()
                    index.apply(Source(pod), [event])
        finally:
            writing.clear()

    def check(held):
        for pod, found in held.items():
            assert found in ((0, len(TEXT)) if pod == "comes" else (0,))
            seen[pod, found] += 1

    def read():
        reader = RedisIndex(url)
        while writing:
            with suppress(IndexUnavailable):  # everything changes all the time
                check(tokens_of(reader, TEXT))

    async def read_in_a_loop():
        reader = AsyncRedisReader(url)
        while writing:
            with suppress(IndexUnavailable):
                check({holding.source.pod: holding.tokens for holding in await reader.match(Prompt(TEXT, MODEL))})
        await reader.close()

    threads.together(write, read, lambda: asyncio.run(read_in_a_loop()))
    assert set(seen) == {("comes", 0), ("comes", len(TEXT)), ("decoy", 0)}
    assert blocks_in(index) == 1200


# ---- servers that lose what they had, do not answer, or are full


@pytest.mark.parametrize("how", ["killed", "flushed"])
def test_a_server_that_is_empty_is_filled_again(server, how):
    fleet = Fleet(server.url, builders=2)
    for number in range(4):
        fleet.live(30)
        fleet.settle()
        if how == "killed":
            server.kill()
            if number % 2:
                fleet.live(10)
            server.start()
        else:
            server.client.flushall()
        if number > 1:
            fleet.live(10)
        fleet.settle()
    assert all(builder.stats()["rewritten_total"] for builder in fleet.builders)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("then", ["store", "remove", "clear", "restart", "forget"])
def test_in_an_empty_database_nobody_gets_the_blocks_of_another(server, first, then):
    # who writes first gets the number that another had before
    texts, builders = [list(range(32)), list(range(100, 132))], []
    for pod, text in zip("ab", texts, strict=True):
        builders.append(begun(server.url, [Source(pod)]))
        builders[-1].apply(Source(pod), [stored([1, 2], text[:8])])
    reader = RedisIndex(server.url)
    assert tokens_of(reader, texts[0]) == {"a": 8, "b": 0}
    server.client.flushall()
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
    for index in (reader, *builders, RedisIndex(server.url)):
        for number, text in enumerate(texts):
            assert tokens_of(index, text) == {pod: held * (pod == "ab"[number]) for pod in pods}
    assert blocks_in(builders[0]) == 2 * held // 4
    builders = [begun(server.url, [Source(pod)]) for pod in pods]
    assert [builder.stats()["held"] for builder in builders] == [held // 4 for _ in pods]


def test_an_older_view_is_not_taken_for_one_of_a_new_database(server):
    builders = [begun(server.url, [Source(pod)]) for pod in "ab"]
    for pod, builder in zip("ab", builders, strict=True):
        builder.apply(Source(pod), [stored([1], [ord(pod)] * 4)])
    reader = RedisIndex(server.url)
    assert tokens_of(reader, [ord("a")] * 4) == {"a": 4, "b": 0}
    version = builders[0]._layout.of(MODEL).version
    before = server.client.get(version)
    server.client.flushall()
    for builder in reversed(builders):  # the other way round: numbers change hands
        builder.expire()
    for number in range(50):
        if server.client.get(version) == before:
            break
        builders[0].degrade(Source("a"), f"gap {number}")
    assert tokens_of(reader, [ord("a")] * 4) == {"a": 4, "b": 0}


def test_a_server_that_does_not_answer(server):
    fleet = Fleet(server.url + "?timeout=0.1", builders=2)
    fleet.live(40)
    fleet.settle()
    server.freeze()
    began = time.monotonic()
    with pytest.raises(IndexUnavailable, match=r"127\.0\.0\.1"):
        fleet.reader.match(Prompt(range(8), "m"))
    assert time.monotonic() - began < 2
    fleet.live(60)
    for builder in fleet.builders:
        builder.expire()
    assert time.monotonic() - began < 10
    assert all(builder.stats()["write_failures_total"] for builder in fleet.builders)
    server.thaw()
    fleet.settle()


def test_what_waits_for_a_server_is_bounded(server):
    fleet = Fleet(server.url + "?timeout=0.1", buffer_bytes=20_000)
    fleet.live(40)
    fleet.settle()
    (builder,) = fleet.builders
    server.freeze()
    for number in range(100):
        text = [number + 1000] * 80
        fleet.tell(Source("a"), "apply", (Source("a"), [stored(range(1000 * number, 1000 * number + 20), text)]))
        assert builder.stats()["write_waiting_bytes"] <= 20_000
    fleet.live(30)
    assert builder.stats()["stale_sources"] == len(FLEET)
    server.thaw()
    fleet.settle()
    assert builder.stats()["rewritten_total"] >= len(FLEET)


def test_a_source_whose_writes_were_dropped_is_written_anew(server):
    index, memory = RedisIndex(server.url + "?timeout=0.1", buffer_bytes=5000), MemoryIndex()
    for one in (index, memory):
        one.register(POD, model=MODEL)
        one.apply(POD, [stored([1], range(4))])
    server.freeze()
    for number in range(100):  # all in a slot that Redis knows
        for one in (index, memory):
            one.apply(POD, [stored([number + 2], [number] * 4)])
    assert index.stats()["write_waiting_bytes"] == 0
    server.thaw()
    until(lambda: nothing_waits(index), index)
    assert index.stats()["rewritten_total"] == 1
    until(lambda: same_content(index, memory), index)


def test_much_that_waited_is_written_within_the_time_for_an_answer(server):
    index, memory = RedisIndex(server.url + "?timeout=0.05"), MemoryIndex()
    for one in (index, memory):
        one.register(POD, model=MODEL)
        one.apply(POD, [stored([1], [1] * 4)])
    server.freeze()
    for number in range(100):
        event = stored(range(5000 * number + 10, 5000 * (number + 1)), [number] * (4 * 4990))
        for one in (index, memory):
            one.apply(POD, [event])
    server.thaw()
    until(lambda: nothing_waits(index), index)
    assert index.stats()["rewritten_total"] == 0
    assert same_content(RedisIndex(server.url + "?timeout=10"), memory)


def test_a_source_that_was_forgotten_while_nobody_answered_does_not_come_back(server):
    index = begun(server.url + "?timeout=0.1", [POD])
    index.apply(POD, [stored([1], range(4))])
    server.freeze()
    index.forget(POD.pod)
    server.thaw()
    index.register(POD, model=MODEL)
    assert index.stats()["held"] == 0
    until(lambda: tokens_of(index, range(4)) == {POD.pod: 0}, index)
    index.apply(POD, [stored([2], range(4, 8)), removed(2)])
    until(lambda: nothing_waits(index), index)
    assert blocks_in(index) == 0


def test_a_builder_that_came_while_nobody_answered_follows_its_source(server):
    begun(server.url, [POD]).apply(POD, [stored([1], range(4)), stored([2], [7] * 4)])
    server.freeze()
    index = begun(server.url + "?timeout=0.1", [POD])
    index.apply(POD, [stored([1], range(4))])
    server.thaw()
    until(lambda: nothing_waits(index), index)
    index.apply(POD, [stored([3], range(4, 8), parent=1)])
    reader = RedisIndex(server.url)
    assert tokens_of(reader, range(8)) == {POD.pod: 8}
    assert tokens_of(reader, [7] * 4) == {POD.pod: 0}
    until(lambda: blocks_in(index) == 2, index)


def test_a_write_that_is_tried_again_takes_nothing_from_who_came_in_between(url, monkeypatch):
    index, other = begun(url, [POD]), begun(url, [Source("heir")])
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
    assert begun(url, [Source("heir")]).stats()["held"] == 100


def test_a_full_server(server):
    fleet = Fleet(server.url, builders=2)
    fleet.live(40)
    fleet.settle()
    server.client.config_set("maxmemory-policy", "noeviction")
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + 100_000)
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
    server.client.config_set("maxmemory", 0)
    fleet.settle()


def test_a_full_server_says_what_it_has_no_room_for(server, monkeypatch):
    if int(server.client.info("server")["redis_version"].partition(".")[0]) < 7:
        pytest.skip("before Redis 7 nothing can be freed by a script while it is full")
    index, memory = RedisIndex(server.url), MemoryIndex()
    reader, pods = RedisIndex(server.url), [Source(name) for name in "abcdef"]
    for one in (index, memory):
        for pod in pods:
            one.register(pod, model=MODEL)
    text = {pod: [number] * 16_000 for number, pod in enumerate(pods)}

    def both(what, *args):
        for one in (index, memory):
            getattr(one, what)(*args)
        for _ in range(3):
            index._retry_at = 0.0
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
    server.client.config_set("maxmemory-policy", "noeviction")
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + 1_500_000)
    for pod in pods:
        both("apply", pod, [stored(range(4000), text[pod])])
    assert 0 < len(shed) < len(pods)
    for pod in pods:  # what is shed is not written, what is there is taken out although it is full
        both("apply", pod, [removed(*range(3000, 4000))])
    for pod in pods[:4]:
        both("restart", pod)
    monkeypatch.setattr(redis_sweep, "_ORPHAN_S", 0.0)
    until(lambda: nothing_waits(index) and same_content(index, memory), index)
    assert [holding.degraded for holding in reader.match(Prompt(text[pods[5]], MODEL))] == [""] * 6


# ---- sweeping


def test_a_sweep_is_done_in_portions_by_whoever_comes(url, monkeypatch):
    monkeypatch.setattr(redis_sweep, "_SWEEP_BYTES", 1000)
    index = begun(url, [POD, Source("b")])
    for source in (POD, Source("b")):
        for number in range(40):
            index.apply(source, [stored(range(20 * number, 20 * number + 20), [number] * 80)])
    run, names = index._store.run, index._layout.of(MODEL)
    before = sum(run([("STRLEN", part.log(0)) for part in names.parts]))
    index.forget(POD.pod)
    assert index.sweep(3) == 3
    (mark,) = run([("HGET", names.home.dying, 0)])
    assert 0 < int(mark.rpartition(b":")[2]) < before / 2
    other = RedisIndex(url)
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


def test_a_log_entry_longer_than_a_portion_is_swept(url, monkeypatch):
    monkeypatch.setattr(redis_sweep, "_SWEEP_BYTES", 100)
    index = begun(url, [POD])
    index.apply(POD, [stored(range(5000), [1] * 20_000), stored([6000], [2] * 4)])
    index.restart(POD)
    assert blocks_in(index) == 0


def test_numbers_of_slots_are_used_again(url):
    index = begun(url, [POD])
    for number in range(50):
        index.apply(POD, [stored([1, 2], [number] * 8), stored([1], [number] * 4, medium="cpu")])
        index.restart(POD)
        index.expire()
    (bits,) = index._store.run([("GET", index._layout.of(MODEL).numbers)])
    assert len(bits) == 1
    assert index.stats()["swept_total"] == 100


def test_numbers_that_nobody_came_to_use_are_found(url, monkeypatch):
    index = begun(url, [POD])
    index.apply(POD, [stored([1], range(4))])
    killed = begun(url, [Source("b")])
    monkeypatch.setattr(killed._directory, "publish_due", lambda: None)
    killed.apply(Source("b"), [stored([1, 2], [8] * 8)])
    assert blocks_in(index) == 3
    monkeypatch.setattr(redis_sweep, "_ORPHAN_S", 0.0)
    index.expire()
    assert blocks_in(index) == 1
    index.register(Source("c"), model=MODEL)
    index.apply(Source("c"), [stored([1], range(4))])
    assert tokens_of(index, range(4)) == {POD.pod: 4, "b": 0, "c": 4}
    assert index._store.run([("BITCOUNT", index._layout.of(MODEL).numbers)]) == [2]


@pytest.mark.parametrize("at", range(12))
def test_who_lost_the_lock_of_the_sweep_does_no_harm(url, monkeypatch, at):
    """One that stands still at any step of its sweep, while others end it and use the number again, and goes on."""
    slow, quick = begun(url, [POD]), RedisIndex(url)
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
    assert tokens_of(RedisIndex(url), [1] * 400) == expected
    heir = begun(url, [Source("heir")])
    assert heir.stats()["held"] == 100 * ("heir" in expected)


# ---- logs


def test_a_log_stays_short(url):
    index, memory = RedisIndex(url), MemoryIndex()
    for one in (index, memory):
        one.register(POD, model=MODEL)
        one.apply(POD, [stored([5000, 5000], [3] * 4), stored([5000], [3] * 4)])
        for number in range(100):
            one.apply(POD, [stored(range(200), [number] * 800), removed(*range(200))])
            one.apply(POD, [stored([5000], [3] * 4), removed(5000)])
    size = sum(index._store.run([("STRLEN", part.log(0)) for part in index._layout.of(MODEL).parts]))
    assert size < 60_000
    assert same_content(index, memory)
    index = begun(url, [POD])
    assert index.stats()["held"] == 1
    assert same_content(index, memory)


# ---- what else is in the database


def test_only_keys_with_the_prefix_are_touched(server):
    foreign = {b"somebody": b"else", b"b12345678": b"1", b"kvindex": b"2"}
    server.client.mset(foreign)
    server.client.config_resetstat()
    fleet = Fleet(server.url + "?prefix=mine:", builders=2)
    for _ in range(5):
        fleet.live(30)
        fleet.agree()
        for builder in fleet.builders:
            builder.expire()
    for source in FLEET:
        for index in (fleet.memory, *fleet.builders):
            index.forget(source.pod)
    for builder in fleet.builders:
        builder.expire()
        builder.close()
        builder.close()
    sent = {name.removeprefix("cmdstat_") for name in server.client.info("commandstats")}
    assert sent & {"eval", "mget"}
    assert not [name for name in sent if name.startswith(("keys", "scan", "flush", "hscan", "swapdb", "debug"))]
    left = server.client.keys("*")
    assert {name: server.client.get(name) for name in left if not name.startswith(b"mine:")} == foreign


def test_two_prefixes_do_not_meet(redis_place):
    indexes = [begun(somewhere(redis_place), [POD]) for _ in range(2)]
    indexes[0].apply(POD, [stored([1], range(4))])
    indexes[1].register(Source("b"), model=MODEL)
    assert tokens_of(indexes[0], range(4)) == {POD.pod: 4}
    assert tokens_of(indexes[1], range(4)) == {POD.pod: 0, "b": 0}
    indexes[1].forget(POD.pod)
    assert (blocks_in(indexes[0]), blocks_in(indexes[1])) == (1, 0)


def test_records_of_somebody_else_are_passed_over(url):
    index = begun(url, [POD])
    index.apply(POD, [stored([1], range(4))])
    run, layout = index._store.run, index._layout
    for field, value in {"0 x": b"\xc1", "": b"", "1 y": b"\x91\x01", "z": b'{"pod": "z"}'}.items():
        run([("HSET", layout.of(MODEL).directory, field, value)])
    run([("INCR", layout.of(MODEL).version)])
    run([("HSET", layout.models, layout.of("else").tag, b"\xff\xfe")])
    run([("HSET", layout.of("else").directory, "0 x", b"?")])
    for one in (index, RedisIndex(url), begun(url, [POD, Source("x")])):
        assert tokens_of(one, range(4))[POD.pod] == 4
        assert str(one.sources()[0].source) == POD.pod
        one.expire()


@pytest.mark.parametrize("scheme", ["redis", "valkey", "unix"])
def test_urls_with_a_password(tmp_path, scheme):
    path = tmp_path / "s"  # short: the path of a socket is bounded
    server = RedisServer(tmp_path, "--unixsocket", str(path))
    try:
        server.client.config_set("requirepass", "pass:word")
        place = str(path) if scheme == "unix" else f"127.0.0.1:{server.port}"
        last = "?db=3" if scheme == "unix" else "/3"
        index = open_index(f"{scheme}://default:pass%3Aword@{place}{last}")
        index.register(POD, model=MODEL)
        index.apply(POD, [stored([1], range(4))])
        assert tokens_of(index, range(4)) == {POD.pod: 4}
        assert place in repr(index)
        assert not [secret for secret in ("pass:", "pass%", "word,", "word@") if secret in repr(index)]
        assert list(server.client.info("keyspace")) == ["db3"]
        if scheme == "unix":  # nobody has to say who he is
            server.client.config_set("requirepass", "")
            assert tokens_of(open_index(f"unix://{path}{last}"), range(4)) == {POD.pod: 4}
            server.client.config_set("requirepass", "pass:word")
        wrong = open_index(f"{scheme}://:secret@{place}{last}")
        with pytest.raises(IndexUnavailable) as refused:
            wrong.match(Prompt(range(4), MODEL))
        assert "secret" not in repr(refused.value)
        assert place in str(refused.value)
        wrong.register(POD, model=MODEL)
        wrong.apply(POD, [stored([1], range(4))])
        wrong.close()
    finally:
        server.kill()


@pytest.mark.parametrize(
    "url",
    ["redis://", "redis://:secret@", "redis://:secret@/0", "redis://u:secret@:6379/0", "redis://:secret@host:port/0",
     "redis://:secret@host:99999/0", "redis://:sec/secret@host/0", "redis://:secret@[::1/0", "redis://:secret@host?size=3",
     "redis://:secret@host?timeout=x", "redis://:secret@host?timeout=0", "redis://:secret@host?timeout=-1",
     "redis://:secret@host?timeout=nan", "redis://:secret@host?timeout=inf", "redis://:secret@host?db=x",
     "unix://:secret@/tmp/s?db=x", "rediss://:secret@host?ssl_cert_reqs=none", "redis+sentinel://:secret@host"],
)  # fmt: skip
@pytest.mark.parametrize("opened", [open_index, RedisIndex, AsyncRedisReader])
def test_bad_urls_are_refused_without_a_word_of_the_password(url, opened):
    with pytest.raises(InvalidQuestion, match="index URL") as refused:
        opened(url)
    assert "secret" not in str(refused.value)
