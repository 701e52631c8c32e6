"""The closed loop: what was routed, what was reused, and who drifts."""

import asyncio
import random
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import UNREACHABLE, Prompt, Source, open_index
from kvevents import EventPool
from scorer import InvalidRequest, PrefixScorer
from scorer.drift import DriftTest
from scorer.speculation import Overlay

from .conftest import removed, stored

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from drifting import MODEL, DriftingPod, Losses, Traffic, conversations

A, B = Source("a"), Source("b")


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def pods(*sources):
    index = open_index()
    for source in sources or (A, B):
        index.register(source, model=MODEL)
    return index


class SlowOverlay:
    """What an overlay does, by looking through everything."""

    def __init__(self, ttl):
        self.ttl, self.until = ttl, {}

    def add(self, source, keys, now):
        self.until |= {(source, key): now + self.ttl for key in keys}

    def discard(self, source, keys):
        self.until = {at: until for at, until in self.until.items() if at[0] != source or at[1] not in keys}

    def refresh(self, source, keys, now):
        self.until |= {(source, key): now + self.ttl for key in keys if (source, key) in self.until}

    def run(self, source, keys, start, now):
        number = start
        while number < len(keys) and self.until.get((source, keys[number]), 0) > now:
            number += 1
        return number - start

    def reach(self, source, keys, now):
        return max((place for place, key in enumerate(keys, 1) if self.until.get((source, key), 0) > now), default=0)

    def forget(self, source):
        self.until = {at: until for at, until in self.until.items() if at[0] != source}

    def drop_dead(self, now):
        self.until = {at: until for at, until in self.until.items() if until > now}


KEYS = st.lists(st.integers(0, 12), max_size=8)
STEPS = st.lists(st.tuples(st.sampled_from(["add", "add", "discard", "refresh", "run", "forget", "wait"]),
                           st.sampled_from([A, B]), KEYS, st.integers(0, 5)), max_size=40)  # fmt: skip


@given(STEPS)
@settings(deadline=None)
def test_an_overlay_says_what_a_slow_one_does(steps):
    clock = Clock()
    overlay, slow = Overlay(4.0, clock=clock), SlowOverlay(4.0)
    for what, source, keys, number in steps:
        slow.drop_dead(clock.now)
        if what == "add":
            overlay.add(source, keys)
            slow.add(source, keys, clock.now)
        elif what == "discard":
            overlay.discard(source, keys)
            slow.discard(source, keys)
        elif what == "refresh":
            overlay.refresh(source, keys)
            slow.refresh(source, keys, clock.now)
        elif what == "run":
            assert overlay.reach(source, keys) == slow.reach(source, keys, clock.now)
            assert overlay.run(source, keys, number) == slow.run(source, keys, number, clock.now)
        elif what == "forget":
            overlay.forget(source)
            slow.forget(source)
        else:
            clock.now += number
        assert len(overlay) >= len([until for until in slow.until.values() if until > clock.now])
    for source in (A, B):
        for key in range(13):
            assert overlay.run(source, [key], 0) == slow.run(source, [key], 0, clock.now)


@given(st.lists(st.tuples(st.sampled_from([A, B]), KEYS), max_size=30))
@settings(deadline=None)
def test_an_overlay_stays_within_its_bound(steps):
    overlay = Overlay(4.0, max_blocks=5)
    for source, keys in steps:
        overlay.add(source, keys)
        assert len(overlay) <= 5
        kept = list(dict.fromkeys(reversed(keys)))[:5]
        assert all(overlay.run(source, [key], 0) for key in kept)


