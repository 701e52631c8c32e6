"""The decoder in Rust says of every payload what the one in Python says.

``KVINDEX_FUZZ`` sets how many mutated payloads are tried, ``KVINDEX_FUZZ_SEED`` with which seed.
"""

import itertools
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings

from indexer import open_index
from kvevents import DecodeError, decode_batches
from kvevents.wire import MAX_BLOCK_SIZE, MAX_EVENTS, MAX_HASHES, MAX_RANK, MAX_TOKENS

from .conftest import GOLDEN, IMPLEMENTATIONS, POD, payload, read_capture
from .drawn_payloads import a_payload
from .mutations import Mutator
from .payloads import DEEP, DEEPEST, EVENTS, ODD, RAW, RFC, STORED, Pairs, Raw, golden_payloads, made_payloads, pack

pytestmark = list(IMPLEMENTATIONS[1].marks)

MUTATIONS = int(os.environ.get("KVINDEX_FUZZ", "50000"))
SEED = int(os.environ.get("KVINDEX_FUZZ_SEED", "1"))
CRATE = Path(__file__).parents[1] / "native" / "Cargo.toml"


def open_native():
    index = open_index("memory://?impl=native")
    index.register(POD, model="m")
    return index


def agree(payloads) -> list:
    """What both decoders make of the payloads; it must be the same."""
    ours = decode_batches(payloads)
    theirs = decode_batches(payloads, open_native())
    assert len(theirs) == len(payloads)
    for body, batch, other in zip(payloads, ours, theirs, strict=True):
        difference = compare(batch, other)
        assert not difference, f"{difference}: {bytes(body[:4000]).hex()}"
    return ours


def compare(batch, other) -> str:
    """Where the two differ, "" if nowhere."""
    if isinstance(batch, DecodeError) or isinstance(other, DecodeError):
        if type(batch) is not type(other) or batch.reason != other.reason:
            return f"{batch!r} against {other!r}"
        # each names its own what is wrong with msgpack; elsewhere the one in Python adds what it got
        return "" if batch.reason == "bad_msgpack" or str(batch).startswith(str(other)) else f"{batch} against {other}"
    for name in ("clears", "model", "rank"):
        if getattr(batch, name) != getattr(other, name):
            return f"{name} {getattr(batch, name)!r} against {getattr(other, name)!r}"
    if repr(batch.ts) != repr(other.ts):
        return f"ts {batch.ts!r} against {other.ts!r}"
    if list(batch.discards.items()) != list(other.discards.items()):
        return f"discards {batch.discards} against {other.discards}"
    if len(batch.events) != len(other) or other != type(other)(batch.events):
        return f"events other than {batch.events!r:.4000}"
    return ""


def told(index):
    """What an index says of itself. How many bytes it takes depends on where its tables happen to lie."""
    return index.sources(), {**index.stats(), "bytes": 0}


def test_captures_and_made_payloads():
    for batch in agree(golden_payloads() + made_payloads()):
        assert not isinstance(batch, DecodeError)
        assert not batch.discards


def test_every_odd_value_in_every_place():
    payloads = []
    for odd in ODD + DEEPEST:
        payloads += [pack(odd), pack([odd, []]), pack([1, odd]), pack([1, [], odd]), pack([1, [odd], 0, odd])]
        payloads += [
            pack({"ts": odd, "events": []}),
            pack({"ts": 1, "events": odd}),
            pack({"ts": 1, "events": [], "x": odd}),
        ]
        payloads.append(pack({"ts": 1, "events": [], "data_parallel_rank": odd}))
        payloads.append(pack(Pairs([("ts", 1), ("events", []), (odd, 1)])))
        payloads += [
            pack([1, [pack(odd)]]),
            pack([1, [["BlockRemoved", [odd]]]]),
            pack([1, [Pairs([(odd, 1)])]]),
        ]
        for event in EVENTS:
            for place in range(len(event)) if isinstance(event, list) else event:
                other = event.copy()
                other[place] = odd
                payloads.append(pack([1, [other]]))
        for name in ("block_hashes", "seq_hashes", "token_ids", "extra_keys"):
            for event in (STORED, RFC):
                payloads += [pack([1, [{**event, name: [item, odd]}]]) for item in (1, [1, 2], odd, None, ["S"])]
        payloads += [
            pack([1, [{**STORED, "extra_keys": keys, "parent_block_hash": parent, "lora_name": lora}]])
            for keys in (
                [[odd], None],
                [None, [odd]],
                [["ad", odd], ["ad"]],
                [[["img", odd]], None],
                [[[odd, 1]], None],
            )
            for parent in (None, 1)
            for lora in ("ad", None)
        ]
    for start in range(0, len(payloads), 1000):
        agree(payloads[start : start + 1000])


