"""Builders of one index in Redis, and what tests of it compare and wait for."""

import random
import time
from collections import Counter

import pytest

from indexer import MemoryIndex, Prompt, RedisIndex, Source
from indexer.redis import sweep
from indexer.redis.layout import holders_of
from indexer.redis.log import Replayed
from indexer.redis.records import decode_records, pairs_of

from .conftest import MODEL, block_names
from .test_differential import events, question, registration

FLEET = [Source("a"), Source("b"), Source("hybrid"), Source("a", 1), Source("set"), Source("other")]
"""Sources of a stream that several builders share; the first goes to the first builder, and so on in turn."""
SECONDS = 20


def begun(url, sources, **more):
    index = RedisIndex(url, **more)
    for source in sources:
        index.register(source, model=MODEL)
    return index


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
            patch.setattr(sweep, "_ORPHAN_S", 0.0)  # what was given up half-way leaves numbers, and else nothing
            until(lambda: same_content(self.reader, self.memory), *self.builders)
        assert self.agree()
