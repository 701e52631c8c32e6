"""Several builders and scorers on one Redis."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from indexer import IndexUnavailable, InvalidQuestion, Leases, Prompt, RedisIndex, Source
from kvevents import EventPool, discovery
from kvevents.testing import Publisher
from kvevents.testing import stored as stored_on_the_wire
from kvindex.errors import UserError
from kvindex.fleet import Fleet
from kvindex.serve import run_serve
from kvindex.sharing import SharedPods

from .conftest import MODEL, NEEDS_REDIS, removed, stored
from .test_cli import _free_port

pytestmark = NEEDS_REDIS
PODS = [f"pod-{number}" for number in range(7)]


def until(true, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (answer := true()):
        assert time.monotonic() < deadline, "it never came true"
        os.sched_yield()
    return answer


def held(index, tokens):
    return {holding.source.pod: holding.tokens for holding in index.match(Prompt(tokens, MODEL), holders_only=True)}


def test_builders_divide_the_pods_evenly_and_completely(own_server):
    builders = [Leases(own_server.url, ttl_s=30) for _ in range(3)]
    shares: list[list[str]] = [[], [], []]
    for _ in range(4):
        shares = [builder.share(PODS) for builder in builders]
    assert sorted(pod for share in shares for pod in share) == PODS
    assert sorted(map(len, shares)) == [1, 3, 3]
    builders[0].quit(PODS)
    shares = [builder.share(PODS) for builder in builders[1:] for _ in range(2)]
    assert sorted({pod for share in shares for pod in share}) == PODS
    for builder in builders:
        builder.close()


def test_a_builder_that_is_not_heard_of_loses_its_share(own_server):
    gone, other = Leases(own_server.url, ttl_s=0.05), Leases(own_server.url, ttl_s=30)
    assert gone.share(PODS) == PODS
    assert until(lambda: len(share := other.share(PODS)) == 7 and share) == PODS
    assert gone.share(PODS) == []


def test_leases_of_pods_that_are_no_more_go_too(own_server):
    one, other = Leases(own_server.url, ttl_s=30), Leases(own_server.url, ttl_s=0.05)
    assert one.share(PODS[:3]) == PODS[:3]
    assert one.share(PODS[2:5]) == PODS[2:5]
    assert own_server.client.hkeys("kvindex:{leases}pods") == [pod.encode() for pod in PODS[2:5]]
    until(lambda: other.share(["gone"]) == ["gone"])
    until(lambda: one.share(PODS[4:5]) and own_server.client.hkeys("kvindex:{leases}pods") == [PODS[4].encode()])
    one.close()
    other.close()


def found(name, endpoint="tcp://127.0.0.1:1", **more):
    return discovery.Found(name=name, endpoints=(discovery.Endpoint(endpoint, model=MODEL),), **more)


def test_pods_that_come_and_go_are_divided(own_server):
    with contextlib.ExitStack() as stack:
        pools, shares = [], []
        for _ in range(2):
            index = stack.enter_context(contextlib.closing(RedisIndex(own_server.url)))
            pools.append(stack.enter_context(EventPool(index)))
            shares.append(SharedPods(discovery.Subscriptions(pools[-1]), Leases(own_server.url, ttl_s=0.3)))
            shares[-1].start()
            stack.callback(shares[-1].close)

        def followed():
            return [set(pool.connected()) for pool in pools]

        def are_divided(names):
            one, other = followed()
            return one | other == names and not one & other and abs(len(one) - len(other)) <= 1

        names = {f"pod-{number}" for number in range(6)}
        for share in shares:
            share.update({name: found(name) for name in sorted(names)})
        until(lambda: are_divided(names))
        names = names - {"pod-0", "pod-1"} | {"new"}
        for share in shares:
            share.update({name: found(name) for name in sorted(names)})
        until(lambda: are_divided(names))
        assert {status.source.pod for status in pools[0]._index.sources()} == names
        # one that only the first was told of is its own, and the shares of the others stay
        shares[0].update({name: found(name) for name in names} | {"told": found("told", shared=False)})
        assert "told" in pools[0].connected()
        until(lambda: followed()[0] - {"told"} | followed()[1] == names)
        own_server.freeze()
        assert shares[0].update({name: found(name) for name in sorted(names)}) == {}
        own_server.thaw()
        until(lambda: are_divided(names))


def test_what_a_pod_holds_goes_with_it_to_another_builder(own_server):
    with contextlib.ExitStack() as stack:
        publishers = {name: stack.enter_context(Publisher("tcp://127.0.0.1:0")) for name in ("a", "b")}
        wanted = {name: found(name, publisher.endpoint) for name, publisher in publishers.items()}
        pools = []

        def builder():
            pools.append(
                stack.enter_context(EventPool(stack.enter_context(contextlib.closing(RedisIndex(own_server.url)))))
            )
            share = SharedPods(discovery.Subscriptions(pools[-1]), Leases(own_server.url, ttl_s=0.3))
            share.update(wanted)
            share.start()
            stack.callback(share.close)

        builder()
        for publisher in publishers.values():
            publisher.wait_for_subscribers()
            publisher.publish([stored_on_the_wire("vllm-map", [1], None, list(range(4)), 4)])
        reader = stack.enter_context(contextlib.closing(RedisIndex(own_server.url)))
        until(lambda: held(reader, range(4)) == {"a": 4, "b": 4})
        builder()
        until(lambda: sorted(len(pool.connected()) for pool in pools) == [1, 1])
        assert held(reader, range(4)) == {"a": 4, "b": 4}


def test_leases_need_a_redis_that_answers(own_server):
    leases = Leases(own_server.url)
    own_server.kill()
    with pytest.raises(IndexUnavailable):
        leases.share(PODS)
    with pytest.raises(InvalidQuestion, match="host"):
        Leases("redis://")


def test_what_a_builder_says_of_a_source_that_another_took_over_is_refused(own_server):
    slow, heir = RedisIndex(own_server.url), RedisIndex(own_server.url)
    source = Source("a")
    slow.register(source, model=MODEL)
    slow.apply(source, [stored([1, 2], range(8))])
    heir.register(source, model=MODEL)
    heir.apply(source, [removed(2)])
    slow.apply(source, [stored([3], range(8, 12), parent=2), removed(1)])
    slow.apply(source, [stored([4], range(12, 16), parent=3)])
    slow.restart(source)
    slow.degrade(source, "gap")
    slow.expire()
    slow.forget("a")
    assert held(heir, range(16)) == held(slow, range(16)) == {"a": 4}
    assert [status.degraded for status in heir.sources()] == [""]
    heir.apply(source, [stored([5], range(4, 8), parent=1)])
    assert held(slow, range(8)) == {"a": 8}
    while heir.sweep():
        pass
    heir.forget("a")
    while heir.sweep():
        pass
    assert held(heir, range(8)) == {}
    assert not own_server.client.keys("kvindex:b*")


def test_a_released_pod_is_gone_on_with_by_another_builder(own_server):
    one, other = RedisIndex(own_server.url), RedisIndex(own_server.url)
    for rank in (0, 1):
        one.register(Source("a", rank), model=MODEL)
        one.apply_all(Source("a", rank), [[stored([1, 2], range(8))], [stored([2], range(4, 8), parent=1)]], last_seq=7)
    one.release("a")
    assert one.stats()["sources"] == 0
    assert held(one, range(8)) == {"a": 8}
    for rank in (0, 1):
        other.register(Source("a", rank), model=MODEL)
    assert [status.last_seq for status in other.sources()] == [7, 7]
    other.apply(Source("a"), [removed(2)])
    assert held(one, range(8)) == {"a": 8}  # there was another copy
    other.apply(Source("a"), [removed(2)])
    other.apply(Source("a", 1), [removed(2), removed(2)])
    assert held(one, range(8)) == {"a": 4}


def test_a_scorer_needs_an_index_that_is_shared():
    from kvindex.config import Config, HttpConfig, IndexConfig

    with pytest.raises(UserError, match=r"index\.role"):
        run_serve(Config(index=IndexConfig(role="scorer"), http=HttpConfig(port=0)))


@contextlib.contextmanager
def running(*arguments, stderr=subprocess.DEVNULL, **environ):
    plain = {key: value for key, value in os.environ.items() if not key.startswith("KVINDEX_")}
    command = [sys.executable, "-m", "kvindex", *arguments]
    with subprocess.Popen(command, env=plain | environ, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def answer(port, path="/v1/pods", **more):
    with contextlib.suppress(httpx.TransportError):
        return httpx.request("POST" if more else "GET", f"http://127.0.0.1:{port}{path}", json=more or None, timeout=5)
    return None


def pods_at(port):
    said = answer(port)
    return said.json().get("pods", []) if said is not None and said.status_code == 200 else []


def test_pods_of_a_builder_that_was_killed_go_to_the_other_and_scorers_answer_throughout(own_server):
    fleet = ["fleet", "--pods", "4", "--base-port", "0", "--json", "--rate", "50", "--num-blocks", "600"]
    with contextlib.ExitStack() as stack:
        pods = stack.enter_context(running(*fleet))
        shared = {"KVINDEX_INDEX_URL": own_server.url}
        listed = pods.stdout.readline()
        builders = [
            stack.enter_context(
                running("serve", "--role", "builder", "--port", str(_free_port()), KVINDEX_PODS=listed, **shared)
            )
            for _ in range(2)
        ]
        ports = [_free_port(), _free_port()]
        scorers = [stack.enter_context(running("serve", "--role", "scorer", "--port", str(p), **shared)) for p in ports]

        def owners():
            return {value.split()[0] for value in own_server.client.hgetall("kvindex:{leases}pods").values()}

        until(lambda: len(owners()) == 2 and len(pods_at(ports[0])) == 4)
        first = {pod["pod"]: pod["last_seq"] for pod in pods_at(ports[1])}
        builders[0].kill()
        until(lambda: len(owners()) == 1)
        until(lambda: all(pod["last_seq"] > first[pod["pod"]] + 3 for pod in pods_at(ports[1])))
        for port in ports:
            said = answer(port, "/v1/score", model=json.loads(listed)[0]["model"], token_ids=list(range(64)))
            assert said.status_code == 200
        assert [process.poll() for process in [builders[1], *scorers, pods]] == [None] * 4
        own_server.freeze()
        said = until(lambda: answer(ports[0]))
        own_server.thaw()
        assert (said.status_code, said.json()["title"]) == (503, "Service Unavailable")
        until(lambda: len(pods_at(ports[0])) == 4)


def test_both_scorers_say_what_the_pods_of_a_fleet_hold(own_server):
    ports, shared = [_free_port(), _free_port()], {"KVINDEX_INDEX_URL": own_server.url}
    fleet = ["fleet", "--pods", "4", "--base-port", "0", "--rate", "100", "--num-blocks", "600", "--json"]
    fleet += ["--seconds", "3", "--every", "1"]
    for port in ports:
        fleet += ["--check", f"http://127.0.0.1:{port}"]
    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(running("serve", "--role", "scorer", "--port", str(port), **shared))
        until(lambda: all(answer(port, "/healthz") for port in ports))
        pods = stack.enter_context(running(*fleet, stderr=subprocess.PIPE))
        builder = {"KVINDEX_PODS": pods.stdout.readline(), **shared}
        stack.enter_context(running("serve", "--role", "builder", "--port", str(_free_port()), **builder))
        _, said = pods.communicate(timeout=90)
    assert pods.returncode == 0, said
    for port in ports:
        assert said.count(f"http://127.0.0.1:{port}: 50 prompts x 4 pods equal") >= 2, said


def test_the_pods_of_the_compose_file_are_those_of_its_fleet_and_servers():
    services = yaml.safe_load((Path(__file__).parent.parent / "compose.yaml").read_text())["services"]

    def published(service, prefix, port_option):
        options = dict(zip(services[service]["command"], services[service]["command"][1:], strict=False))
        port = int(options[port_option])
        return [
            (
                f"{prefix}-{n:02}",
                f"tcp://{service}:{port + 2 * n}",
                f"tcp://{service}:{port + 2 * n + 1}",
                options["--model"],
            )
            for n in range(int(options["--pods"]))
        ]

    expected = published("fleet", "pod", "--base-port") + published("servers", "sim", "--events-port")
    with Fleet(4) as fleet:
        assert [entry["pod"] for entry in fleet.endpoints()] == [pod for pod, *_ in expected[:4]]
    for builder in ("builder-0", "builder-1"):
        listed = json.loads(services[builder]["environment"]["KVINDEX_PODS"])
        assert [(pod["pod"], pod["endpoint"], pod["replay"], pod["model"]) for pod in listed] == expected
