"""The doctor: the cause of each trouble, judged without sockets, then found over real ones."""

import http.server
import json
import threading

import msgspec
import pytest

from kvevents import Heard, LinkChange, ReplayAnswer
from kvevents.testing import Publisher, cleared, stored
from kvindex.doctor.findings import is_trouble, misspelt_pod, one_of_same_name
from kvindex.doctor.judgement import EngineSeen, Expected, judge
from kvindex.doctor.observation import Observation
from kvindex.doctor.probe import ask_engine, observe

from .conftest import GOLDEN, payload, read_capture
from .doctoring import TOPIC, only, run

LOCAL = "tcp://127.0.0.1:0"
RIGHT = Expected("10.0.0.7:8000", "org/model", 16, "kv@")
ENGINE = EngineSeen("http://pod", True, ["org/model"], True, 16)


def chain(count=3, dialect="vllm-map", size=16):
    """Stores of one block each, each after the one before."""
    return [
        stored(dialect, [n + 1], n or None, range(n * size, (n + 1) * size), size, extra_keys=[None])
        for n in range(count)
    ]


def seen_of(events, *, topic=TOPIC, seqs=None, ts=0.0, arrival=0.0, replay=True, links=("reached", "agreed")):
    """An observation of some events, one in each message."""
    seen = Observation("tcp://10.0.0.7:5557", 5.0)
    for link in links:
        seen.take(LinkChange("e", link, 0.0))
    for seq, event in zip(seqs or range(len(events)), events, strict=True):
        body = event if isinstance(event, bytes) else msgspec.msgpack.encode([ts, [event], 0])
        seen.take(Heard("e", [topic, seq.to_bytes(8, "big"), body], arrival))
    if replay:
        last = max(seqs or range(len(events)), default=None)
        count = 0 if last is None else last + 1
        bodies = [(seq, b"\x93\x01\x90\x00") for seq in range(count)]
        seen.take_replay("tcp://10.0.0.7:5558", ReplayAnswer(bodies, count, 0 if count else None, last, True, True))
    return seen


def troubles(seen, expected=RIGHT, engine=ENGINE):
    return {finding.check: finding for finding in judge(seen, expected, engine) if is_trouble(finding)}


@pytest.mark.parametrize("dialect", ["vllm-map", "vllm-array", "sglang"])
def test_a_healthy_pod_has_nothing(dialect):
    assert troubles(seen_of(chain(dialect=dialect))) == {}
    assert troubles(seen_of([*chain(), cleared("vllm-map")])) == {}


def test_replay_switched_off():
    seen = seen_of(chain(), replay=False)
    assert troubles(seen) == {}  # it could be better, and nothing is wrong
    (said,) = [finding for finding in judge(seen, RIGHT) if finding.check == "replay"]
    assert (said.level, said.what) == ("advice", "no replay endpoint was given")
    seen.take_replay("tcp://x:5558", ReplayAnswer([], 0, None, None, False, False))
    assert "switched off" in only(troubles(seen), "replay").cause
    seen.take_replay("tcp://x:5557", ReplayAnswer([], 0, None, None, False, True))
    assert "wrong port" in only(troubles(seen), "replay").cause
    seen.take_replay("tcp://x:5558", ReplayAnswer([], 1000, 0, 999, False, True))
    assert "not its end" in only(troubles(seen), "replay").what


def test_how_deep_the_replay_is_is_told():
    seen = seen_of(chain())
    seen.take_replay("tcp://x:5558", ReplayAnswer([], 10, 40, 49, True, True))
    (said,) = [finding for finding in judge(seen, RIGHT) if finding.check == "replay"]
    assert (said.level, said.what) == ("advice", "10 messages deep, from 40 to 49")


def test_wrong_port_and_publisher_disabled():
    silent = seen_of([], links=["refused"], replay=False)
    assert "publisher is disabled" in troubles(silent)["connection"].cause
    assert "wrong host or port" in troubles(silent, engine=None)["connection"].cause
    for links in (["reached", "lost"], ["reached", "mismatched", "lost", "refused"]):
        assert "wrong port" in troubles(seen_of([], links=links))["connection"].cause


