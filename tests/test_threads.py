"""Writers of different sources and readers at once."""

import random
import threading
from array import array
from collections import Counter

from indexer import AllBlocksCleared, Prompt, Source, open_index

from .conftest import MODEL, removed, stored

TOKENS = list(range(400))  # the prompt that everybody asks about, in 100 blocks
KEEPERS = [Source("keeper", rank) for rank in range(2)]
LEVELS = {Source(f"pod-{depth}"): depth for depth in (10, 40, 70)}
"""How many blocks each of the others ever holds of it."""
DECOY = Source("decoy")
ROUNDS = 250


def chunk(first, count, **more):
    names, tokens = range(first + 1, first + count + 1), TOKENS[4 * first : 4 * (first + count)]
    return stored(names, tokens, parent=first or None, **more)


def keeper(source):
    """Holds the whole prompt throughout, whatever else comes and goes."""
    rng = random.Random(source.rank)
    for number in range(ROUNDS):
        first = rng.randrange(0, 100, 10)
        other = stored(range(1000, 1040), [number] * 160)
        yield (
            "apply",
            source,
            [chunk(first, 10), other, removed(*range(first + 1, first + 11)), removed(*other.block_hashes)],
        )
        yield "apply", source, [chunk(0, 100, medium="cpu")]
        yield "apply", source, [removed(*range(1, 101), medium="cpu")]


def comes_and_goes(source):
    rng, depth = random.Random(LEVELS[source]), LEVELS[source]
    for _ in range(ROUNDS):
        for first in range(0, depth, 10):
            yield "apply", source, [chunk(first, 10, medium=rng.choice(["gpu", "cpu"]))]
        if rng.random() < 0.5:
            yield "apply", source, [removed(*rng.sample(range(1, depth + 1), 5))]
        yield from rng.choice([forgotten, cleared, restarted])(source)
    yield "apply", source, [chunk(0, depth)]


def decoy(source):
    """Takes the slots that others gave up, and never holds a block of the prompt."""
    for number in range(3 * ROUNDS):
        yield "apply", source, [stored(range(1, 101), [7, *TOKENS[1:]], medium=f"m{number % 5}")]
        yield from forgotten(source)
    yield "apply", source, [stored([1], [7, 7, 7, 7])]


def forgotten(source):
    yield "forget", source, None
    yield "register", source, None


def cleared(source):
    yield "apply", source, [AllBlocksCleared()]


def restarted(source):
    yield "restart", source, None


SCRIPTS = {**dict.fromkeys(KEEPERS, keeper), **dict.fromkeys(LEVELS, comes_and_goes), DECOY: decoy}


def perform(index, source):
    for what, _, events in SCRIPTS[source](source):
        if what == "apply":
            index.apply(source, events)
        elif what == "forget":
            index.forget(source.pod)
        elif what == "register":
            index.register(source, model=MODEL)
        else:
            index.restart(source)


def begun(impl):
    index = open_index(f"memory://?impl={impl}")
    for source in SCRIPTS:
        index.register(source, model=MODEL)
    for source in KEEPERS:
        index.apply(source, [chunk(0, 100)])
    return index


def together(*work):
    """Run every function in a thread of its own."""
    wrong, start = [], threading.Barrier(len(work))

    def run(function):
        start.wait()
        try:
            function()
        except BaseException as error:  # noqa: BLE001
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for error in wrong:
        raise error


def test_readers_see_every_block_whole(impl):
    index, running, seen = begun(impl), [*SCRIPTS], Counter()
    most = {**dict.fromkeys(KEEPERS, 400), **{source: 4 * depth for source, depth in LEVELS.items()}, DECOY: 0}

    def write(source):
        try:
            perform(index, source)
        finally:
            running.remove(source)

    def read():
        kept = Prompt(TOKENS, MODEL)
        while running:
            for asked in ({}, {"pods": ["keeper", "decoy", "pod-40"]}, {"holders_only": True}):
                holdings = {holding.source: holding for holding in index.match(kept, **asked)}
                assert set(holdings) >= {*KEEPERS}
                for source, holding in holdings.items():
                    assert holding.tokens % 4 == 0
                    assert holding.tokens <= most[source]
                    assert sum(run.tokens for run in holding.runs) == holding.tokens
                    seen[source, holding.tokens] += 1
                assert all(holdings[source].tokens == 400 for source in KEEPERS)
            assert index.block_size(MODEL) == 4
            assert {status.source for status in index.sources()} >= {*KEEPERS}
            assert index.stats()["held"] >= 200
            index.expire()

    together(*[lambda source=source: write(source) for source in SCRIPTS], read, read)
    assert {source for source, tokens in seen if tokens} == {*KEEPERS, *LEVELS}

    alone = begun("python")
    for source in SCRIPTS:
        perform(alone, source)
    for text in (TOKENS, [7, 7, 7, 7], [7, *TOKENS[1:]]):
        answers = [{h.source: h for h in one.match(Prompt(text, MODEL))} for one in (index, alone)]
        assert answers[0] == answers[1]
    assert index.sources() == alone.sources()
    assert index.stats() | {"bytes": 0} == alone.stats() | {"bytes": 0}
    for pod in {source.pod for source in SCRIPTS}:
        index.forget(pod)
    assert index.stats()["blocks"] == index.stats()["held"] == 0


def test_a_slot_that_is_used_anew_is_not_taken_for_the_one_before(impl):
    # long blocks: a question that hashes them takes so long that slots change hands meanwhile
    tokens = array("I", range(64 * 2048))
    index, writing = open_index(f"memory://?impl={impl}"), [True]
    decoy, taker = stored([1], [7] * 2048, size=2048), stored([1], tokens[:2048], size=2048)

    def write():
        try:
            for _ in range(3000):
                for pod, event in (("decoy", decoy), ("taker", taker)):
                    index.register(Source(pod), model=MODEL)
                    index.apply(Source(pod), [event])
                    index.forget(pod)
        finally:
            writing.clear()

    def read():
        while writing:
            for holding in index.match(Prompt(tokens, MODEL)):
                assert holding.tokens in ((0,) if holding.source.pod == "decoy" else (0, 2048))

    together(write, read)


def test_shared_storage_and_those_who_say_its_tokens_never_miss_each_other(impl):
    index, shared = open_index(f"memory://?impl={impl}"), Source("SHARED_STORAGE")
    index.register(shared, model=MODEL, fleet_wide=True)
    tellers = [Source("teller", rank) for rank in range(2)]
    for source in tellers:
        index.register(source, model=MODEL)
    turn = threading.Barrier(3)

    def name():
        for first in range(0, 10_000, 2000):
            event = stored(range(first, first + 2000), [], size=0, medium="shared_storage")
            turn.wait()
            index.apply(shared, [event])

    def tell(source):
        for first in range(0, 10_000, 2000):
            turn.wait()
            for block in range(first + source.rank, first + 2000, 2):
                index.apply(source, [stored([block], [block], size=1), removed(block)])

    together(name, *[lambda source=source: tell(source) for source in tellers])
    assert index.stats()["waiting"] == 0
    assert index.sources()[0].tiers == {"shared": 10_000}
    assert not any(status.degraded for status in index.sources())
