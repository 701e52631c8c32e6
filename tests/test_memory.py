"""`max_bytes`, and memory that is given back."""

import pytest

from indexer import Limits, Prompt, Source, open_index
from indexer.base import TIERS

from .conftest import MODEL, POD, removed, stored

BIG, SMALL = Source("big"), Source("small")
MEDIA = ["gpu", "cpu", "disk", "shared_storage"]


def opened(impl, *sources, max_bytes=None):
    index = open_index(f"memory://?impl={impl}", limits=Limits(max_bytes=max_bytes))
    for source in sources:
        index.register(source, model=MODEL)
    return index


def blocks(first, count, **more):
    """A prompt of its own."""
    return stored(range(first, first + count), range(first, first + count), size=1, **more)


def used(index):
    return index.stats()["bytes"]


def held(index, source, first, count):
    return next(h.tokens for h in index.match(Prompt(range(first, first + count), MODEL)) if h.source == source)


def test_the_least_useful_tier_of_the_largest_source_goes_first(impl):
    events = [
        (SMALL, blocks(1, 100, medium="disk")),
        (BIG, blocks(1, 200)),
        (BIG, blocks(1, 100, medium="disk")),
        (BIG, blocks(10_000, 3000, medium="disk")),
    ]
    index, sizes = opened(impl, BIG, SMALL), []
    for source, event in events:
        index.apply(source, [event])
        sizes.append(used(index))
    assert index.stats()["evicted_total"] == 0
    bound = (sizes[-2] + sizes[-1]) // 2
    index = opened(impl, BIG, SMALL, max_bytes=bound)
    for source, event in events:
        index.apply(source, [event])
        assert used(index) <= bound
    big, small = index.sources()
    assert index.stats()["evicted_total"] == 3100
    assert (big.tiers, big.degraded) == ({"gpu": 200}, "over max_bytes: blocks on disk were forgotten")
    assert (small.tiers, small.degraded) == ({"disk": 100}, "")
    assert [h.degraded for h in index.match(Prompt([1], MODEL))] == [big.degraded, ""]
    assert held(index, BIG, 1, 300) == 200
    assert held(index, SMALL, 1, 300) == 100
    assert held(index, BIG, 10_000, 10) == 0
    index.apply(BIG, [removed(1, medium="disk"), blocks(20_000, 5, medium="disk"), removed(1)])
    assert index.stats()["removed_unknown_total"] == 1
    assert held(index, BIG, 20_000, 5) == 5
    assert held(index, BIG, 1, 300) == 0
    assert index.sources()[0].degraded == big.degraded
    index.restart(BIG)
    assert index.sources()[0].degraded == ""


def test_tiers_go_from_the_least_useful_on(impl):
    index = opened(impl, POD, max_bytes=400_000)
    for medium in reversed(MEDIA):
        index.apply(POD, [blocks(1, 300, medium=medium)])
    left = [4]
    for first in range(10_000, 1_000_000, 1000):
        index.apply(POD, [blocks(first, 200)])
        assert used(index) <= 400_000
        (status,) = index.sources()
        tiers = [tier for tier in TIERS if status.tiers.get(tier)]
        assert tiers == list(TIERS[: len(tiers)])
        left.append(len(tiers))
        if len(tiers) < 4:
            gone = TIERS[min(left)] if min(left) else "gpu"
            assert status.degraded == f"over max_bytes: blocks on {gone} were forgotten"
    assert min(left) == 0
    stats = index.stats()
    assert stats["evicted_total"] == stats["stored_total"] - stats["held"]


@pytest.mark.parametrize("waiting", ["parked", "unplaced", "remembered"])
def test_what_a_source_without_blocks_remembers_is_bounded_too(impl, waiting):
    index = opened(impl, POD, SMALL, max_bytes=150_000)
    index.apply(SMALL, [blocks(1, 10)])
    for first in range(1000, 100_000, 1000):
        if waiting == "parked":
            index.apply(POD, [blocks(first, 100, parent=7)])
        elif waiting == "unplaced":
            index.apply(POD, [stored(range(first, first + 100), [], size=0)])
        else:
            index.apply(POD, [blocks(first, 100), removed(*range(first, first + 100))])
        assert used(index) <= 150_000
    stats = index.stats()
    assert stats["waiting_dropped_total"] == (0 if waiting == "remembered" else 9900 - stats["waiting"])
    assert stats["evicted_total"] == 0
    assert held(index, SMALL, 1, 10) == 10
    assert [status.degraded for status in index.sources() if status.source == SMALL] == [""]


def test_a_bound_that_nothing_fits_under_leaves_an_empty_index(impl):
    index = opened(impl, POD, max_bytes=1)
    index.apply_all(POD, [[blocks(1, 100)], [blocks(1000, 100, medium="cpu"), blocks(5000, 5, parent=4)]])
    stats = index.stats()
    assert (stats["held"], stats["blocks"], stats["waiting"]) == (0, 0, 0)
    assert stats["evicted_total"] + stats["waiting_dropped_total"] == 205


def test_memory_is_given_back(impl):
    index = opened(impl)
    empty = used(index)
    for turn in range(3):
        sources = [Source(f"pod-{turn}-{n}") for n in range(4)]
        for source in sources:
            index.register(source, model=MODEL)
            for first in range(0, 20_000, 1000):
                index.apply(source, [blocks(first, 1000), blocks(first, 300, medium="cpu")])
            index.apply(source, [stored(range(500), [], size=0), stored([1], [1], size=1, parent=77)])
        full = used(index)
        index.restart(sources[0])
        assert used(index) < full
        for source in sources:
            index.forget(source.pod)
        assert used(index) - empty < (full - empty) / 4
    index.close()
    index.close()
    assert used(index) - empty < (full - empty) / 20