def test_engine_without_prefix_caching_is_told_from_an_idle_one():
    silent = seen_of([])
    assert (
        "without prefix caching" in only(troubles(silent, engine=ENGINE._replace(prefix_caching=False)), "frames").cause
    )
    idle = only(troubles(silent), "frames")
    assert (idle.level, "prefix caching is on" in idle.cause) == ("warn", True)
    assert "--engine" in only(troubles(silent, engine=None), "frames").remedy
    # who spoke before is idle, and nothing is wrong with that
    silent.take_replay("tcp://x", ReplayAnswer([(0, payload(*chain()))], 1, 0, 0, True, True))
    assert troubles(silent) == {}


def test_wrong_topic_filter():
    found = only(troubles(seen_of(chain()), RIGHT._replace(topic="kv-events")), "topic")
    assert "wrong topic filter" in found.cause
    assert "kv@10.0.0.7:8000@org/model" in found.what


def test_block_size_mismatch():
    found = only(troubles(seen_of(chain()), RIGHT._replace(block_size=32)), "block_size")
    assert "block size mismatch" in found.cause
    engine = ENGINE._replace(block_size=64)
    assert troubles(seen_of(chain()), RIGHT._replace(block_size=None), engine).keys() == {"block_size"}


@pytest.mark.parametrize(
    ("asked", "cause"), [("model", "model alias"), ("other/Model", "model alias"), ("else", "another model")]
)
def test_model_alias(asked, cause):
    assert cause in only(troubles(seen_of(chain()), RIGHT._replace(model=asked)), "model").cause


def test_an_alias_that_the_engine_serves_is_one():
    engine = ENGINE._replace(models=["org/model", "chat"])
    assert "model alias" in only(troubles(seen_of(chain()), RIGHT._replace(model="chat"), engine), "model").cause


def test_ip_for_ip_and_port():
    short = troubles(seen_of(chain()), RIGHT._replace(pod="10.0.0.7"))
    assert "another port or none" in only(short, "pod").cause
    topic = b"kv@10.0.0.7@org/model"
    assert "another port or none" in only(troubles(seen_of(chain(), topic=topic)), "pod").cause
    assert "two names" in only(troubles(seen_of(chain()), RIGHT._replace(pod="vllm-0")), "pod").cause
    assert troubles(seen_of(chain(), topic=b"")).keys() == {"topic"}  # the filter hears no empty topic


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.7", "10.0.0.7:8000", True),
        ("10.0.0.7:8001", "10.0.0.7:8000", True),
        ("10.0.0.8", "10.0.0.7:8000", False),
        ("[fd00::7]:8000", "fd00::7", True),
        ("fd00::7", "fd00::8", False),
        ("vllm-0", "vllm-1", False),
        ("a:b:c", "d:e:f", False),
    ],
)
def test_names_of_pods(one, other, same):
    assert (misspelt_pod(one, {other}) == other) is same


def test_names_of_models():
    assert one_of_same_name("Qwen3-8B", {"a", "Qwen/qwen3-8b"}) == "Qwen/qwen3-8b"
    assert one_of_same_name("Qwen3-8B", {"Qwen/Qwen3-0.6B"}) is None


def test_an_old_array_dialect():
    found = only(troubles(seen_of(chain(dialect="vllm-0.9"))), "dialect")
    assert "old array dialect" in found.what
    said = [
        finding.what for finding in judge(seen_of(chain(dialect="vllm-array")), RIGHT) if finding.check == "dialect"
    ]
    assert "old array dialect" in said[0]


def test_a_newer_unknown_field():
    event = chain(1)[0] | {"quantum_state": 1}
    found = only(troubles(seen_of([event])), "dialect")
    assert ("quantum_state" in found.what, "newer" in found.cause) == (True, True)
    longer = [*chain(1, "vllm-array")[0], "more"]
    assert "item 12 of BlockStored" in only(troubles(seen_of([longer])), "dialect").what


