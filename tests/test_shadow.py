"""What an engine presumably has, compared with a list of all its blocks in the order of use."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import Prompt, Source
from kvindex.engine import SimulatedEngine
from scorer import shadow as module
from scorer.shadow import FEW, Order, Shadows

A, B = Source("a"), Source("b")


class SlowOrder:
    """Every block and nameless block in one list, the next to be evicted first."""

    def __init__(self):
        self.queue, self.seen, self.touched, self.moment = [], [], {}, 0

    def distance(self, key, since):
        place = self.queue.index(key)
        moments = self.touched
        return sum(1 for later in self.queue[place + 1 :] if moments[later] <= since)

    def take(self, keys, reused, *, reusable, partial, since):
        asked = [(reused - 1, True)] * (reused > 0) + [(reused, False)] * (reused < reusable)
        for number, there in asked:
            if keys[number] in self.queue and self.touched[keys[number]] <= since:
                self.seen.append((self.distance(keys[number], since), there))
        self.seen = self.seen[-module.EVIDENCE :]
        extra = partial or (reused == reusable < len(keys) and keys[-1] in self.queue)
        self.moment += 1
        new = [("nameless", self.moment)] * extra + [*reversed(keys)]
        self.queue = [key for key in self.queue if key not in new] + new
        self.touched |= dict.fromkeys(new, self.moment)

    def room(self):
        """Try every border; the farthest of the best."""
        misses = [distance for distance, there in self.seen if not there]
        if not misses:
            return None

        def wrong(room):
            return sum((distance < room) != there for distance, there in self.seen)

        borders = [distance + more for distance, _ in self.seen for more in (0, 1)]
        return max(borders, key=lambda room: (-wrong(room), room))

    def is_there(self, key, room, *, unknown):
        if key not in self.queue:
            return unknown
        return room is None or self.distance(key, self.moment) < room

    def runs(self, keys, held, spans):
        room = self.room()

        def first_lost(*, unknown):
            return min(
                [n for a, b in spans for n in range(a, b) if not self.is_there(keys[n], room, unknown=unknown)]
                or [held]
            )

        known = first_lost(unknown=True)
        sure = known if room is None else first_lost(unknown=False)
        end = held
        while end < len(keys) and self.is_there(keys[end], room, unknown=False):
            end += 1
        few = [sure if held - sure <= bound else held for bound in FEW]
        return held, known, sure, *few, end if known == held else known, end if sure == held else sure


def chain(path):
    """Give block keys of which each says all that comes before it, as real ones do."""
    return [int.from_bytes(bytes([1, *path[: end + 1]]), "big") for end in range(len(path))]


PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=5)


@given(st.lists(st.tuples(PATHS, st.integers(0, 5), st.booleans(), st.integers(0, 3), st.integers(0, 4)), max_size=40))
@settings(deadline=None)
def test_an_order_says_what_a_list_of_all_blocks_does(steps):
    fast, slow = Order(), SlowOrder()
    for path, reused, partial, ago, told in steps:
        keys = chain(path)
        reusable = len(keys) - (not partial)
        held = min(told, len(keys))
        spans = [(0, held // 2), (held // 2 + 1, held)] if held % 2 else [(0, held)]
        assert fast.runs(keys, held, spans) == slow.runs(keys, held, spans)
        taken = {"reusable": reusable, "partial": partial, "since": max(0, slow.moment - ago)}
        fast.take(keys, min(reused, reusable), **taken)
        slow.take(keys, min(reused, reusable), **taken)
        assert (fast.room, len(fast)) == (slow.room(), sum(type(key) is int for key in slow.queue))


def test_the_room_of_an_engine_is_learned_to_the_block():
    engine, order, rng = SimulatedEngine(num_blocks=200), Order(), random.Random(1)
    prompts = [[*range(60), *rng.choices(range(1000), k=rng.randrange(100, 700))] for _ in range(15)]
    wrong = []
    for _ in range(400):
        prompt = rng.choice(prompts)
        keys = Prompt(prompt, "m").keys(16, len(prompt) // 16)
        reusable = (len(prompt) - 1) // 16
        foreseen = min(order.runs(keys, len(keys), [(0, len(keys))])[2], reusable)
        reused = engine.run(prompt).cached_tokens // 16
        wrong.append(foreseen != reused)
        order.take(keys, reused, reusable=reusable, partial=len(prompt) % 16 > 0, since=order.moment)
    assert not any(wrong[200:])


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_USES", 50)
    shadows, rng = Shadows(max_keys=100), random.Random(1)
    for source in (A, B):
        shadows.begin(source)
    for _ in range(400):
        keys = chain(rng.choices(range(3), k=rng.randrange(1, 8)))
        source = A if rng.random() < 0.8 else B
        shadows.take(source, keys, 0, reusable=len(keys), partial=True, foreseen=None, comparable=False)
        held = [shadow.order for shadow in shadows._shadows.values()]
        assert len(shadows) == sum(map(len, held)) <= 100
        assert all(len(order._uses) <= 50 for order in held)
        assert all(sum(use.left for use in order._uses.values()) == len(order) for order in held)
        assert all(len(use.keys) <= 2 * use.left + 1 for order in held for use in order._uses.values())
    assert len(shadows) > 50
    shadows.forget(A)
    shadows.forget(B)
    assert len(shadows) == 0


def request(shadows, keys, held, reused):
    foreseen = shadows.foresee(A, keys, held, [(0, held)])
    shadows.take(A, keys, reused, reusable=len(keys), partial=True, foreseen=foreseen, comparable=True)


def test_who_is_right_is_followed_and_who_is_not_needed_is_dropped(monkeypatch):
    monkeypatch.setattr(module, "IDLE", 400)
    shadows, one, two = Shadows(), chain([0] * 6), chain([1] * 6)
    request(shadows, one, 6, 6)
    assert (len(shadows), shadows.foresee(A, one, 6, [(0, 6)])) == (0, None)
    shadows.begin(A)
    for keys in [one, two] * 3:  # only one of them fits
        request(shadows, keys, 6, 0)
    assert shadows.followed
    assert shadows.foresee(A, one, 6, [(0, 6)]).blocks[shadows.followed[A]] == 0
    for _ in range(20):  # now both fit, and the index says so
        request(shadows, one, 6, 6)
        request(shadows, two, 6, 6)
    assert shadows.foresee(A, one, 6, [(0, 6)]).blocks[shadows.followed.get(A, 0)] == 6
    for number in range(2000):
        request(shadows, chain([2, number % 200]), 2, 2)
    assert (shadows.followed, len(shadows)) == ({}, 0)
