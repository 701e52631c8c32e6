"""The index against a slow and obvious model, and each promise of DESIGN section 6 by name."""

import threading
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import AllBlocksCleared, Limits, MemoryIndex, Prompt, Source, open_index

from .conftest import MODEL, POD, removed, stored

CONTENTS = {  # engine hash -> tokens from the prompt's start; hashes 1 to 7 form a tree of blocks of 2 tokens
    1: [1, 1], 2: [1, 1, 2, 2], 3: [1, 1, 2, 2, 3, 3], 4: [1, 1, 4, 4],
    5: [5, 5], 6: [5, 5, 6, 6], 7: [5, 5, 6, 6, 7, 7],
}  # fmt: skip
PARENT = {1: None, 2: 1, 3: 2, 4: 1, 5: None, 6: 5, 7: 6}
PODS = [Source("a"), Source("a", 1), Source("b")]
MEDIA = ["gpu", "cpu"]


class Model:
    """What every source holds, as counts of copies by hash, and nothing else."""

    def __init__(self):
        self.copies = {source: Counter() for source in PODS}

    def match(self, source, tokens):
        blocks = 0
        while 2 * (blocks + 1) <= len(tokens):
            prefix = list(tokens[: 2 * (blocks + 1)])
            names = [name for name, content in CONTENTS.items() if content == prefix]
            if not any(self.copies[source][medium, name] for name in names for medium in MEDIA):
                break
            blocks += 1
        return 2 * blocks


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "store", "offload", "remove", "remove", "clear", "restart"]),
        st.sampled_from(PODS),
        st.sampled_from(sorted(CONTENTS)),
        st.sampled_from(MEDIA),
    ),
    max_size=60,
)


def event_of(name, medium, *, tokens=True):
    return stored([name], CONTENTS[name][-2:] if tokens else [], parent=PARENT[name], size=2 * tokens, medium=medium)


@given(OPERATIONS)
@settings(max_examples=400, deadline=None)
def test_random_streams_leave_what_the_model_holds(operations):
    index, model = open_index("memory://"), Model()
    said = {source: set() for source in PODS}
    for source in PODS:
        index.register(source, model=MODEL)
    for what, source, name, medium in operations:
        copies = model.copies[source]
        if what == "store":
            # an engine stores a block only after its parent
            chain = [name]
            while PARENT[chain[0]] is not None:
                chain.insert(0, PARENT[chain[0]])
            for block in chain:
                if block == name or block not in said[source]:
                    index.apply(source, [event_of(block, medium)])
                    copies[medium, block] += 1
                    said[source].add(block)
        elif what == "offload" and name in said[source]:
            index.apply(source, [event_of(name, medium, tokens=False)])
            copies[medium, name] += 1
        elif what == "remove":
            index.apply(source, [removed(name, medium=medium)])
            copies[medium, name] = max(0, copies[medium, name] - 1)
        elif what in ("clear", "restart"):
            if what == "clear":
                index.apply(source, [AllBlocksCleared()])
            else:
                index.restart(source)
            copies.clear()
            said[source].clear()
    for tokens in [*CONTENTS.values(), [9, 9], [1, 1, 2, 2, 3, 3, 9]]:
        got = {holding.source: holding.tokens for holding in index.match(Prompt(tokens, MODEL))}
        assert got == {source: model.match(source, tokens) for source in PODS}
    held = sum(bool(count) for copies in model.copies.values() for count in copies.values())
    assert index.stats()["held"] == held
    assert all(not status.degraded for status in index.sources())
    for pod in ("a", "b"):
        index.forget(pod)
    assert index.stats()["blocks"] == index.stats()["held"] == 0


@given(st.permutations([1, 2, 3, 4, 5, 6, 7]), st.lists(st.sampled_from(sorted(CONTENTS)), max_size=5))
def test_events_in_any_order_of_parents_end_the_same(order, gone):
    index = open_index()
    index.register(POD, model=MODEL)
    for name in order:
        index.apply(POD, [event_of(name, "gpu")])
        if name in gone:
            index.apply(POD, [removed(name)])
    live = set(CONTENTS) - set(gone)
    for name, tokens in CONTENTS.items():
        chain, expected = [name], 0
        while PARENT[chain[0]] is not None:
            chain.insert(0, PARENT[chain[0]])
        for block in chain:
            if block not in live:
                break
            expected += 2
        assert held(index, tokens) == expected
    assert index.stats()["waiting"] == 0


def held(index, tokens, source=POD, **more):
    return next(h.tokens for h in index.match(Prompt(tokens, MODEL, **more)) if h.source == source)


def test_a_removal_of_one_source_or_tier_leaves_the_others(index):
    other = Source("pod-b")
    index.register(other, model=MODEL)
    for source in (POD, other):
        index.apply(source, [stored([1], range(4)), stored([1], range(4), medium="cpu")])
    index.apply(POD, [removed(1)])
    (run,) = next(h.runs for h in index.match(Prompt(range(4), MODEL)) if h.source == POD)
    assert run.media == ("cpu",)
    index.apply(POD, [removed(1, medium="cpu")])
    assert held(index, range(4)) == 0
    assert held(index, range(4), other) == 4