def test_a_pod_that_restarted():
    assert "restarted" in only(troubles(seen_of(chain(4), seqs=[7, 8, 0, 1])), "order").cause
    again = seen_of(chain(), links=["reached", "agreed", "lost", "refused", "reached", "agreed"])
    assert "restarted" in only(troubles(again), "order").cause
    assert [finding.level for finding in judge(again, RIGHT) if finding.check == "order"] == ["warn"]
    # it restarted after its last message was heard, and its replay is short
    behind = seen_of(chain(), seqs=[40, 41, 42])
    behind.take_replay("tcp://x", ReplayAnswer([], 3, 0, 2, True, True))
    assert "restarted" in only(troubles(behind), "order").cause
    # a replay that did not come to its end says nothing of that
    behind.take_replay("tcp://x", ReplayAnswer([], 3, 0, 2, False, True))
    assert troubles(behind).keys() == {"replay"}


def test_gaps_are_counted():
    assert only(troubles(seen_of(chain(), seqs=[0, 1, 5])), "order").what == "3 messages are missing"


def test_what_cannot_be_read_is_counted_and_harms_nobody():
    seen = seen_of([b"", b"\xc1", b"\x93\x01", msgspec.msgpack.encode([0.0, [["Strange", 1], 5], 0]), *chain()])
    seen.take(Heard("e", [b"one frame"], 0.0))
    found = only(troubles(seen), "decoding")
    assert (seen.bad_frames, seen.undecodable.total(), seen.discards.total()) == (1, 3, 2)
    assert found.level in ("bad", "warn")


def test_names_off_the_wire_are_bounded():
    seen = seen_of([chain(1)[0] | {f"field{n}": 0 for n in range(1000)}])
    for number in range(1000):
        seen.take(Heard("e", [b"kv@%d@m" % number, bytes(8), b""], 0.0))
    sizes = [stored("vllm-map", [n], None, range(n), n) for n in range(1, 200)]
    for number, event in enumerate(sizes):
        seen.take(Heard("e", [TOPIC, number.to_bytes(8, "big"), payload(event)], 0.0))
    assert len(seen.unknown_fields) == len(seen.topics) == len(seen.block_sizes) == 64


def test_an_idle_pod_is_known_by_the_topic_of_its_replay():
    with Publisher(LOCAL, replay=LOCAL, topic=TOPIC) as publisher:
        publisher.publish(chain(1))
        (seen,) = observe([publisher.endpoint], [publisher.replay], 0.5)
    assert troubles(seen) == {}
    found = troubles(seen, RIGHT._replace(pod="10.0.0.7", model="model", topic="other"))
    assert found.keys() == {"pod", "model", "topic"}


def test_clocks_and_lag():
    assert "old when they come" in only(troubles(seen_of(chain(), ts=100.0, arrival=103.0)), "lag").what
    assert "clocks" in only(troubles(seen_of(chain(), ts=100.0, arrival=95.0)), "lag").cause


def test_orphans_are_told_only_where_all_is_known():
    orphans = [stored("vllm-map", [n], n + 1000, range(16), 16) for n in range(1, 5)]
    found = troubles(seen_of(orphans))
    assert "4 of 4" in only(found, "orphans").what
    # neither where more was answered than was looked into, nor where more was announced than is remembered
    deep = seen_of(orphans)
    deep.take_replay("tcp://x", ReplayAnswer([], 50_000, 0, 49_999, True, True))
    assert "orphans" not in troubles(deep)
    full = seen_of(orphans)
    full.is_full = True
    assert "orphans" not in troubles(full)
    partial = seen_of(orphans)
    partial.take_replay("tcp://x", ReplayAnswer([], 4, 3, 6, True, True))
    assert "orphans" not in troubles(partial)


def test_hashes_of_the_real_engine_are_made_again():
    path = next(path for path in GOLDEN if path.stem == "hash_sha256_cbor_int")
    bodies = [bytes.fromhex(line["payload"]) for line in read_capture(path) if line["kind"] == "message"]
    expected = Expected(seeds=["42"])
    seen = seen_of(bodies)
    seen.lags.clear()  # it was captured long ago
    (said,) = [finding for finding in judge(seen, expected) if finding.check == "hashes"]
    assert (said.level, "sha256_cbor, seed '42'" in said.what) == ("ok", True)
    (said,) = [finding for finding in judge(seen, Expected(seeds=["1"])) if finding.check == "hashes"]
    assert (said.level, "not known" in said.what) == ("ok", True)
    first = seen.roots[0]
    seen.roots = [msgspec.structs.replace(first, block_size=8, block_hashes=first.block_hashes * 2)]
    assert (
        only({f.check: f for f in judge(seen, expected) if f.level != "ok" and f.check == "hashes"}, "hashes").level
        == "bad"
    )


