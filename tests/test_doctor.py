"""The doctor: the cause of each trouble, judged without sockets, then found over real ones."""

import http.server
import json
import subprocess
import sys
import threading

import httpx
import msgspec
import pytest
import structlog
from litestar.testing import TestClient

from indexer import open_index
from kvevents import EventPool, Heard, LinkChange, Message, ReplayAnswer
from kvevents.testing import Publisher, cleared, stored
from kvindex.checks import Checks
from kvindex.doctor.findings import is_trouble, misspelt_pod, one_of_same_name
from kvindex.doctor.fleet import CHECKS, judge_service
from kvindex.doctor.judgement import EngineSeen, Expected, judge
from kvindex.doctor.observation import Observation
from kvindex.doctor.probe import ask_engine, observe
from kvindex.http import create_app
from kvindex.stats import PodStatus, Stats
from scorer import PrefixScorer

from .conftest import GOLDEN, payload, read_capture

LOCAL = "tcp://127.0.0.1:0"
TOPIC = b"kv@10.0.0.7:8000@org/model"
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


def only(found, check):
    assert set(found) == {check}, found
    assert found[check].remedy
    return found[check]


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


def run(*arguments):
    command = [sys.executable, "-m", "kvindex", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


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


# ---- a service


def pod_stats(**more):
    default = {
        "pod": "10.0.0.7:8000",
        "rank": 0,
        "model": "org/model",
        "blocks": 3,
        "tiers": {"gpu": 3},
        "block_sizes": [16],
        "trust": "exact",
        "reason": "",
        "connected": True,
        "last_seq": 2,
        "messages": 3,
        "gaps": 0,
        "lag_s": 0.0,
        "silent_s": 0.0,
        "live_s": 0.0,
    }
    return PodStatus(**default | more)


def service_troubles(*, before=None, pods=None, models=(), asked=(), block_size=None, configured=None, **more):
    more["block_size"] = configured
    now = Stats(1.0, more.pop("index", {}), more.pop("pool", {}), [pod_stats()] if pods is None else pods, **more)
    found = judge_service(now, before, models=models, pods=asked, block_size=block_size)
    assert {finding.check for finding in found} <= set(CHECKS)
    return {finding.check: finding for finding in found if is_trouble(finding)}


def test_troubles_of_a_service():
    assert service_troubles(models=["org/model"], asked=["10.0.0.7:8000"], block_size=16) == {}
    assert "model alias" in only(service_troubles(asked_models=["model"]), "model").cause
    assert "another port or none" in only(service_troubles(asked_pods=["10.0.0.7"]), "pod").cause
    assert "mismatch" in only(service_troubles(block_size=64), "block_size").cause
    assert "b" in only(service_troubles(not_connected=["b"]), "connected").what
    assert service_troubles(without_replay=["b"]) == {}
    assert only(service_troubles(pods=[]), "pods").level == "warn"
    assert "gap" in only(service_troubles(pods=[pod_stats(trust="degraded", reason="gap: lost")]), "trust").what
    assert only(service_troubles(pods=[pod_stats(lag_s=-4.0)]), "lag").level == "warn"
    for reason, level, cause in (
        ("bad_msgpack", "bad", "cannot be read"),
        ("queue_full", "warn", "kept up with"),
        ("event_unknown_event", "warn", "left out"),
    ):
        found = only(service_troubles(pool={f"dropped_{reason}_total": 2}), "decoding")
        assert (found.level, cause in found.cause) == (level, True)
    assert only(service_troubles(index={"parked_total": 20, "stored_total": 100}), "orphans").level == "warn"
    assert (
        only(service_troubles(pods=[pod_stats(model="")]), "model").remedy == "set `model` of the pods, or pool.model"
    )
    assert "mismatch" in only(service_troubles(configured=64), "block_size").cause
    assert "'kv@x'" in only(service_troubles(unheard={"10.0.0.7:8000": "kv@x"}), "topic").what


def test_a_replay_that_is_not_answered_is_told_from_a_pod_that_is_gone():
    unsure = [pod_stats(pod="a", trust="degraded", reason="unsure: messages may be missing")]
    assert service_troubles(pods=unsure, followed=["a"])["replay"].level == "bad"
    assert "replay" not in service_troubles(pods=unsure, followed=["a"], not_connected=["a"])
    assert "replay" not in service_troubles(pods=unsure, followed=["a"], without_replay=["a"])
    assert "replay" not in service_troubles(pods=unsure)  # somebody else follows it
    # it is asked again now and then, and is not well for that
    asked = [msgspec.structs.replace(unsure[0], reason="behind: messages were asked for again")]
    assert service_troubles(pods=asked, before=Stats(0.0, {}, {}, unsure), followed=["a"]).keys() == {"replay", "trust"}


def test_what_a_healthy_fleet_does_is_no_trouble():
    # an idle pod whose last message was asked for again, or is long ago
    assert service_troubles(pods=[pod_stats(lag_s=3600.0, live_s=None)]) == {}
    assert service_troubles(pods=[pod_stats(lag_s=3600.0, live_s=60.0)]) == {}
    # one that said nothing yet, and is asked for
    assert service_troubles(followed=["new"], asked_pods=["new"]) == {}
    quiet = pod_stats(pod="quiet", trust="degraded", reason="no events yet: nothing was received from this source")
    assert service_troubles(pods=[quiet], without_replay=["quiet"]) == {}
    # a loss that is being repaired, unless it stays so
    behind = [pod_stats(trust="degraded", reason="behind: messages were asked for again")]
    assert service_troubles(pods=behind) == {}
    assert "again and again" in only(service_troubles(pods=behind, before=Stats(0.0, {}, {}, behind)), "trust").cause
    # a few blocks without a parent
    assert service_troubles(index={"parked_total": 10, "stored_total": 20}) == {}


def test_a_service_is_looked_at_with_the_names_its_pods_really_have(service):
    checks, client = service
    client.put("/v1/pods/known", json={"endpoint": "tcp://127.0.0.1:1", "address": "10.9.9.9:8000"})
    client.post("/v1/score", json={"model": "org/model", "token_ids": [1], "pods": ["10.9.9.9:8000", "known"]})
    assert checks.asked.names()[1] == ["known"]
    assert "pod" not in {finding.check for finding in checks.look()}


def test_a_look_that_fails_is_not_the_last(service, monkeypatch):
    checks, _ = service
    looks = []

    def fail():
        looks.append(1)
        if len(looks) == 3:
            checks._stop.set()
        raise RuntimeError("a defect")

    monkeypatch.setattr(checks, "look", fail)
    monkeypatch.setattr("kvindex.checks.EVERY_S", 0.01)
    checks.start()
    checks._thread.join(20.0)
    assert len(looks) == 3


def test_only_what_is_new_counts():
    before = Stats(0.0, {"parked_total": 10, "stored_total": 50}, {"dropped_bad_msgpack_total": 2}, [])
    now = {"parked_total": 10, "stored_total": 100}
    assert service_troubles(before=before, index=now, pool={"dropped_bad_msgpack_total": 2}) == {}


@pytest.fixture
def service():
    index = open_index()
    with EventPool(index) as pool:
        pool.submit(Message(TOPIC, 0, payload(["BlockStored", [1], None, list(range(16)), 16, None], ["Strange"])))
        pool.drain()
        checks = Checks(index, pool)
        app = create_app(PrefixScorer(index), index, pool, max_tokens=100, max_body_bytes=4096, checks=checks)
        with TestClient(app) as client:
            yield checks, client


def test_a_service_says_all_it_knows(service):
    _, client = service
    client.post("/v1/score", json={"model": "alias", "token_ids": [1], "pods": ["x"]})
    stats = msgspec.json.decode(client.get("/v1/stats").content, type=Stats)
    (pod,) = stats.pods
    assert (pod.pod, pod.model, pod.blocks, pod.last_seq, pod.messages) == ("10.0.0.7:8000", "org/model", 1, 0, 1)
    assert pod.silent_s >= 0.0
    assert pod.lag_s > 1e9  # the payload says it was made at 1.0
    assert 0.0 <= pod.live_s < 60.0
    assert (stats.asked_models, stats.asked_pods) == (["alias"], ["x"])
    assert stats.pool["applied_total"] == 1


def test_a_change_is_logged_once_and_is_a_metric(service):
    checks, client = service
    metric = 'kvindex_check{check="model"} '

    def value():
        text = client.get("/metrics").text
        return float(text.partition(metric)[2].partition("\n")[0])

    with structlog.testing.capture_logs() as logs:
        checks._log = structlog.get_logger("kvindex")
        checks.look()
        assert value() == 0.0
        client.post("/v1/score", json={"model": "alias", "token_ids": [1]})
        checks.look()
        checks.look()
        assert value() == 1.0
        checks.asked.forget()
        checks.look()
        assert value() == 0.0
    said = [(line["event"], line["check"]) for line in logs if line.get("check") == "model"]
    assert said == [("check", "model"), ("check_ok", "model")]
    decoding = [line["event"] for line in logs if line.get("check") == "decoding"]
    assert decoding == ["check", "check_ok"]  # it was dropped once, and no more since


def test_the_command_looks_at_a_service(tmp_path):
    command = [sys.executable, "-m", "kvindex", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        url = next(json.loads(line)["url"] for line in process.stderr if '"serving"' in line)
        answer = run("--url", url)
        httpx.post(f"{url}/v1/score", json={"model": "m", "token_ids": [1]})
        process.terminate()
        process.stderr.read()
    assert answer.returncode == 1
    assert "no pod has said anything" in answer.stdout
    assert run("--url", url).returncode == 2