def test_what_is_routed_is_reported_apart_and_for_a_while_only():
    index, clock = pods(), Clock()
    scorer = PrefixScorer(index, block_size=4)
    scorer._loop._routed._clock = clock
    index.apply(A, [stored([1], range(4))])
    before = scorer.match(range(10), model=MODEL)
    assert scorer.routed("a", range(10), model=MODEL)
    a, b = scorer.match(range(10), model=MODEL)
    assert (a.pod, a.tokens, a.score, a.speculative_blocks, a.speculative_tokens) == ("a", 4, 1.0, 1, 4)
    assert (b.pod, b.speculative_blocks) == ("b", 0)
    assert scorer.score(range(10), model=MODEL) == {"a": 1.0}
    index.apply(A, [stored([2], range(4, 8), parent=1)])
    assert [(m.blocks, m.speculative_blocks) for m in scorer.match(range(10), model=MODEL)] == [(2, 0), (0, 0)]
    assert scorer.routed("b", Prompt(range(8), MODEL))
    assert scorer.match(range(8), model=MODEL)[1].speculative_blocks == 2
    assert scorer.match(range(8), model=MODEL, cache_salt="other")[1].speculative_blocks == 0
    clock.now += 6
    assert [m.speculative_blocks for m in scorer.match(range(8), model=MODEL)] == [0, 0]
    assert before[0].speculative_blocks == 0
    assert not scorer.routed("nobody", range(8), model=MODEL)


def test_who_holds_nothing_is_left_out_where_that_is_asked_unless_something_is_on_its_way():
    index = pods()
    scorer = PrefixScorer(index, block_size=4)
    index.apply(A, [stored([1], range(4))])
    prompts = [Prompt(range(10), MODEL), Prompt(range(50, 60), MODEL)]
    for _ in range(2):
        for prompt in prompts:
            everyone = scorer.match(prompt)
            assert len(everyone) == 2
            some = scorer.match(prompt, holders_only=True)
            assert some == [match for match in everyone if match.blocks or match.speculative_blocks]
        assert scorer.match_all(prompts, holders_only=True)[0].pod == "a"
        assert asyncio.run(scorer.amatch(prompts[0], holders_only=True)) == scorer.match(prompts[0], holders_only=True)
        scorer.routed("b", prompts[1])
    assert [match.pod for match in scorer.match(prompts[1], holders_only=True)] == ["b"]


def test_who_asks_for_it_has_guesses_in_the_score():
    index = pods()
    scorer = PrefixScorer(index, block_size=4, speculative_weight=0.5)
    index.apply(A, [stored([1], range(4))])
    scorer.routed("b", range(12), model=MODEL)
    scorer.routed("a", range(4), model=MODEL)
    assert scorer.score(range(12), model=MODEL) == {"b": 1.5, "a": 1.0}
    assert [(m.pod, m.score, m.tokens) for m in scorer.match(range(12), model=MODEL)] == [("b", 1.5, 0), ("a", 1.0, 4)]


def test_each_outcome_has_its_name():
    index = pods()
    scorer = PrefixScorer(index, block_size=4)
    index.apply(A, [stored([1, 2], range(8))])

    def outcome(pod, tokens, cached):
        scorer.routed(pod, tokens, model=MODEL)
        seen = scorer.observe(pod, tokens, model=MODEL, cached_tokens=cached)
        return seen.outcome, seen.error_blocks

    assert outcome("a", range(9), 8) == ("reused", 0)
    assert outcome("a", range(8), 4) == ("reused", 0)  # the last token is always computed
    assert outcome("a", range(100, 110), 0) == ("no_reuse_possible", 0)
    assert outcome("b", range(9), 0) == ("routed_elsewhere", 0)
    assert outcome("a", range(9), 4) == ("overstated", 1)
    assert outcome("b", range(9), 8) == ("understated", -2)
    assert outcome("nobody", range(9), 8) == ("unknown_pod", 0)
    scorer.routed("b", range(9), model=MODEL)
    scorer.routed("b", range(10), model=MODEL)
    assert scorer.observe("b", range(10), model=MODEL, cached_tokens=8).outcome == "late"
    tally = {tally.source: tally for tally in scorer.observations()}[A]
    assert tally.outcomes == {"reused": 2, "no_reuse_possible": 1, "overstated": 1}
    assert (tally.errors[0], tally.errors[1], sum(tally.errors), tally.error_sum) == (3, 1, 4, 1)
    assert scorer.stats()["unknown_pods_total"] == 1
    with pytest.raises(InvalidRequest, match="cached_tokens"):
        scorer.observe("a", range(9), model=MODEL, cached_tokens=10)


