"""The index against a slow and obvious model, and each promise of DESIGN section 6 by name."""

import subprocess
import sys
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import AllBlocksCleared, InvalidQuestion, LimitReached, Limits, Prompt, Source

from .conftest import MODEL, POD, blocks_in, removed, stored

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


@given(operations=OPERATIONS)
@settings(max_examples=400, deadline=None)
def test_random_streams_leave_what_the_model_holds(open_new, operations):
    index, model = open_new(), Model()
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
    assert blocks_in(index) == index.stats()["held"] == 0


@given(order=st.permutations([1, 2, 3, 4, 5, 6, 7]), gone=st.lists(st.sampled_from(sorted(CONTENTS)), max_size=5))
def test_events_in_any_order_of_parents_end_the_same(open_new, order, gone):
    index = open_new()
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


@pytest.mark.parametrize("then", [removed(1), AllBlocksCleared()], ids=["removed", "cleared"])
def test_shared_storage_learns_of_a_block_that_leaves_within_the_same_batch(open_new, then):
    index = open_new(Limits(remembered_blocks=0))
    shared = Source("SHARED_STORAGE")
    index.register(shared, model=MODEL, fleet_wide=True)
    index.register(POD, model=MODEL)
    index.apply(shared, [stored([1], [], size=0, medium="shared_storage")])
    index.apply(POD, [stored([1], range(4)), then])
    assert held(index, range(4)) == 4


def test_shared_storage_learns_of_blocks_that_waited_for_their_parent(index):
    shared = Source("SHARED_STORAGE")
    index.register(shared, model=MODEL, fleet_wide=True)
    index.register(Source("pod-b"), model=MODEL)
    index.apply(shared, [stored([1, 2, 3], [], size=0, medium="shared_storage")])
    index.apply(POD, [stored([3], range(8, 12), parent=2), stored([2], range(4, 8), parent=1)])
    assert held(index, range(12), Source("pod-b")) == 0
    index.apply(POD, [stored([1], range(4))])
    assert held(index, range(12), Source("pod-b")) == 12
    assert {status.source: status.degraded for status in index.sources()}[shared] == ""


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


def test_what_waits_is_bounded(open_new):
    index = open_new(Limits(parked_blocks=10))
    index.register(POD, model=MODEL)
    for name in range(1, 100):
        index.apply(POD, [stored([name], range(4), parent=1000 + name)])
        index.apply(POD, [stored([10_000 + name], [], size=0)])
        assert index.stats()["waiting"] <= 10
    assert index.stats()["waiting_dropped_total"] == 188
    assert index.sources()[0].degraded


