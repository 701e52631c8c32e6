"""Snapshots of an index: a source that is written and loaded goes on as one that never stopped."""

import random
import struct
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import IndexerError, InvalidQuestion, Limits, Source, open_index
from indexer.errors import SnapshotError
from indexer.sections import Reader, read_head
from indexer.snapshots import Part, SnapshotIndex, read_snapshot, write_snapshot
from kvevents import decode_batches

from .conftest import GOLDEN, HAS_CORE, IMPLEMENTATIONS, hashing_of, read_capture, removed, stored
from .test_differential import LIMITS, MODELS, SOURCES, facts, operation, question, registration

IMPLS = ["python", "native"] if HAS_CORE else ["python"]
WAYS = list(product(IMPLS, IMPLS))
GAUGES = ("blocks", "held", "waiting", "waiting_dropped_total", "sources")
SEEDS = st.lists(st.lists(st.integers(0, 100_000)))


def opened(impl, limits=None):
    return open_index(f"memory://?impl={impl}", limits=limits)


def moved(index, impl, limits=None):
    """Another index that knows what this one does."""
    other = opened(impl, limits)
    for source in index.followed():
        assert other.load(index.dump(source)) == source
    return other


def do(index, what, args, more):
    try:
        getattr(index, what)(*args, **more)
    except IndexerError as error:
        return str(error)


def seen(index, impl, questions):
    make = hashing_of(impl).Prompt
    answers = [index.match(make(*about, **more), **asked) for about, more, asked in questions]
    stats = index.stats()
    gauges = {name: stats[name] for name in GAUGES}
    return answers, gauges, [facts(status) for status in index.sources()], [index.block_size(m) for m in MODELS]


def check_cut(first, second, limits, seeds, cut):
    never, writer = opened(second, limits), opened(first, limits)
    for index in (never, writer):
        for source in SOURCES:
            do(index, *registration(random.Random(0), source))
        for seed in seeds[:cut]:
            do(index, *operation(random.Random(seed)))
    loaded = moved(writer, second, limits)
    questions = [question(random.Random(n)) for n in range(12)]
    assert seen(loaded, second, questions) == seen(never, second, questions)
    for seed in seeds[cut:]:
        made = operation(random.Random(seed))
        assert do(loaded, *made) == do(never, *made)
        assert seen(loaded, second, questions[:3]) == seen(never, second, questions[:3])
    assert seen(loaded, second, questions) == seen(never, second, questions)
    for index in (never, writer, loaded):
        index.close()
    assert loaded.stats()["blocks"] == loaded.stats()["held"] == 0


@pytest.mark.parametrize(("first", "second"), WAYS)
@given(st.data(), SEEDS, st.sampled_from(LIMITS))
@settings(max_examples=40, deadline=None)
def test_a_stream_may_be_cut_anywhere(first, second, data, seeds, limits):
    seeds = [seed for some in seeds for seed in some]
    check_cut(first, second, limits, seeds, data.draw(st.integers(0, len(seeds))))


@pytest.mark.parametrize("limits", LIMITS, ids=["wide", "silent tiers age", "tight"])
@pytest.mark.parametrize(("first", "second"), WAYS)
@pytest.mark.parametrize("cut", [60, 200])
def test_long_streams_may_be_cut(first, second, limits, cut):
    check_cut(first, second, limits, list(range(260)), cut)