def test_without_a_route_the_runs_own_blocks_are_no_evidence():
    index = pods()
    scorer = PrefixScorer(index, block_size=4)
    index.apply(A, [stored([1, 2], range(8))])
    assert scorer.observe("a", range(9), model=MODEL, cached_tokens=0).outcome == "not_comparable"
    assert scorer.observe("a", range(20), model=MODEL, cached_tokens=4).outcome == "overstated"


def drift(losses, after, *, heal, requests=300, seed=1):
    """Lose events for a while, then observe. Gives the marking request, all errors and the scorer."""
    index = open_index()
    scorer = PrefixScorer(index, heal=EventPool(index).recount if heal else None)
    pod = DriftingPod(index, "a", losses, num_blocks=350, seed=seed)
    prompts = conversations(seed, count=20, blocks=20)
    for _ in range(300):
        pod.hear(pod.engine.run(next(prompts)).events)
    pod.losses = after
    marked, errors = None, []
    for number in range(1, requests + 1):
        seen = pod.request(scorer, next(prompts))
        (match,) = scorer.match(range(50), model=MODEL)
        assert (match.trust, match.reason[:8]) == (("degraded", "drifting") if seen.drifting else ("exact", ""))
        errors.append(abs(seen.error_blocks))
        marked = marked or (number if seen.drifting else None)
    return marked, errors, scorer


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_pod_that_lost_removals_is_marked_and_healed(seed):
    marked, plain, _ = drift(Losses(0.8), Losses(), heal=False, seed=seed)
    assert marked <= 50
    same, healed, cured = drift(Losses(0.8), Losses(), heal=True, seed=seed)
    assert same == marked
    assert sum(healed[150:]) <= 0.1 * sum(plain[150:])
    assert [tally.drifting for tally in cured.observations()] == [False]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_a_pod_that_goes_on_losing_removals_is_marked_within_50_requests_and_wrong_a_tenth_as_much(share):
    plain, healed = [], []
    for seed in (1, 2, 3):
        marked, errors, _ = drift(Losses(share), Losses(share), heal=False, seed=seed)
        assert marked <= 50
        assert sum(error > 0 for error in errors[: marked - 1]) <= 2
        plain += errors[100:]
        same, errors, scorer = drift(Losses(share), Losses(share), heal=True, seed=seed)
        assert same == marked
        healed += errors[100:]
        assert scorer.stats()["shadow_blocks"] > 0
    assert sum(plain) > 0
    assert sum(healed) <= 0.1 * sum(plain)


def test_a_healthy_pod_is_never_marked_nor_changed():
    marked, errors, scorer = drift(Losses(), Losses(), heal=True, requests=3_000)
    assert (marked, sum(errors)) == (None, 0)
    assert (scorer.stats()["shadow_blocks"], scorer.stats()["shadowed_sources"]) == (0, 0)
    test, rng = DriftTest(), random.Random(1)
    assert not any(test.add(miss=rng.random() < 0.02) for _ in range(5_000))


@pytest.mark.parametrize("traffic", [Traffic(generated=100, at_once=8), Traffic(unseen=0.5, at_once=4)])
def test_a_busy_healthy_pod_is_never_marked(traffic):
    index = open_index()
    scorer = PrefixScorer(index, heal=EventPool(index).recount)
    pod = DriftingPod(index, "a", Losses(), num_blocks=700)
    served = pod.serve(scorer, conversations(1, count=40, blocks=20), traffic, seed=1)
    seen = [next(served) for _ in range(1_500)]
    assert {one.outcome for one in seen} >= {"reused", "overstated"}  # blocks are evicted while a request runs
    assert not any(one.drifting for one in seen)
    assert scorer.stats()["shadow_blocks"] == 0


