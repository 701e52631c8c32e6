"""The simulated engine against a slow model of the same rules, and the rules one by one."""

import random
from collections import Counter

import pytest

from kvindex.demo import run_demo
from kvindex.engine import Cleared, OutOfBlocksError, Removed, SimulatedEngine, Stored
from kvindex.fleet import Fleet
from kvindex.traffic import run_fleet
from kvindex.workload import Workload

SIZE = 4


def tokens(blocks: int, start: int = 0) -> list[int]:
    return list(range(start, start + blocks * SIZE))


class SlowEngine:
    """The same rules with lists only; a block's name is the whole prompt up to its end."""

    def __init__(self, blocks: int) -> None:
        self.names: list[tuple | None] = [None] * blocks
        self.users = [0] * blocks
        self.free = list(range(blocks))
        self.order: list[int] = []  # blocks in the order in which they were filled

    def blocks_of(self, ids, root):
        return [(root, *ids[: end + SIZE]) for end in range(0, len(ids) // SIZE * SIZE, SIZE)]

    def hit_blocks(self, ids, root):
        count = 0
        for name in self.blocks_of(ids, root):
            if name not in self.names:
                break
            count += 1
        return count

    def begin(self, ids, root):
        hits = min(self.hit_blocks(ids, root), (len(ids) - 1) // SIZE)
        names = self.blocks_of(ids, root)
        mine = [next(n for n in self.order if self.names[n] == name) for name in names[:hits]]
        needed = (len(ids) + SIZE - 1) // SIZE - hits
        if needed > len([n for n in self.free if n not in mine]):
            return None
        for number in mine:
            self.users[number] += 1
            if number in self.free:
                self.free.remove(number)
        log = self.take(mine, needed)
        log += self.fill(mine, names, hits)
        return list(ids), root, mine, hits, log

    def finish(self, request, output):
        ids, root, mine, _, _ = request
        whole = len(ids) // SIZE
        ids += output[: max(0, len(output) - 1)]
        while (len(ids) + SIZE - 1) // SIZE > len(mine) + len(self.free):
            ids.pop()
        log = self.take(mine, (len(ids) + SIZE - 1) // SIZE - len(mine))
        log += self.fill(mine, self.blocks_of(ids, root), whole)
        for number in mine[::-1]:
            self.users[number] -= 1
            if self.users[number] == 0:
                self.free.append(number)
        return log

    def take(self, mine, count):
        log = []
        for _ in range(count):
            number = self.free.pop(0)
            if self.names[number] is not None:
                log.append(("removed", self.names[number]))
                self.names[number] = None
                self.order.remove(number)
            self.users[number] = 1
            mine.append(number)
        return log

    def fill(self, mine, names, first):
        if first >= len(names):
            return []
        for number, name in list(zip(mine, names, strict=False))[first:]:
            if self.names[number] != name:
                self.names[number] = name
                self.order.append(number)
        return [("stored", names[first:])]


def flat(events, names):
    """The engine's events with its hashes translated to the slow model's names."""
    log = []
    for event in events:
        if isinstance(event, Stored):
            log.append(("stored", [names[name] for name in event.hashes]))
        else:
            log.append(("removed", names[event.hash]))
    return log


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_the_slow_model_on_random_traffic(seed):
    rng = random.Random(seed)
    engine, slow = SimulatedEngine(block_size=SIZE, num_blocks=24, seed=seed), SlowEngine(24)
    names: dict[int, tuple] = {}
    opened: list = []
    prompts = [[rng.randrange(3) for _ in range(rng.randrange(1, 40))] for _ in range(12)]
    table: Counter[int] = Counter()
    for _ in range(600):
        prompt = rng.choice(prompts)[: rng.randrange(1, 40)]
        root = rng.choice([None, None, "salt"])
        whole = prompt + [rng.randrange(3) for _ in range(rng.randrange(10))]
        for name, slow_name in zip(engine.hashes(whole, cache_salt=root), slow.blocks_of(whole, root), strict=True):
            assert names.setdefault(name, slow_name) == slow_name
        assert engine.hit_blocks(whole, cache_salt=root) == slow.hit_blocks(whole, root)
        theirs = slow.begin(prompt, root)
        if theirs is None:
            with pytest.raises(OutOfBlocksError):
                engine.begin(prompt, cache_salt=root)
        else:
            ours = engine.begin(prompt, cache_salt=root)
            assert ours.cached_tokens == theirs[3] * SIZE
            assert flat(ours.events, names) == theirs[4]
            follow(table, ours.events)
            opened.append((ours, theirs, whole[len(prompt) :]))
        while opened and (theirs is None or len(opened) > 2 or rng.random() < 0.5):
            ours, request, output = opened.pop(rng.randrange(len(opened)))
            events = engine.finish(ours, output)
            assert flat(events, names) == slow.finish(request, output)
            follow(table, events)
            theirs = request
        assert +table == Counter(engine.resident())
        assert {names[name]: copies for name, copies in engine.resident().items()} == Counter(
            name for name in slow.names if name is not None
        )


def follow(table, events):
    for event in events:
        if isinstance(event, Stored):
            table.update(event.hashes)
        elif isinstance(event, Removed):
            table[event.hash] -= 1


def test_a_prompt_of_whole_blocks_run_again_stores_its_last_block_twice():
    engine = SimulatedEngine(block_size=SIZE, num_blocks=16)
    first = engine.run(tokens(3))
    again = engine.run(tokens(3))
    assert (first.cached_tokens, again.cached_tokens) == (0, 8)
    assert [event.hashes for event in again.events] == [first.events[0].hashes[2:]]
    assert again.events[0].parent == first.events[0].hashes[1]
    assert sorted(engine.resident().values()) == [1, 1, 2]
    assert engine.hit_blocks(tokens(3)) == 3


def test_evicts_the_end_of_the_oldest_prompt_first_one_hash_per_event_before_the_stores():
    engine = SimulatedEngine(block_size=SIZE, num_blocks=4)
    old = engine.run(tokens(3)).events[0].hashes
    ran = engine.run(tokens(3, start=100))
    assert ran.events[:-1] == [Removed(old[2]), Removed(old[1])]
    assert isinstance(ran.events[-1], Stored)
    assert engine.hit_blocks(tokens(3)) == 1


def test_blocks_in_use_are_not_evicted():
    engine = SimulatedEngine(block_size=SIZE, num_blocks=4)
    request = engine.begin(tokens(3))
    with pytest.raises(OutOfBlocksError, match="2 more blocks, 1 of 4"):
        engine.begin(tokens(2, start=100))
    assert engine.hit_blocks(tokens(3)) == 3
    engine.finish(request)
    assert engine.run(tokens(2, start=100)).cached_tokens == 0
    with pytest.raises(ValueError, match="not open"):
        engine.finish(request)


def test_reset_is_refused_while_a_request_is_open():
    engine = SimulatedEngine(block_size=SIZE, num_blocks=4)
    request = engine.begin(tokens(2))
    assert engine.reset() == []
    engine.finish(request)
    assert engine.reset() == [Cleared()]
    assert engine.resident() == {}
    assert all(isinstance(event, Stored) for event in engine.run(tokens(4)).events)


def test_generated_tokens_are_cached_but_the_last():
    engine = SimulatedEngine(block_size=SIZE, num_blocks=8)
    engine.run(tokens(1), list(range(4, 8)))
    assert engine.hit_blocks(tokens(2)) == 1
    engine.run(tokens(1), list(range(4, 9)))
    assert engine.hit_blocks(tokens(2)) == 2


def test_output_stops_where_no_block_is_free():
    engine = SimulatedEngine(block_size=SIZE, num_blocks=2)
    engine.run(tokens(1), list(range(4, 100)))
    assert engine.hit_blocks(tokens(3)) == 2


def test_adapters_and_salts_part_equal_tokens():
    engine = SimulatedEngine(block_size=SIZE, num_blocks=16)
    ways = [{}, {"lora_name": "a"}, {"cache_salt": "a"}, {"lora_name": "a", "cache_salt": "a"}]
    for way in ways:
        assert engine.hit_blocks(tokens(2), **way) == 0
        engine.run(tokens(2), **way)
    assert all(engine.hit_blocks(tokens(2), **way) == 2 for way in ways)


def test_names_are_unsigned_64_bit_and_depend_on_the_seed():
    names = [SimulatedEngine(block_size=SIZE, seed=seed).hashes(tokens(50)) for seed in (0, 0, 1)]
    assert names[0] == names[1]
    assert not set(names[0]) & set(names[2])
    assert all(0 <= name < 2**64 for name in names[0])
    assert max(names[0]) >= 2**63


def test_refuses_sizes_and_prompts_that_make_no_sense():
    with pytest.raises(ValueError, match="block_size=0"):
        SimulatedEngine(block_size=0)
    with pytest.raises(ValueError, match="at least one token"):
        SimulatedEngine().run([])


def test_a_workload_is_the_same_for_the_same_seed_and_stays_within_its_bound():
    first, again = Workload(3, max_tokens=300), Workload(3, max_tokens=300)
    turns = [next(first) for _ in range(500)]
    assert turns == [next(again) for _ in range(500)]
    assert max(len(turn.prompt) + len(turn.output) for turn in turns) <= 300
    assert first.sample(20) == again.sample(20)


@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 64), (16, 64), (1024, 64)])
def test_a_fleet_runs_with_any_sizes(block_size, num_blocks, capsys):
    status = run_fleet(
        pods=2,
        base_port=0,
        block_size=block_size,
        num_blocks=num_blocks,
        wait_subscribers=0,
        rate=0,
        seconds=0.2,
        every=1,
    )
    assert status == 0
    assert "blocks published" in capsys.readouterr().out


def test_a_fleet_counts_what_its_pods_reuse():
    with Fleet(2, block_size=SIZE, num_blocks=16, dialects=("sglang",)) as fleet:
        assert [fleet.step(0, tokens(3)), fleet.step(0, tokens(3)), fleet.step(1, tokens(3))] == [0, 8, 0]
        assert fleet.pods[0].hit_share == pytest.approx(1 / 3)
        assert fleet.blocks_published() == 3 + 1 + 3
        assert [pod.publisher.last_seq for pod in fleet.pods] == [1, 0]


def test_the_demo_ends_with_the_index_and_the_engines_agreeing(capsys):
    assert run_demo(pods=3, requests=80, seconds=10, plain=True) == 0
    assert "the index and the engines agree" in capsys.readouterr().out