def test_blocks_that_are_each_others_parents_wait_and_no_more(impl):
    # in a process of its own: what never ends cannot be stopped in any other way
    code = f"""
from array import array
from indexer import BlockStored, Source, open_index
for parents in ([(9, 9)], [(9, 7), (7, 9)]):
    for names, tokens in (([9], 8), ([8, 9], 6)):  # names for a part of the tokens, tokens for a part of the names
        index = open_index("memory://?impl={impl}")
        index.register(Source("pod"), model="m")
        for name, parent in parents:
            index.apply(Source("pod"), [BlockStored(
                block_hashes=[name], parent_block_hash=parent, token_ids=array("I", range(4)), block_size=4)])
        index.apply(Source("pod"), [BlockStored(block_hashes=names, token_ids=array("I", range(tokens)), block_size=4)])
        print(index.stats()["held"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=10)
    assert (done.stdout.split(), done.stderr) == (["0", "1", "0", "1"], "")


def test_what_is_answered_does_not_depend_on_what_was_asked_before(open_new):
    answers = []
    for early in (False, True):
        index = open_new(Limits(block_sizes=1))
        index.register(POD, model=MODEL)
        index.apply(POD, [stored([1], range(2), size=2), stored([11], range(4))])
        if early:
            index.match(Prompt(range(40), MODEL))
        index.apply(POD, [stored([12, 13, 14], range(4, 16), parent=11)])
        answers.append(held(index, range(40)))
    assert answers[0] == answers[1]


def test_what_is_left_of_a_prompt_behind_its_chunks_is_no_block_and_says_nothing_of_lost_ones(index):
    chunks = [stored([1], range(9), size=8, medium="cpu"), stored([2], range(8, 16), parent=1, size=8, medium="cpu")]
    index.apply(POD, [*chunks, stored([3], range(16, 20), parent=2, size=4, medium="cpu")])
    (holding,) = index.match(Prompt(range(20), MODEL))
    assert (holding.tokens, holding.degraded) == (16, "")
    assert (index.stats()["partial_blocks_total"], index.stats()["waiting"]) == (1, 0)
    index.apply(POD, [stored([4], range(16, 20), parent=2, size=4, medium="cpu", group_idx=0)])
    assert index.sources()[0].degraded.startswith("unknown parent")


def test_the_sizes_of_last_chunks_do_not_push_out_those_of_whole_ones(open_new):
    index = open_new(Limits(block_sizes=2))
    for pod in (POD, Source("other")):
        index.register(pod, model=MODEL)
    for size in range(1, 4):  # a connector saves what is left of prompts, here and there
        for pod in (POD, Source("other")):
            index.apply(pod, [stored([100 + size], [99] * size, size=size, medium="cpu")])
    index.apply(POD, [stored([1, 2], range(8)), stored([3], range(16), size=16, medium="cpu")])
    index.apply(Source("other"), [stored([3], range(16), size=16, medium="cpu")])
    (holding,) = index.match(Prompt(range(20), MODEL), pods=[POD.pod])
    assert [(run.tokens, run.media) for run in holding.runs] == [(8, ("cpu", "gpu")), (8, ("cpu",))]


@pytest.mark.parametrize("size", [0, 3, -1, 2**31, 2**32, 2**40])
def test_of_a_size_that_nobody_uses_nobody_holds_blocks(index, size):
    index.apply(POD, [stored([1], range(4))])
    (holding,) = index.match(Prompt(range(8), MODEL), block_size=size)
    assert (holding.tokens, holding.runs) == (0, ())
    assert index.match(Prompt(range(8), MODEL), block_size=size, holders_only=True) == []


def test_a_source_that_is_not_followed_is_refused_and_nothing_counts_it(index):
    before, nobody = index.stats(), Source("nobody", 3)
    for call in (
        lambda: index.apply(nobody, [stored([1], range(4))]),
        lambda: index.apply(nobody, []),
        lambda: index.apply_all(nobody, []),
        lambda: index.restart(nobody),
        lambda: index.degrade(nobody, "gap"),
    ):
        with pytest.raises(InvalidQuestion, match="nobody#3"):
            call()
    index.forget("nobody")
    assert index.stats() == before


def test_sources_are_bounded(open_new):
    index = open_new(Limits(max_sources=2))
    for pod in "abab":
        index.register(Source(pod), model=MODEL, degraded="no events yet")
    with pytest.raises(LimitReached, match=r"source c: 2 sources .*max_sources"):
        index.register(Source("c"), model=MODEL)
    index.forget("a")
    index.register(Source("c"), model=MODEL)
    assert [(str(status.source), status.degraded) for status in index.sources()] == [("b", "no events yet"), ("c", "")]


def test_slots_of_a_source_are_bounded(open_new):
    index = open_new(Limits(max_slots_per_source=3))
    index.register(POD, model=MODEL)
    for number in range(10):
        index.apply(POD, [stored([1], range(4), medium=f"m{number}")])
    assert index.stats()["too_many_slots_total"] == 7


def test_tiers_that_never_announce_removals_age_out(open_new):
    index = open_new(Limits(silent_tier_ttl_s=0.0))
    index.register(POD, model=MODEL)
    index.apply(POD, [stored([1], range(4)), stored([1], range(4), medium="cpu"), stored([2], range(4), medium="disk")])
    index.apply(POD, [removed(9, medium="disk")])
    index.expire()
    assert index.sources()[0].tiers == {"gpu": 1, "cpu": 0, "disk": 1}


def test_removals_of_one_connector_say_nothing_of_what_another_keeps_on_its_medium(open_new):
    index = open_new(Limits(silent_tier_ttl_s=0.0))
    index.register(POD, model=MODEL)
    index.apply(POD, [stored([1, 2], range(8), medium="cpu"), stored([3], range(8), size=8, medium="cpu")])
    index.apply(POD, [removed(2, medium="cpu")])
    index.expire()
    assert held(index, range(8)) == 4
    assert index.sources()[0].tiers == {"cpu": 1}


def test_threads_hammer_one_index(open_new):
    index = open_new()
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
    assert blocks_in(index) == 100
    assert set(seen) <= set(range(0, 401, 4))
