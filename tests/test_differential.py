"""Both implementations of the index side by side: the same streams, the same answers, the same counters."""

import random

import msgspec
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from indexer import AllBlocksCleared, IndexerError, Limits, Source, block_keys, open_index, prompt
from indexer.keys import image_extras
from kvevents import decode_batches

from .conftest import GOLDEN, HAS_CORE, NEEDS_CORE, read_capture, removed, stored

pytestmark = NEEDS_CORE
if HAS_CORE:
    from indexer import _native

MODELS = ["m", "n"]
SHARED = Source("SHARED_STORAGE")
SOURCES = [Source("a"), Source("a", 1), Source("b"), Source("hybrid"), Source("set"), SHARED, Source("other")]
TEXTS = [  # what prompts are made of: beginnings in common, one long enough for several chunks of a look-up
    [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8],
    [1, 1, 2, 2, 3, 3, 9, 9, 5, 5, 6, 6],
    [1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2],
    [n * n % 97 for n in range(500)],
]
SIZES = [2, 2, 2, 3, 4]
GROUPS = {  # number -> block size, kind, window
    0: (2, "full_attention", None),
    1: (2, "sliding_window", 5),
    2: (4, "mamba", None),
    3: (3, None, 4),
    4: (4, "some_window", 4),
}
MEDIA = ["gpu", "gpu", "gpu", "cpu", "cpu_pinned", "disk", "shared_storage", "moon"]
IMAGES = ("cat", 3, 6), ("dog", 8, 2)
TIGHT = Limits(
    max_sources=5, max_slots_per_source=4, parked_blocks=6, remembered_blocks=2, block_sizes=2, silent_tier_ttl_s=0.0
)
BOUNDS = {"expired_total", "too_many_slots_total", "waiting_dropped_total"}
LIMITS = [Limits(), Limits(silent_tier_ttl_s=0.0), TIGHT]


def pick(rng, *choices):
    """One of several values, the first mostly."""
    return choices[0] if rng.random() < 0.8 else rng.choice(choices)


def name_of(text, size, number, *, digest):
    """An engine's name of block `number`: equal beginnings have equal names."""
    if number < 0:
        return 0
    name = hash((size, *text[: (number + 1) * size])) % 2**64
    return name.to_bytes(32, "big") if digest else name


def some_name(rng, source):
    text, size = rng.choice(TEXTS), rng.choice(SIZES)
    number = rng.randrange(-1, 6)
    return name_of(text, size, number, digest=pick(rng, source.pod == "b", True, False))


def group_of(rng, source):
    return rng.choice([0, 0, 1, 1, 2, 3, 4, None]) if source.pod == "hybrid" else pick(rng, None, None, 0, 1)


