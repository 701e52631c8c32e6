"""Messages applied by an index that reads payloads itself, against one that is given event by event."""

import itertools
from contextlib import suppress

import msgspec
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import IndexerError, LimitReached, Limits, Prompt, Source, open_index
from kvevents import Message
from kvevents.apply import Applier
from kvevents.message import Publisher
from kvevents.trust import GAP

from .conftest import NEEDS_CORE, payload

pytestmark = NEEDS_CORE

PODS = ["a", "b", "SHARED_STORAGE"]
PUBLISHERS = [Publisher("a", "")] * 3 + [Publisher("a", "tcp://x"), Publisher("b", ""), Publisher("b", "tcp://y"),
              Publisher("SHARED_STORAGE", "tcp://s"), Publisher("", "tcp://x")]  # fmt: skip
CHAIN = [["BlockStored", [n], n - 1 or None, [n] * 4, 4] for n in range(1, 5)]
SIDE = ["BlockStored", [7, 8], 1, [7] * 8, 4, None, "cpu"]
NAMED = ["BlockStored", [2, 7], None, [], 0, None, "shared_storage"]
PLAIN = [[event] for event in CHAIN] + [CHAIN, [SIDE], [NAMED], [["BlockRemoved", [2]]], [["BlockRemoved", [7], "cpu"]],
         [], [SIDE, ["BlockRemoved", [1]], CHAIN[0]]]  # fmt: skip
CLEAR = ["AllBlocksCleared"]
OTHERS = [payload(CLEAR), payload(CHAIN[0], CLEAR, CHAIN[0]), payload(CLEAR, 7),
          payload(CHAIN[0], ["Unknown"], 7), payload(7), b"", b"\xc1", payload(rank=-1),
          payload(CHAIN[0], rank=1), payload(CLEAR, rank=1), payload(SIDE, rank=2)]  # fmt: skip
PAYLOADS = st.sampled_from(PLAIN).map(lambda events: payload(*events)) | st.one_of(
    st.sampled_from(PLAIN).map(lambda events: payload(*events, rank=None)), st.sampled_from(OTHERS)
)
STEPS = st.sampled_from([1] * 30 + [2, 4, 0, -1, -3])
GROUPS = st.tuples(st.sampled_from(PUBLISHERS), st.lists(st.tuples(STEPS, PAYLOADS), min_size=1, max_size=12))
CALLS = st.tuples(
    st.sampled_from(["forget", "release", "lose", "distrust", "register"]), st.sampled_from([*PODS, "nobody"])
)
HISTORIES = st.lists(GROUPS | GROUPS | GROUPS | CALLS, max_size=20)


class Side:
    """An index and who applies messages to it."""

    def __init__(self, impl, limits):
        self.index = open_index(f"memory://?impl={impl}", limits=limits)
        self.applier = Applier(self.index, model="m", copies="count", log=structlog.get_logger())

    def do(self, what, pod):
        if what == "forget":
            self.applier.forget(pod, keep=False)
        elif what == "release":
            self.applier.forget(pod, keep=True)
        elif what == "lose":  # somebody else forgets it
            self.index.forget(pod)
        elif what == "distrust":
            self.applier.distrust(pod)
        else:
            with suppress(LimitReached):
                self.index.register(Source(pod), model="m", copies="set", degraded="no events yet")

    def apply(self, publisher, messages):
        try:
            self.applier.apply(publisher, messages)
        except IndexerError as error:
            return str(error)

    def state(self):
        statuses = [msgspec.structs.asdict(s) | {"degraded_since": s.degraded_since > 0} for s in self.index.sources()]
        prompts = [[1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4], [1] * 4 + [7] * 8, [7] * 8]
        answers = [self.index.match(Prompt(tokens, "m")) for tokens in prompts]
        stats = self.index.stats() | {"bytes": 0}
        return statuses, answers, stats, +self.applier.counters, self.applier.sequences


@given(HISTORIES, st.sampled_from([Limits(), Limits(max_sources=2)]))
@settings(max_examples=500, deadline=None)
def test_an_index_that_reads_payloads_itself_comes_to_the_same(history, limits):
    sides, last = [Side(impl, limits) for impl in ("native", "python")], {}
    for who, what in history:
        if isinstance(who, str):
            for side in sides:
                side.do(who, what)
        else:
            messages = []
            for step, body in what:
                last[who] = max(0, last.get(who, -1) + step)
                messages.append(Message(b"", last[who], body, who.pod, endpoint=who.endpoint))
            said = [side.apply(who, messages) for side in sides]
            assert said[0] == said[1]
        assert sides[0].state() == sides[1].state()