def test_names_that_are_there_twice_or_in_part():
    values = {
        "type": [None, "BlockStored", "Never"],
        "event_type": [None, "removed", 5],
        "block_hashes": [None, [1], 5],
        "seq_hashes": [None, [2], "x"],
        "parent_block_hash": [None, 3, "x"],
        "parent_hash": [None, 4, "x"],
        "base_block_idx": [None, 0, 5, -1, True, 2.0, "x"],
        "cache_salt": [None, "", "a", 5],
        "additional_salt": [None, "b", 5],
    }
    random = Random(SEED)
    payloads = []
    for _ in range(3000):
        names = random.choices(list(values), k=random.randrange(1, 10))
        event = Pairs((name, random.choice(values[name])) for name in names)
        event += random.sample([("token_ids", [1, 2]), ("block_size", 2), ("lora_id", 2), ("lora_name", "")], 3)
        payloads.append(pack([1, [event]]))
    parts = [("ts", 1), ("ts", "x"), ("events", []), ("events", [None]), ("events", 1), ("data_parallel_rank", 1)]
    payloads += [pack(Pairs(some)) for some in itertools.permutations([*parts, ("data_parallel_rank", "x")], 4)]
    agree(payloads)


def test_limits():
    def many(count, item=b"\x01"):
        return Raw(b"\xdd" + count.to_bytes(4) + item * count)

    agree([
        pack([1, many(MAX_EVENTS)]),
        pack([1, many(MAX_EVENTS + 1)]),
        pack([1, many(MAX_EVENTS + 1), MAX_RANK + 1]),
        pack([1, [["BlockRemoved", many(MAX_HASHES)], ["BlockRemoved", many(MAX_HASHES + 1)]]]),
        pack([1, [["BlockStored", [1], None, many(MAX_TOKENS + 1), MAX_BLOCK_SIZE]]]),
        pack([1, [["BlockStored", [1], None, many(MAX_TOKENS), MAX_BLOCK_SIZE]]]),
    ])  # fmt: skip


def test_lists_of_token_ids_in_any_form():
    random = Random(SEED)
    payloads = []
    for number in range(1500):
        length = random.randrange(2000) if number % 10 == 0 else random.randrange(30)
        bits = random.randrange(33)
        tokens = [random.getrandbits(random.randrange(bits + 1)) for _ in range(length)]
        if tokens and random.randrange(4) == 0:
            tokens[random.randrange(length)] = random.choice([True, -1, 2**32, None, 1.0, "x", [1, 2], DEEP[2], RAW[0]])
        body = Raw(pack(tokens, random if random.randrange(2) else None))
        payloads.append(pack([1, [["BlockStored", [1], None, body, random.choice([1, 16, 65536])]]]))
    agree(payloads)


def test_mutated_payloads():
    mutator = Mutator(SEED)
    seen = set()
    whole = events = 0
    for _ in range(0, MUTATIONS, 1000):
        for batch in agree([mutator.payload() for _ in range(1000)]):
            if isinstance(batch, DecodeError):
                seen.add(batch.reason)
            else:
                whole += 1
                events += len(batch.events)
                seen.update(batch.discards)
    assert whole > MUTATIONS * 0.4
    assert events > MUTATIONS
    if MUTATIONS >= 20_000:
        assert seen == {
            "bad_batch", "bad_block_size", "bad_event", "bad_extra_keys", "bad_group", "bad_hash", "bad_hashes",
            "bad_lora", "bad_msgpack", "bad_rank", "bad_text", "bad_tokens", "bad_window", "too_few_tokens",
            "unknown_event",
        }  # fmt: skip


@settings(
    max_examples=max(250, MUTATIONS // 200),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(a_payload())
def test_batches_of_any_dialect(body):
    agree([body])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_an_index_takes_both_for_the_same(path):
    payloads = [bytes.fromhex(line["payload"]) for line in read_capture(path) if line["kind"] == "message"]
    one, other = open_native(), open_native()
    for ours, theirs in zip(decode_batches(payloads), decode_batches(payloads, one), strict=True):
        one.apply(POD, theirs.events)
        other.apply(POD, ours.events)
    assert told(one) == told(other)
    assert one.stats()["held"]


def test_payloads_of_any_kind_of_buffer():
    body = payload(*EVENTS)
    around = memoryview(b"\xcf" * 9 + body + b"\xc0" * 600)
    agree([body, bytearray(body), memoryview(body), around[9 : 9 + len(body)]])
    with pytest.raises(BufferError):
        decode_batches([around[::2]], open_native())


PANIC = """
from indexer import Source, open_index
from indexer import _native
from kvevents import decode_batches
prompt = _native.Prompt([1, 2, 3], "m")
try:
    _native.block_keys(prompt, 0)  # its caller checks this, so here it panics, with the interpreter lock released
except BaseException as error:
    print(type(error).__name__, error)
index = open_index("memory://?impl=native")
index.register(Source("pod"), model="m")
print(len(prompt.keys(1, 3)), len(index.sources()), decode_batches([b"\\xc1"], index))
"""


def test_a_panic_is_an_exception_and_all_goes_on():
    done = subprocess.run([sys.executable, "-c", PANIC], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "PanicException attempt to divide by zero"
    assert second.startswith("3 1 [DecodeError(")
    assert "panicked at" in done.stderr


def test_panics_unwind_in_every_profile():
    # an abort would end the process; pyo3 makes an exception only of what unwinds
    profiles = tomllib.loads(CRATE.read_text())["profile"]
    assert "release" in profiles
    assert {profile.get("panic", "unwind") for profile in profiles.values()} == {"unwind"}