def test_two_proofs_mark_and_are_cleared_only_slowly():
    test = DriftTest()
    assert not test.add(miss=True, proof=True)
    assert not any(test.add(miss=False) for _ in range(50))
    assert test.add(miss=None, proof=True)
    assert test.drifting
    assert sum(not test.add(miss=False) for _ in range(200) if test.drifting) > 100
    assert not test.drifting


def test_copies_of_one_block_prove_once_that_a_removal_was_lost():
    index = pods(A)
    scorer = PrefixScorer(index, block_size=4)
    index.apply(A, [stored([1, 2, 3], range(12))])

    def overstate(tokens):
        scorer.routed("a", tokens, model=MODEL)
        return scorer.observe("a", tokens, model=MODEL, cached_tokens=0)

    again = [stored([1, 2, 3], range(12))]
    index.apply(A, again)
    assert not overstate(range(13)).drifting
    index.apply(A, again)
    assert not overstate(range(13)).drifting  # two requests at the same time may both have computed it
    index.apply(A, [stored([4], range(50, 54))])
    assert not overstate(range(50, 55)).drifting  # one copy: it may be late
    index.apply(A, [stored([4], range(50, 54))])
    scorer.routed("a", range(70, 80), model=MODEL)
    seen = scorer.observe("a", range(70, 80), model=MODEL, cached_tokens=0)  # by now there are two
    assert (seen.outcome, seen.drifting) == ("no_reuse_possible", True)
    assert scorer.match(range(13), model=MODEL)[0].reason == (
        "drifting: the engine reused less than the index said 3 times, more 0 times"
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_late_events_mark_nobody_and_heal_breaks_nothing(seed):
    index = open_index()
    scorer = PrefixScorer(index, heal=EventPool(index).recount)
    pod = DriftingPod(index, "a", Losses(), num_blocks=350, seed=seed)
    prompts, late, marks = conversations(seed, count=20, blocks=20), [], 0
    for number in range(300):
        prompt = next(prompts)
        scorer.routed("a", prompt, model=MODEL)
        ran = pod.engine.run(prompt)
        marks += scorer.observe("a", prompt, model=MODEL, cached_tokens=ran.cached_tokens).drifting
        late.append(ran.events)
        if number % 10:  # mostly they come just after the answer, at times after the next one
            for events in late:
                pod.hear(events)
            late.clear()
    for events in late:
        pod.hear(events)
    assert marks == 0
    for prompt in [next(prompts) for _ in range(50)]:
        (match,) = scorer.match(prompt, model=MODEL)
        assert match.blocks == pod.engine.hit_blocks(prompt)


def test_what_an_engine_evidently_has_is_added_until_it_begins_anew():
    index = pods(A)
    index.apply(A, [stored([1], range(4))])
    scorer = PrefixScorer(index, block_size=4, heal=EventPool(index).recount)
    for _ in range(30):
        scorer.observe("a", range(13), model=MODEL, cached_tokens=12)
    (match,) = scorer.match(range(12), model=MODEL)
    assert (match.blocks, match.reusable_tokens, match.tiers, match.trust) == (3, 8, {"gpu": 3}, "degraded")
    assert scorer.score(range(12), model=MODEL) == {"a": 3.0}
    index.degrade(A, UNREACHABLE)
    assert scorer.match(range(12), model=MODEL)[0].blocks == 0
    index.degrade(A, "")
    index.restart(A)
    index.apply(A, [stored([1], range(4))])
    scorer._loop._follow_at = 0.0  # as after a second
    scorer.observe("a", range(50, 60), model=MODEL, cached_tokens=0)
    assert scorer.score(range(12), model=MODEL) == {"a": 1.0}
    assert scorer.stats()["shadowed_sources"] == 0


def test_what_an_engine_evidently_lost_is_taken_from_answers_but_not_from_other_tiers():
    index = pods(A, B)
    scorer = PrefixScorer(index, block_size=4, heal=EventPool(index).recount)
    one, two = range(13), range(100, 113)
    for source in (A, B):
        index.apply(source, [stored([1, 2, 3], range(12)), stored([4, 5, 6], range(100, 112))])
    for tokens in [one, two] * 4:  # one of them fits
        scorer.routed("a", tokens, model=MODEL)
        index.apply(A, [stored([1, 2, 3], range(12)) if tokens is one else stored([4, 5, 6], range(100, 112))])
        scorer.observe("a", tokens, model=MODEL, cached_tokens=0)
    assert scorer.score(one, model=MODEL) == {"b": 3.0}
    assert scorer.score(two, model=MODEL) == {"a": 3.0, "b": 3.0}
    assert [(m.pod, m.blocks, m.tiers) for m in scorer.match(one, model=MODEL)] == [("b", 3, {"gpu": 3}), ("a", 0, {})]
    index.apply(A, [stored([1, 2], range(8), medium="cpu")])
    assert [m.blocks for m in scorer.match(one, model=MODEL)] == [3, 2]
    scorer.routed("a", one, model=MODEL)  # a request that is on its way brings it back
    scorer._loop._routed.add(A, Prompt(one, MODEL).keys(4, 3))
    assert [m.blocks for m in scorer.match(one, model=MODEL)] == [3, 3]


def test_one_copy_is_counted_of_what_was_computed_anew():
    index = pods(A)
    pool, keys = EventPool(index), Prompt(range(12), MODEL).keys(4, 3)
    assert index.surplus(A, keys) == 0
    index.apply(
        A, [stored([1, 2, 3], range(12)), stored([2], range(4, 8), parent=1), stored([2], range(4, 8), parent=1)]
    )
    assert (index.surplus(A, keys), index.surplus(A, keys[:1]), index.surplus(Source("nobody"), keys)) == (2, 0, 0)
    assert pool.recount(A, keys[1:])
    assert index.surplus(A, keys) == 0
    assert index.stats()["recounted_total"] == 2
    index.apply(A, [removed(2)])
    assert [holding.tokens for holding in index.match(Prompt(range(12), MODEL))] == [4]
    assert not pool.recount(Source("nobody"), keys)
    hybrid = {"group_idx": 0, "kind": "sliding_window", "sliding_window": 8}
    index.register(B, model=MODEL)
    index.apply(B, [stored([1], range(4), **hybrid), stored([1], range(4), **hybrid)])
    assert not pool.recount(B, keys)
    assert index.surplus(B, keys) == 0
    assert index.stats()["recounted_total"] == 2


def test_many_threads_and_the_async_twins():
    index = pods()
    scorer = PrefixScorer(index, block_size=4, routed_ttl_s=0.001, heal=EventPool(index).recount)
    index.apply(A, [stored([1, 2], range(8))])
    failures = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(200):
                pod, tokens = rng.choice("ab"), range(rng.randrange(1, 40))
                scorer.routed(pod, tokens, model=MODEL)
                scorer.match(tokens, model=MODEL)
                scorer.score(tokens, model=MODEL)
                scorer.observe(pod, tokens, model=MODEL, cached_tokens=rng.randrange(len(tokens) + 1))
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sum(sum(tally.outcomes.values()) for tally in scorer.observations()) == 800

    async def ask():
        assert await scorer.arouted("a", range(9), model=MODEL)
        return await scorer.aobserve("a", range(9), model=MODEL, cached_tokens=8)

    assert asyncio.run(ask()).pod == "a"


def test_bad_settings_are_refused():
    with pytest.raises(InvalidRequest, match="routed_ttl_s"):
        PrefixScorer(open_index(), routed_ttl_s=0)
    with pytest.raises(InvalidRequest, match="speculative_weight"):
        PrefixScorer(open_index(), speculative_weight=-1)