@pytest.mark.parametrize("impl", ["python", "native"])
@pytest.mark.parametrize(
    ("payloads", "applied"),
    [
        ([payload(CHAIN[0]), payload(CLEAR), payload(CHAIN[0])], (False, True)),
        ([b"", payload(CLEAR), payload(CHAIN[0])], (True, True)),
        ([payload(CHAIN[0]), payload(CLEAR), b""], (True, False)),
        ([payload(CLEAR), b"", payload(CHAIN[0])], (True, False)),
    ],
)
def test_what_is_lost_after_a_clear_is_not_made_up_for_by_it(impl, payloads, applied):
    side, who = Side(impl, None), Publisher("a", "")
    messages = [Message(b"", seq, body, who.pod) for seq, body in enumerate(payloads)]
    assert side.applier.apply(who, messages) == applied


@pytest.mark.parametrize("impl", ["python", "native"])
def test_nothing_is_kept_of_who_is_not_followed(impl):
    side = Side(impl, Limits(max_sources=1))
    for pod, body in [("a", payload(CHAIN[0])), ("b", payload(CHAIN[0])), ("c", b""), ("", payload(CHAIN[0]))]:
        side.applier.apply(Publisher(pod, "tcp://x"), [Message(b"", 0, body, pod, endpoint="tcp://x")])
    assert set(side.applier.silences({"tcp://x"})) == {Publisher("a", "tcp://x")}


@pytest.fixture
def index():
    opened = open_index("memory://?impl=native")
    opened.register(Source("a", 3), model="m")
    return opened


def held(index):
    (status,) = index.sources()
    return status.blocks, status.last_seq


GOOD = [payload(event, rank=3) for event in CHAIN]


@pytest.mark.parametrize("wrap", [bytes, memoryview, bytearray])
def test_all_are_applied_where_all_are_plain(index, wrap):
    payloads = [wrap(body) for body in [*GOOD, payload(rank=3), payload(CHAIN[0], ["BlockRemoved", [4, 1]], rank=3)]]
    assert index.decoder.apply_payloads(Source("a", 3), payloads, 5) == (6, 6, [])
    assert held(index) == (3, 10)


@pytest.mark.parametrize("bad", [b"", payload(rank=3) + b"x", payload(CHAIN[2], rank=2), payload(CHAIN[2], rank=None),
                                 payload(CHAIN[2], 7, rank=3), payload(CHAIN[2], CLEAR, rank=3)])  # fmt: skip
def test_what_is_more_than_events_and_all_after_it_is_left_decoded(index, bad):
    payloads = [*GOOD[:2], bad, GOOD[3], b"\xc1"]
    applied, events, rest = index.decoder.apply_payloads(Source("a", 3), payloads, 0)
    assert (applied, events, held(index)) == (2, 2, (2, 1))
    assert rest == index.decoder.decode_batches(payloads[2:])
    assert index.decoder.apply_payloads(Source("a", 3), payloads[2:], 2) == (0, 0, rest)
    assert held(index) == (2, 1)


def test_no_rank_is_rank_0(index):
    index.register(Source("b"), model="m")
    mixed = [payload(CHAIN[0], rank=None), payload(CHAIN[1], rank=0)]
    assert index.decoder.apply_payloads(Source("b"), mixed, 0)[0] == 2


def test_nothing_is_applied_to_a_source_that_is_not_followed(index):
    applied, events, rest = index.decoder.apply_payloads(Source("b", 3), [*GOOD, b""], 0)
    assert (applied, events, rest) == (0, 0, index.decoder.decode_batches([*GOOD, b""]))
    assert index.stats()["stored_total"] == 0
    assert index.decoder.apply_payloads(Source("a", 3), [], 9) == (0, 0, [])
    assert held(index) == (0, None)


def test_payloads_that_are_no_bytes_are_refused_before_any_is_applied(index):
    for wrong in ("text", 5, None, memoryview(bytes(8))[::2]):
        with pytest.raises((TypeError, BufferError)):
            index.decoder.apply_payloads(Source("a", 3), [GOOD[0], wrong], 0)
    assert held(index) == (0, None)


def test_the_usual_messages_cross_into_the_core_once():
    """What the speed of two workers rests on: nothing is done in Python for each event."""
    side, calls = Side("native", None), []

    class Counting:
        def __init__(self, decoder):
            self._decoder = decoder

        def __getattr__(self, name):
            calls.append(name)
            return getattr(self._decoder, name)

    counting = Counting(side.index.decoder)
    side.applier._index = type(
        "Index", (), {"decoder": counting, "__getattr__": lambda _, name: getattr(side.index, name)}
    )()
    numbers = itertools.count()

    def send(*bodies):
        calls.clear()
        side.applier.apply(Publisher("a", ""), [Message(b"", next(numbers), body, "a") for body in bodies])
        return calls

    assert send(*[payload(event) for event in CHAIN]) == ["decode_batches", "apply_payloads"]
    assert send(*[payload(event) for event in CHAIN]) == ["apply_payloads"]
    assert send(payload(CHAIN[0]), b"", payload(CHAIN[1])) == ["apply_payloads"]
    assert side.index.sources()[0].degraded == GAP