@pytest.mark.parametrize(("first", "second"), WAYS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_captures_of_the_engine_may_be_cut(path, first, second):
    meta, *lines = read_capture(path)
    source = Source(meta["pod"], meta["dp_rank"])
    messages = [line for line in lines if line["kind"] == "message"]
    questions = [
        ((line["tokens"], meta["model"]), {"lora_name": line.get("lora_name"), "cache_salt": line.get("cache_salt"),
         "mm_items": [tuple(item) for item in line.get("mm", [])]}, {})
        for line in lines if line["kind"] == "query"
    ]  # fmt: skip
    never, now = opened(second), opened(first)
    for index in (never, now):
        index.register(source, model=meta["model"], copies="set" if "full" in path.stem else "count")
    seq, impl = -1, first
    for number, message in enumerate(messages):
        if number % 7 == 3 or number == len(messages) - 1:  # again and again, from one to the other and back
            impl = second if impl == first else first
            now = moved(now, impl)
        for index in (never, now):
            if message["seq"] <= seq:
                index.restart(source)
            (batch,) = decode_batches([bytes.fromhex(message["payload"])], index)
            index.apply_all(source, [batch.events], last_seq=message["seq"])
        seq = message["seq"]
    assert seen(now, impl, questions)[0] == seen(never, second, questions)[0]
    assert seen(now, impl, ())[1:] == seen(never, second, ())[1:]


@pytest.fixture
def small(tmp_path, impl):
    """A file of two parts, and the index that it is of."""
    index = opened(impl)
    for pod in ("a", "b"):
        index.register(Source(pod), model="m")
        names = [1, 2] if pod == "a" else [b"x" * 32, b"y" * 32]
        index.apply(Source(pod), [stored(names, range(8)), stored([7], range(4), parent=99), stored([5], [], size=0)])
        index.apply(Source(pod), [stored(names, range(8)), stored(names, [], medium="cpu"), removed(names[0])])
    path = tmp_path / "snapshot"
    write_snapshot(path, [Part(source.pod.encode(), [index.dump(source)]) for source in index.followed()])
    return path, index


def test_a_file_gives_back_what_was_written(small):
    path, index = small
    assert isinstance(index, SnapshotIndex)
    parts = list(read_snapshot(path))
    assert [part.note for part in parts] == [b"a", b"b"]
    assert [len(part.sources) for part in parts] == [1, 1]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("impl", ["python"])
def test_a_file_that_was_cut_or_changed_anywhere_is_refused(small, tmp_path):
    path, _ = small
    whole, bad = path.read_bytes(), tmp_path / "bad"
    made = [whole[:length] for length in range(len(whole))]
    made += [whole[:n] + bytes([whole[n] ^ flip]) + whole[n + 1 :] for n in range(len(whole)) for flip in (1, 0x80)]
    made += [whole + b"\0", b"", b"\0" * 100]
    for content in made:
        bad.write_bytes(content)
        with pytest.raises(SnapshotError, match=r"bad: .*; delete it"):
            next(read_snapshot(bad))


def test_a_file_that_cannot_be_had_or_written_says_so(tmp_path):
    with pytest.raises(SnapshotError, match="cannot be read"):
        next(read_snapshot(tmp_path / "none"))
    with pytest.raises(SnapshotError, match="cannot be written"):
        write_snapshot(tmp_path / "none" / "file", [])


def test_a_write_that_fails_leaves_the_one_before(small):
    path, _ = small
    before = path.read_bytes()

    def parts():
        yield Part(b"", [])
        raise OSError(28, "No space left on device")

    with pytest.raises(SnapshotError, match="No space left"):
        write_snapshot(path, parts())
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_source_in_bad_bytes_is_refused_or_whole(small):
    """Without the checksums: whatever bytes say, an index refuses them without a trace, or can go on and be closed."""
    _, index = small
    impl = "native" if "Native" in repr(index) else "python"
    refused = 0
    for source in index.followed():
        section = index.dump(source)
        made = [section[:length] for length in range(len(section))] + [section + b"\0"]
        changes = [(n, bytes([section[n] ^ flip])) for n in range(len(section)) for flip in (1, 0x80)]
        made += [section[:n] + changed + section[n + 1 :] for n, changed in changes]
        for number, content in enumerate(made):
            other = opened(impl)
            try:
                got = other.load(content)
            except SnapshotError:
                refused += 1
                assert other.stats()["sources"] == other.stats()["blocks"] == 0
            else:
                assert number > len(section)
                other.apply(got, [stored([1, 2], range(8)), removed(1, 2, b"x" * 32), stored([99], range(4))])
                other.match(hashing_of(impl).Prompt(range(8), "m"))
                other.expire()
                other.sources()
            other.close()
            assert other.stats()["blocks"] == 0
    assert refused > len(section)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_over_the_limits_is_refused(impl):
    index = opened(impl)
    for pod in ("a", "b"):
        index.register(Source(pod), model="m")
        index.apply(Source(pod), [stored([1], range(4)), stored([2], range(2), size=2)])
    one = opened(impl, Limits(max_sources=1))
    one.load(index.dump(Source("a")))
    with pytest.raises(SnapshotError, match="followed already"):
        one.load(index.dump(Source("a")))
    with pytest.raises(SnapshotError, match=r"Limits\.max_sources"):
        one.load(index.dump(Source("b")))
    with pytest.raises(SnapshotError, match=r"Limits\.max_slots_per_source"):
        opened(impl, Limits(max_slots_per_source=1)).load(index.dump(Source("a")))
    with pytest.raises(InvalidQuestion, match="not registered"):
        index.dump(Source("c"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_shared_cache_learns_what_was_said_while_the_snapshot_was_written(impl):
    index, shared = opened(impl), Source("SHARED_STORAGE")
    index.register(shared, model="m", fleet_wide=True)
    index.register(Source("a"), model="m")
    index.apply(shared, [stored([1], [], size=0, medium="shared_storage")])
    first = index.dump(shared)
    index.apply(Source("a"), [stored([1], range(4))])
    other = opened(impl)
    other.load(first)
    other.load(index.dump(Source("a")))
    assert other.stats()["waiting"] == 1
    other.settle()
    assert other.stats()["waiting"] == 0
    (held,) = other.match(hashing_of(impl).Prompt(range(4), "m"))
    assert held.runs[0].media == ("gpu", "shared_storage")


@pytest.mark.parametrize(("first", "second"), WAYS)
def test_what_was_removed_while_it_waited_stays_removed(first, second):
    index = opened(first)
    index.register(Source("a"), model="m")
    index.apply(Source("a"), [stored([2, 3], range(4, 12), parent=1), stored([2, 3], range(4, 12), parent=1)])
    index.apply(Source("a"), [removed(3), removed(3), removed(2)])
    other = moved(index, second)
    for one, impl in ((index, first), (other, second)):
        one.apply(Source("a"), [removed(2), stored([1], range(4))])  # the other copy of it
        assert one.stats()["held"] == 1
        (held,) = one.match(hashing_of(impl).Prompt(range(12), "m"))
        assert held.tokens == 4


@pytest.mark.parametrize(("first", "second"), WAYS)
def test_a_block_is_no_younger_for_being_loaded(first, second):
    index = opened(first)
    index.register(Source("a"), model="m")
    index.apply(Source("a"), [stored([1], range(4), medium="disk")])
    section = index.dump(Source("a"))
    hour = bytearray(section)
    taken_at = hour.index(struct.pack("<d", taken_at_of(section)))
    struct.pack_into("<d", hour, taken_at, taken_at_of(section) - 3600.0)
    for content, ttl, held in ((section, 1800.0, 1), (bytes(hour), 1800.0, 0), (bytes(hour), 7200.0, 1)):
        other = opened(second, Limits(silent_tier_ttl_s=ttl))
        other.load(content)
        # what was written of it once more still has its age
        again = opened(second, Limits(silent_tier_ttl_s=ttl))
        again.load(other.dump(Source("a")))
        for one in (other, again):
            one.expire()
            assert one.stats()["held"] == held


def taken_at_of(section):
    reader = Reader(section)
    read_head(reader)
    reader._at -= 8
    return reader.seconds()