def store(rng, source):
    text, size, group = rng.choice(TEXTS), rng.choice(SIZES), group_of(rng, source)
    more = {}
    if group is not None:
        size, kind, window = GROUPS[group]
        more = {"group_idx": group, "kind": pick(rng, kind, None), "sliding_window": pick(rng, window, None)}
    first = rng.choice([0, 0, 0, 1, 2, 3])
    count = rng.choice([1, 1, 2, 3, 70, 250])
    tokens = text[first * size : (first + count) * size]
    digest = pick(rng, source.pod == "b", True, False)
    hashes = [name_of(text, size, first + n, digest=digest) for n in range(len(tokens) // size)]
    parent = None if first == 0 else name_of(text, size, first - 1, digest=digest)
    if rng.random() < 0.06 and first:
        parent = rng.choice([None, 0, 12345])
    if rng.random() < 0.1 and hashes and parent is None:
        hashes[0] = some_name(rng, source)  # two names of one block, or one name of two
    if rng.random() < 0.2:
        more["lora"] = rng.choice(["ad", 3])
    if rng.random() < 0.2:
        more["cache_salt"] = "s"
    if rng.random() < 0.2:
        bare = rng.random() < 0.5
        more["extras"] = image_extras(IMAGES, size, range(first, first + len(hashes)), bare=bare)
        more["bare_images"] = bare
    shape = pick(rng, "plain", "more", "fewer", "sparse", "named", "none")
    if shape == "more":
        tokens = [*tokens, 1]
    elif shape == "fewer":
        tokens = tokens[:-1]
    elif shape == "sparse":
        hashes = hashes[rng.randrange(2) :: 2]
    elif shape == "none":
        hashes = []
    if shape == "named" or (source is SHARED and rng.random() < 0.8):
        tokens, size, hashes = [], rng.choice([0, size]), hashes[:4]
    return stored(hashes, tokens, parent=parent, size=size, medium=rng.choice(MEDIA), **more)


def remove(rng, source):
    names = [some_name(rng, source) for _ in range(rng.choice([1, 2, 5]))]
    return removed(*names, medium=pick(rng, "gpu", *MEDIA), group_idx=group_of(rng, source))


def store_in_groups(rng, source):
    """What an engine of a hybrid model does: all groups store one prompt, and keep of it what they need."""
    text, made = rng.choice(TEXTS), []
    for group in rng.choice([(0, 1), (0, 2), (0, 1, 2), (1, 4), (3,), (2, 3)]):
        size, kind, window = GROUPS[group]
        count = rng.randrange(1, len(text) // size + 1)
        names = [name_of(text, size, number, digest=False) for number in range(count)]
        more = {"group_idx": group, "kind": kind, "sliding_window": window, "size": size}
        made.append(stored(names, text[: count * size], **more))
        if rng.random() < 0.5:
            made.append(removed(*rng.sample(names, rng.randrange(1, min(count, 4) + 1)), group_idx=group))
    return made


def events(rng, source):
    if source.pod == "hybrid" and rng.random() < 0.6:
        return store_in_groups(rng, source)
    makers = [store, store, store, remove, lambda rng, source: AllBlocksCleared()]
    weights = [4, 3, 3, 5, 0.3]
    return [rng.choices(makers, weights)[0](rng, source) for _ in range(rng.choice([1, 1, 2, 3, 8]))]


def operation(rng):
    """Something that a writer does, as the name of a method and its arguments."""
    source = rng.choice(SOURCES)
    what = rng.choices(["apply", "apply_all", "register", "restart", "degrade", "forget", "expire", "recount",
                        "surplus"], [20, 4, 2, 0.5, 1, 0.5, 0.5, 2, 2])[0]  # fmt: skip
    if what == "apply":
        return what, (source, events(rng, source)), {}
    if what == "apply_all":
        return what, (source, [events(rng, source) for _ in range(rng.randrange(1, 4))]), {}
    if what == "register":
        return registration(rng, source)
    if what == "restart":
        return what, (source,), {}
    if what == "degrade":
        return what, (source, rng.choice(["", "", "gap"])), {}
    if what in ("recount", "surplus"):
        keys = [key for text in TEXTS for size in {*SIZES} for key in block_keys(text, "m", block_size=size)]
        return what, (source, rng.sample(keys, rng.randrange(len(keys)))), {}
    if what == "forget":
        return what, (source.pod,), {}
    return what, (), {}


def registration(rng, source):
    copies = "set" if source.pod == "set" else "count"
    model = "n" if source.pod == "other" else "m"
    more = {"degraded": rng.choice(["", "no events yet"])} if rng.random() < 0.2 else {}
    return "register", (source,), {"model": model, "copies": copies, "fleet_wide": source is SHARED, **more}


def question(rng):
    """What a reader asks: the arguments of a prompt, and those of `match`."""
    text = rng.choice(TEXTS)
    tokens = text[: rng.choice([len(text), rng.randrange(len(text) + 1)])] + [77] * rng.choice([0, 0, 1, 5])
    about = {
        "lora_name": pick(rng, None, "ad", 3),
        "cache_salt": pick(rng, None, "s"),
        "mm_items": pick(rng, (), IMAGES),
    }
    asked = {
        "pods": pick(rng, None, [], ["a", "nobody"], {"hybrid", "b"}),
        "block_size": pick(rng, None, 2, 3, 4, 5),
        "holders_only": rng.random() < 0.3,
    }
    return (tokens, pick(rng, *MODELS)), about, asked


class Twins:
    """Two indexes that are told the same and asked the same."""

    def __init__(self, limits=None):
        self.both = [open_index(f"memory://?impl={impl}", limits=limits) for impl in ("python", "native")]
        self.log = []

    def close(self):
        for index in self.both:
            index.close()
        stats = self.compare()
        assert stats["blocks"] == stats["held"] == stats["waiting"] == stats["sources"] == 0

    def do(self, what, args=(), more=None):
        said = [outcome(getattr(index, what), *args, **(more or {})) for index in self.both]
        assert said[0] == said[1]
        return said[0]

    def compare(self):
        """Compare all that an index says of itself."""
        stats, other = ({name: n for name, n in index.stats().items() if name != "bytes"} for index in self.both)
        assert stats == other
        sources, others = ([facts(status) for status in index.sources()] for index in self.both)
        assert sources == others
        for model in [*MODELS, "unknown"]:
            self.do("block_size", (model,))
        return stats

    def ask(self, about, more, asked):
        """Compare answers; each may be asked with its own kind of prompt or the other's."""
        python, native = prompt.Prompt(*about, **more), _native.Prompt(*about, **more)
        answers = [index.match(one, **asked) for index, one in zip(self.both, (python, native), strict=True)]
        assert answers[0] == answers[1]
        if len(about[0]) < 20:
            swapped = zip(self.both, (native, python), strict=True)
            assert answers == [index.match(one, **asked) for index, one in swapped]
        return answers[0]


def outcome(method, *args, **more):
    try:
        return method(*args, **more)
    except IndexerError as error:
        return type(error), str(error)


def facts(status):
    return {**msgspec.structs.asdict(status), "degraded_since": status.degraded_since > 0}


def drive(twins, seeds, questions):
    """Let both live through an operation for each seed; give all answers."""
    for source in SOURCES:
        twins.do(*registration(random.Random(0), source))
    for seed in seeds:
        rng = random.Random(seed)
        made = operation(rng)
        twins.log.append(made)
        twins.do(*made)
        twins.compare()
        for _ in range(questions):
            asked = question(rng)
            twins.log.append(asked)
            yield from twins.ask(*asked)


SEEDS = st.lists(st.lists(st.integers(0, 100_000)))  # a list of lists: longer, and as quick to shrink


@given(SEEDS, st.sampled_from(LIMITS))
@settings(max_examples=250, deadline=None)
def test_random_streams(seeds, limits):
    seeds, twins = [seed for some in seeds for seed in some], Twins(limits)
    try:
        for _ in drive(twins, seeds, 3):
            pass
    finally:
        note("\n".join(map(repr, twins.log)))
    twins.close()


@pytest.mark.parametrize("limits", LIMITS, ids=["wide", "silent tiers age", "tight"])
def test_long_streams_in_which_everything_happens(limits):
    twins = Twins(limits)
    answers = list(drive(twins, range(1200), 2))
    never = {name for name, count in twins.compare().items() if not count}
    assert never <= ({"evicted_total", "recounted_total"} if limits is TIGHT else {*BOUNDS, "evicted_total"})
    assert {len(holding.runs) for holding in answers} >= {0, 1, 2, 3, 4}
    assert {holding.source for holding in answers if holding.tokens} == {*SOURCES} - {SHARED}
    assert {holding.degraded.partition(":")[0] for holding in answers} >= {"", "gap", "hash mismatch", "unplaced"}
    assert max(holding.tokens for holding in answers) == 500
    twins.close()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_captures_of_the_engine(path):
    twins, seq = Twins(), -1
    meta, *lines = read_capture(path)
    source = Source(meta["pod"], meta["dp_rank"])
    twins.do("register", (source,), {"model": meta["model"], "copies": "set" if "full" in path.stem else "count"})
    for line in lines:
        if line["kind"] == "message":
            if line["seq"] <= seq:
                twins.do("restart", (source,))
            seq = line["seq"]
            for index in twins.both:
                (batch,) = decode_batches([bytes.fromhex(line["payload"])], index)
                assert not batch.discards
                index.apply(source, batch.events)
            twins.compare()
        elif line["kind"] == "query":
            more = {"lora_name": line.get("lora_name"), "cache_salt": line.get("cache_salt"),
                    "mm_items": [tuple(item) for item in line.get("mm", [])]}  # fmt: skip
            for size in (None, meta["block_size"]):
                twins.ask((line["tokens"], meta["model"]), more, {"block_size": size})
    twins.close()