def test_an_unknown_parent_is_never_a_root(index):
    index.apply(POD, [stored([2], [5, 6, 7, 8], parent=99), stored([3], [1, 2, 3, 4], parent=0)])
    assert held(index, [5, 6, 7, 8]) == held(index, [1, 2, 3, 4]) == 0
    assert "unknown parent" in index.sources()[0].degraded
    index.apply(POD, [stored([99], [1, 2, 3, 4])])
    assert held(index, [1, 2, 3, 4, 5, 6, 7, 8]) == 8
    assert index.sources()[0].degraded == ""


def test_lmcache_chunks_with_a_token_too_many_and_their_own_block_size(index):
    index.apply(POD, [stored([1, 2], range(8))])
    index.apply(
        POD, [stored([1], range(9), size=8, medium="cpu"), stored([2], range(8, 16), parent=1, size=8, medium="cpu")]
    )
    (holding,) = index.match(Prompt(range(20), MODEL))
    assert holding.tokens == 16
    assert [tuple(run) for run in holding.runs] == [(8, ("cpu", "gpu")), (8, ("cpu",))]
    (holding,) = index.match(Prompt(range(20), MODEL), block_size=4)
    assert holding.tokens == 8


def test_an_offload_without_tokens_finds_a_block_that_left_the_gpu(index):
    index.apply(POD, [stored([1], range(4)), removed(1), stored([1], [], size=0, medium="CPU".lower())])
    assert held(index, range(4)) == 4


def test_shared_storage_counts_for_every_pod_of_the_model(index):
    shared = Source("SHARED_STORAGE")
    index.register(shared, model=MODEL, fleet_wide=True)
    index.register(Source("pod-b"), model=MODEL)
    index.apply(shared, [stored([1], [], size=0, medium="shared_storage")])
    assert held(index, range(4)) == 0
    index.apply(POD, [stored([1, 2], range(8))])
    index.apply(shared, [stored([2], [], size=0, medium="shared_storage")])
    assert held(index, range(8), Source("pod-b")) == 8
    index.apply(shared, [removed(1, medium="shared_storage")])
    assert held(index, range(8), Source("pod-b")) == 0


def test_two_hashes_of_one_content_need_two_removals(index):
    index.apply(POD, [stored([1], range(4)), stored([2], range(4)), removed(1)])
    assert held(index, range(4)) == 4
    index.apply(POD, [removed(2)])
    assert held(index, range(4)) == 0


def test_salted_and_plain_chains_never_meet(index):
    index.apply(POD, [stored([1], range(4), cache_salt="s"), stored([2], range(4, 8), parent=1)])
    assert held(index, range(8)) == 0
    assert held(index, range(8), cache_salt="t") == 0
    assert held(index, range(8), cache_salt="s") == 8


def test_what_waits_is_bounded():
    index = MemoryIndex(Limits(parked_blocks=10))
    index.register(POD, model=MODEL)
    for name in range(1, 100):
        index.apply(POD, [stored([name], range(4), parent=1000 + name)])
        index.apply(POD, [stored([10_000 + name], [], size=0)])
        assert index.stats()["waiting"] <= 10
    assert index.stats()["waiting_dropped_total"] == 188
    assert index.sources()[0].degraded


def test_slots_of_a_source_are_bounded():
    index = MemoryIndex(Limits(max_slots_per_source=3))
    index.register(POD, model=MODEL)
    for number in range(10):
        index.apply(POD, [stored([1], range(4), medium=f"m{number}")])
    assert index.stats()["too_many_slots_total"] == 7


def test_tiers_that_never_announce_removals_age_out():
    index = MemoryIndex(Limits(silent_tier_ttl_s=0.0))
    index.register(POD, model=MODEL)
    index.apply(POD, [stored([1], range(4)), stored([1], range(4), medium="cpu"), stored([2], range(4), medium="disk")])
    index.apply(POD, [removed(9, medium="disk")])
    index.expire()
    assert index.sources()[0].tiers == {"gpu": 1, "cpu": 0, "disk": 1}


def test_threads_hammer_one_index():
    index = open_index()
    sources = [Source(f"pod-{n}") for n in range(6)]
    for source in sources:
        index.register(source, model=MODEL)
    prompt_tokens = list(range(400))
    start, stop, seen = threading.Barrier(8), threading.Event(), []

    def write(source):
        start.wait()
        for _ in range(30):
            for first in range(0, 100, 10):
                tokens = prompt_tokens[4 * first : 4 * first + 40]
                index.apply(source, [stored(range(first, first + 10), tokens, parent=first - 1 if first else None)])
            index.apply(source, [AllBlocksCleared()])
        index.apply(source, [stored(range(100), prompt_tokens)])

    def read():
        start.wait()
        while not stop.is_set():
            for holding in index.match(Prompt(prompt_tokens, MODEL)):
                seen.append(holding.tokens)

    writers = [threading.Thread(target=write, args=(source,)) for source in sources]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert all(h.tokens == 400 for h in index.match(Prompt(prompt_tokens, MODEL)))
    assert index.stats()["blocks"] == 100
    assert set(seen) <= set(range(0, 401, 4))