# ---- over real sockets


def speak(publisher, work, done):
    """Do the work when somebody listens."""
    publisher.wait_for_subscribers(timeout=20.0)
    work(publisher)
    done.set()


def look(work, *, seconds=1.0, replays=True, **options):
    done = threading.Event()
    with Publisher(LOCAL, replay=LOCAL, topic=TOPIC, **options) as publisher:
        thread = threading.Thread(target=speak, args=(publisher, work, done))
        thread.start()
        (seen,) = observe([publisher.endpoint], [publisher.replay] if replays else [], seconds)
        thread.join()
    assert done.is_set()
    return seen


def say(publisher):
    for event in chain():
        publisher.publish([event])


def test_a_healthy_publisher_over_sockets():
    seen = look(say)
    assert (seen.messages, seen.replay.count, seen.orphans) == (3, 3, 0)
    assert troubles(seen) == {}


def test_a_restart_over_sockets():
    def restart(publisher):
        say(publisher)
        publisher.restart()
        publisher.wait_for_subscribers()
        say(publisher)

    assert "restarted" in only(troubles(look(restart, seconds=2.0)), "order").cause


def test_wrong_ports_over_sockets():
    with Publisher(LOCAL, replay=LOCAL) as publisher:
        with Publisher(LOCAL) as gone:
            free = gone.endpoint
        swapped, nobody = observe([publisher.replay, free], [free], 0.8)
    assert "wrong port" in troubles(swapped)["connection"].cause
    assert "switched off" in troubles(swapped)["replay"].cause
    assert "publisher is disabled" in troubles(nobody)["connection"].cause


@pytest.fixture
def engine():
    """An engine's HTTP, without prefix caching."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = {
                "/v1/models": b'{"object": "list", "data": [{"id": "org/model"}, {"id": "chat"}]}',
                "/metrics": b'# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{block_size="16",'
                b'enable_prefix_caching="False",engine="0"} 1.0\n',
            }.get(self.path, b"")
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_engine_is_asked(engine):
    assert ask_engine(engine)[1:] == (True, ["org/model", "chat"], False, 16)
    assert ask_engine("http://127.0.0.1:1")[1:] == (False, [], None, None)
    assert ask_engine("nonsense").is_reached is False


def test_the_command_names_the_cause_and_its_status_says_so(engine):
    with Publisher(LOCAL, topic=TOPIC) as publisher:
        answer = run(publisher.endpoint, "--engine", engine, "--seconds", "1")
        assert answer.returncode == 1
        assert "cause: the engine runs without prefix caching" in answer.stdout
        assert "do: start it with --enable-prefix-caching" in answer.stdout
        as_json = json.loads(run(publisher.endpoint, "--seconds", "0.5", "--json").stdout)
        assert [finding["check"] for finding in as_json[0]["findings"]] == ["frames", "replay"]
        publisher.publish(chain(1))
        twice = run(publisher.endpoint, publisher.endpoint)
        assert (twice.returncode, "is named twice" in twice.stderr) == (2, True)
    assert run().returncode == 2
    assert run("nonsense").returncode == 2
    assert "a port from 1 to 65535" in run("tcp://127.0.0.1:70000").stderr


def test_a_missing_replay_alone_is_no_failure():
    with Publisher(LOCAL, topic=TOPIC) as publisher:
        thread = threading.Thread(target=speak, args=(publisher, say, threading.Event()))
        thread.start()
        answer = run(publisher.endpoint, "--seconds", "1")
        thread.join()
    assert "advice  replay: no replay endpoint was given" in answer.stdout
    assert answer.returncode == 0
    assert "listening for 1 s" in answer.stderr
