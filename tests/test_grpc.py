"""The gRPC services over real sockets.

The client writes and reads its bytes by hand, by the published field numbers: nothing of it comes from our own
description of the messages.
"""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from array import array
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_tools import protoc
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from indexer import IndexUnavailable, Source, open_index
from kvevents import EventPool, Message, discovery
from kvindex.answers import AnswerMetrics
from kvindex.config import GrpcConfig
from kvindex.errors import UserError
from kvindex.fleet import Fleet
from kvindex.rpc import serve_grpc
from kvindex.rpc.calls import Calls
from kvindex.rpc.schema import SCHEMA, TOKENIZATION
from kvindex.rpc.server import RpcServer, open_schema
from kvindex.stats import Asked
from scorer import InvalidRequest, PrefixScorer, Prompts, Tokenizers, Unavailable

from .conftest import payload, until
from .models import make_folder

ROOT = Path(__file__).parents[1]
MODEL = "org/m"
LLMD = "/indexer.v1.IndexerService/GetPodScores"
OURS = "/kvindex.v1.ScorerService/Score"
HEALTH = "/grpc.health.v1.Health/"
ADDRESS = "10.0.0.7:8000"
SHARED = "10.0.0.8:8000"


# ---- protobuf's wire format by hand


def varint(number):
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number, value):
    """One field: text and bytes with their length, numbers as varints, lists packed."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, list):
        value = b"".join(map(varint, value))
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def fields(data):
    """Every field of a message as (number, value); eight fixed bytes are a double."""
    found, at = [], 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = number()
        if tag & 7 == 0:
            found.append((tag >> 3, number()))
        elif tag & 7 == 1:
            found.append((tag >> 3, struct.unpack("<d", data[at : at + 8])[0]))
            at += 8
        else:
            assert tag & 7 == 2
            length = number()
            found.append((tag >> 3, data[at : at + length]))
            at += length
    return found


def llmd_request(prompt, model=MODEL, pods=()):
    """GetPodScoresRequest: prompt=1, model_name=2, pod_identifiers=3."""
    parts = [field(1, prompt)] if prompt else []
    return b"".join([*parts, *([field(2, model)] if model else []), *(field(3, pod) for pod in pods)])


def llmd_scores(data):
    """GetPodScoresResponse: scores=1; PodScore: pod=1, score=2."""
    scores = []
    for number, value in fields(data):
        assert number == 1
        one = dict(fields(value))
        assert one.keys() <= {1, 2}
        scores.append((one[1].decode(), one.get(2, 0.0)))
    return scores


# ---- a service


def make_tokenizers(folder):
    """Words are token ids already."""
    vocabulary = {str(number): number for number in range(1_000)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="999"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    make_folder(folder / MODEL, tokenizer)
    return Tokenizers([folder], loras={"adapter": MODEL})


class Service:
    def __init__(self, folder=None, **limits):
        self.index = open_index()
        self.pool = EventPool(self.index)
        self.prompts = Prompts(make_tokenizers(folder) if folder else None)
        self.scorer = PrefixScorer(self.index, prompts=self.prompts)
        self.answers = AnswerMetrics()
        self.asked = Asked()
        addresses = {"pod-a": (ADDRESS, SHARED), "pod-b": (SHARED,)}
        pods = [discovery.Found(name=name, endpoints=(), aliases=names) for name, names in addresses.items()]
        self.followed = discovery.Follower(None, fixed=pods)
        self.followed.start()
        self.schema = open_schema()
        calls = Calls(
            self.schema,
            self.scorer,
            self.followed,
            self.asked,
            self.answers,
            max_tokens=limits.pop("max_tokens", 1_000),
        )
        options = {"host": "127.0.0.1", "port": 0, "max_message_bytes": 64 * 1024, "max_connections": 64} | limits
        self.server = RpcServer(calls, self.schema, **options)

    def __enter__(self):
        self.pool.start()
        for pod, blocks in (("pod-a", 3), ("pod-b", 1)):
            event = ["BlockStored", list(range(1, blocks + 1)), None, list(range(16 * blocks)), 16, None]
            self.pool.submit(Message(f"kv@{pod}@{MODEL}".encode(), 0, payload(event)))
        self.pool.drain()
        self.port = self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        return self

    def __exit__(self, *_):
        self.channel.close()
        self.server.close()
        self.server.close()
        self.pool.close()
        self.prompts.close()

    def call(self, method, data, timeout=20):
        return self.channel.unary_unary(method)(data, timeout=timeout)

    def refusal(self, method, data):
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, data)
        return caught.value.code(), caught.value.details()

    def metrics(self):
        registry = CollectorRegistry()
        registry.register(self.answers)
        return generate_latest(registry).decode()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Service(tmp_path_factory.mktemp("tokenizers")) as running:
        yield running


def words(count):
    return " ".join(map(str, range(count)))


# ---- llm-d's question


def test_a_client_made_from_llm_ds_field_numbers_gets_right_answers(service):
    ask = lambda *args, **kwargs: llmd_scores(service.call(LLMD, llmd_request(*args, **kwargs)))  # noqa: E731
    assert ask(words(50)) == [("pod-a", 3.0), ("pod-b", 1.0)]
    assert ask(words(20)) == [("pod-a", 1.0), ("pod-b", 1.0)]
    assert ask(words(50), pods=["pod-b"]) == [("pod-b", 1.0)]
    assert ask(words(15)) == []
    assert ask("") == []
    assert ask(words(50), pods=["never"]) == []


def test_pods_are_called_what_the_client_calls_them(service):
    ask = lambda pods: llmd_scores(service.call(LLMD, llmd_request(words(50), pods=pods)))  # noqa: E731
    assert ask([ADDRESS]) == [(ADDRESS, 3.0)]
    assert ask([ADDRESS, "pod-b"]) == [(ADDRESS, 3.0), ("pod-b", 1.0)]
    assert ask([f"http://{ADDRESS}/", "pod-a"]) == [(f"http://{ADDRESS}/", 3.0), ("pod-a", 3.0)]
    assert ask([SHARED]) == [(SHARED, 3.0)]  # that of two pods: the best of them


def test_what_llm_ds_question_is_refused_for(service):
    code = grpc.StatusCode
    assert service.refusal(LLMD, llmd_request("1", model=""))[0] == code.INVALID_ARGUMENT
    assert "model_name" in service.refusal(LLMD, llmd_request("1", model=""))[1]
    status, said = service.refusal(LLMD, llmd_request("1", model="no/tokenizer"))
    assert status == code.FAILED_PRECONDITION
    assert "no/tokenizer/tokenizer.json" in said
    status, said = service.refusal(LLMD, llmd_request(words(999) + " 1" * 10))
    assert (status, said) == (code.INVALID_ARGUMENT, "prompt: 1009 tokens, at most 1000 are answered")
    status, said = service.refusal(LLMD, llmd_request("1", pods=["p"] * 16_385))
    assert (status, said.partition(":")[0]) == (code.INVALID_ARGUMENT, "pod_identifiers")


def test_without_tokenizers_text_is_refused_and_tokens_are_answered():
    with Service() as service:
        status, said = service.refusal(LLMD, llmd_request("1"))
        assert status == grpc.StatusCode.FAILED_PRECONDITION
        assert "tokenizer" in said
        assert dict(fields(service.call(OURS, field(1, MODEL) + field(2, [*range(16)]))))[5] == b"pod-a"


# ---- our own question


def ours(**more):
    """ScoreRequest by its numbers."""
    asked = {"model": MODEL, "token_ids": list(range(50))} | more
    numbers = {"model": 1, "token_ids": 2, "token_buffer": 3, "pods": 4, "lora_name": 5, "cache_salt": 6, "mm_items": 7,
               "holders_only": 8}  # fmt: skip
    data = b""
    for name, value in asked.items():
        repeated = name in ("pods", "mm_items")
        for one in value if repeated else [value]:
            data += b"" if one is None else field(numbers[name], one)
    return data


def test_our_answer_says_all(service):
    answer = fields(service.call(OURS, ours()))
    scores = [dict(fields(value)) for number, value in answer if number == 1]
    assert {one[1]: one[2] for one in scores} == {b"pod-a": 3.0, b"pod-b": 1.0}
    rest = {number: value for number, value in answer if number > 2}
    assert rest == {3: 16, 4: 50, 5: b"pod-a"}
    first, second = (fields(value) for number, value in answer if number == 2)
    tiers = dict(fields(dict(first)[7]))
    assert (tiers[1], tiers[2]) == (b"gpu", 3)
    plain = {number: value for number, value in first if number != 7}
    # blocks, tokens, reusable; trust: 1 exact, 2 degraded. A pod that was heard from its first message on is exact
    assert plain == {1: b"pod-a", 3: 3, 4: 48, 5: 48, 6: 3.0, 8: 1}
    assert dict(second)[1] == b"pod-b"


def test_our_answer_is_the_scorers(service):
    kind = service.schema.methods["Score"].response
    service.index.degrade(Source("pod-b"), "gap: messages were lost")
    service.scorer.routed("pod-b", list(range(60)), model=MODEL)
    try:
        for question in (
            {},
            {"token_ids": list(range(33))},
            {"token_ids": [7] * 40},
            {"pods": ["pod-b"]},
            {"pods": [ADDRESS]},
            {"cache_salt": "x"},
            {"lora_name": "x"},
            {"lora_name": "", "cache_salt": ""},
            {"mm_items": [field(1, "image") + field(2, 20) + field(3, 4)]},
            {"model": "never"},
            {"holders_only": True},
            {"token_ids": list(range(33, 66)), "holders_only": True},
        ):
            answer = kind.FromString(service.call(OURS, ours(**question)))
            asked = {"token_ids": list(range(50)), "model": MODEL} | question
            asked["pods"] = service.followed.resolve(asked["pods"]) if "pods" in asked else None
            if "mm_items" in asked:
                asked["mm_items"] = [("image", 20, 4)]
            asked["lora_name"] = asked.get("lora_name") or None
            tokens = asked.pop("token_ids")
            matches = service.scorer.match(tokens, **asked)
            assert [
                (m.pod, m.rank, m.blocks, m.tokens, m.reusable_tokens, m.score, dict(m.tiers), m.reason)
                for m in answer.matches
            ] == [(m.pod, m.rank, m.blocks, m.tokens, m.reusable_tokens, m.score, m.tiers, m.reason) for m in matches]
            assert [m.speculative_blocks for m in answer.matches] == [m.speculative_blocks for m in matches]
            assert [m.speculative_tokens for m in answer.matches] == [m.speculative_tokens for m in matches]
            assert [m.trust == 1 for m in answer.matches] == [m.trust == "exact" for m in matches]
            asked.pop("holders_only", None)
            scores = service.scorer.score(tokens, **asked)
            assert dict(answer.scores) == scores
            assert answer.HasField("best") == bool(scores)
            assert answer.best == next(iter(scores), "")
    finally:
        service.index.degrade(Source("pod-b"), "")
        service.scorer.observe("pod-b", list(range(60)), model=MODEL, cached_tokens=16)


def test_tokens_as_a_buffer_are_the_same_tokens(service):
    tokens = [*range(50)]
    as_buffer = ours(token_ids=None, token_buffer=array("I", tokens).tobytes())
    unpacked = b"".join([field(1, MODEL), *(field(2, token) for token in tokens)])
    # the entries of a map come in any order
    expected = sorted(fields(service.call(OURS, ours())), key=repr)
    assert sorted(fields(service.call(OURS, as_buffer)), key=repr) == expected
    assert sorted(fields(service.call(OURS, unpacked)), key=repr) == expected


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ({"model": ""}, "model"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": None}, "token_ids"),
        ({"token_ids": [1] * 1_001}, "token_ids"),
        ({"token_buffer": b"1234"}, "token_buffer"),
        ({"token_ids": None, "token_buffer": b"12345"}, "token_buffer"),
        ({"token_ids": None, "token_buffer": bytes(4_004)}, "token_ids"),
        ({"pods": ["p"] * 16_385}, "pods"),
        ({"mm_items": [b""] * 1_025}, "mm_items"),
    ],
)
def test_a_bad_question_is_refused_by_the_fields_name(service, question, names):
    status, said = service.refusal(OURS, ours(**question))
    assert status == grpc.StatusCode.INVALID_ARGUMENT
    assert said.startswith(f"{names}: ")


# ---- hostile bytes


@pytest.mark.parametrize("method", [LLMD, OURS])
def test_bytes_that_are_no_question_are_refused(service, method):
    for data in (
        b"\xff",
        b"\x0a\x05ab",
        field(1, b"\xff\xfe") + field(2, "m"),
        field(2, b"\xff\xfe"),
        b"\x0b" * 50_000,
        varint(1 << 3 | 2) + varint(2**63),
    ):
        status, said = service.refusal(method, data)
        assert status == grpc.StatusCode.INVALID_ARGUMENT, data[:20]
        assert "Traceback" not in said


def test_an_adapter_is_asked_for_by_its_name(service):
    tokens = list(range(32))
    event = ["BlockStored", [91, 92], None, tokens, 16, 1, "GPU", "adapter"]
    service.pool.submit(Message(f"kv@pod-l@{MODEL}".encode(), 0, payload(event)))
    service.pool.drain()
    try:
        kind = service.schema.methods["Score"].response
        for question in (ours(model="adapter", token_ids=tokens), ours(token_ids=tokens, lora_name="adapter")):
            assert dict(kind.FromString(service.call(OURS, question)).scores) == {"pod-l": 2.0}
        assert llmd_scores(service.call(LLMD, llmd_request(words(32), model="adapter"))) == [("pod-l", 2.0)]
        status, said = service.refusal(OURS, ours(model="adapter", lora_name="other"))
        assert (status, said.partition(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "lora_name")
    finally:
        service.pool.unsubscribe("pod-l")


def test_what_text_takes_is_counted(service):
    def read():
        lines = [line.split() for line in service.metrics().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = read()
    service.call(LLMD, llmd_request(words(50)))
    after = read()
    for name, more in (
        ("kvcache_tokenization_tokenization_latency_seconds_count", 1),
        ("kvcache_tokenization_render_chat_template_latency_seconds_count", 0),
        ("kvcache_index_lookup_hits_total", 3),
        ("kvindex_lookup_tokens_total", 50),
    ):
        assert after[name] - before[name] == more, name


def test_when_too_much_waits_to_be_tokenized_it_is_said(service, monkeypatch):
    async def busy(*_, **__):
        raise Unavailable("256 questions wait to be tokenized; ask again later")

    monkeypatch.setattr(service.prompts, "run", busy)
    status, said = service.refusal(LLMD, llmd_request("1"))
    assert status == grpc.StatusCode.UNAVAILABLE
    assert "ask again" in said


def test_fields_that_nobody_knows_are_passed_over(service):
    more = field(1_000, "x" * 1_000) + field(77, 2**64 - 1) + varint(99 << 3 | 1) + bytes(8)
    assert llmd_scores(service.call(LLMD, llmd_request(words(50)) + more)) == [("pod-a", 3.0), ("pod-b", 1.0)]
    # a known number with another type is one, too: here the model as a number
    status, said = service.refusal(OURS, field(1, 5) + field(2, [1]))
    assert (status, said.partition(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "model")


def test_a_message_over_the_limit_is_refused_and_the_connection_goes_on(service):
    status, _ = service.refusal(LLMD, llmd_request("1 " * 40_000))
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert service.call(LLMD, llmd_request("")) == b""


def test_a_long_error_still_fits_into_a_header(service, monkeypatch):
    def refuse(*_, **__):
        raise InvalidRequest("model: " + "\u0905" * 9_000)

    monkeypatch.setattr(service.scorer, "match", refuse)
    status, said = service.refusal(OURS, ours())
    assert status == grpc.StatusCode.INVALID_ARGUMENT
    assert said.startswith("model: \u0905")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([LLMD, OURS]))
def test_any_bytes_get_an_answer_or_a_refusal(service, data, method):
    answer = service.channel.unary_unary(method).future(data, timeout=20)
    # a name of bytes is one for which there is no tokenizer
    expected = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
    assert answer.code() in expected


def test_calls_that_are_begun_and_never_ended_hold_nobody_up(service):
    done = threading.Event()

    def never():
        done.wait()
        yield b""

    begun = [service.channel.stream_unary(method).future(never()) for method in (LLMD, OURS) for _ in range(100)]
    info = service.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    streams = [info(never()) for _ in range(50)]
    try:
        assert llmd_scores(service.call(LLMD, llmd_request(words(50)))) == [("pod-a", 3.0), ("pod-b", 1.0)]
    finally:
        for call in [*begun, *streams]:
            call.cancel()
        done.set()


def test_more_connections_than_there_may_be_end_at_once():
    with Service(max_connections=2) as running, contextlib.ExitStack() as stack:

        def comes():
            return stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=20))

        first, second = comes(), comes()
        assert first.recv(100)  # its first frame, before ours
        assert second.recv(100)
        third = comes()
        with contextlib.suppress(ConnectionError):
            assert third.recv(100) == b""
        first.close()
        until(lambda: is_answered(running))


def is_answered(running):
    with grpc.insecure_channel(f"127.0.0.1:{running.port}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            return channel.unary_unary(OURS)(ours(), timeout=20)
        except grpc.RpcError:
            return None


def test_what_fails_is_a_status_and_counted(service, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret")

    def gone(*_, **__):
        raise IndexUnavailable("redis://somewhere does not answer")

    monkeypatch.setattr(service.scorer, "match", broken)
    assert service.refusal(OURS, ours()) == (grpc.StatusCode.INTERNAL, "the service failed; its log says why")
    monkeypatch.setattr(service.scorer, "match", gone)
    status, said = service.refusal(OURS, ours())
    assert status == grpc.StatusCode.UNAVAILABLE
    assert "redis://somewhere" in said
    text = service.metrics()
    for outcome in ("failed", "unavailable", "refused", "answered"):
        line = next(one for one in text.splitlines() if f'by="grpc",outcome="{outcome}"' in one)
        assert float(line.split()[-1]) >= 1, line


def test_what_is_counted(service):
    def read():
        lines = [line.split() for line in service.metrics().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines if "{" not in name}

    before = read()
    service.call(OURS, ours())  # 50 tokens, 3 blocks, of which pod-a holds all
    service.call(OURS, ours(token_ids=[*range(32), 7, 7]))  # 2 blocks
    service.call(OURS, ours(token_ids=[7] * 16))  # one that nobody holds
    after = read()
    for name, more in (
        ("kvcache_index_lookup_requests_total", 3),
        ("kvcache_index_lookup_latency_seconds_count", 3),
        ("kvcache_index_lookup_hits_total", 5),
        ("kvcache_index_max_pod_hit_count_total", 5),
        ("kvindex_lookup_blocks_total", 6),
        ("kvindex_lookup_tokens_total", 100),
    ):
        assert after[name] - before[name] == more, name
    assert {MODEL} <= set(service.asked.names()[0])
    service.asked.forget()
    service.call(OURS, ours(pods=[ADDRESS]))
    assert service.asked.names() == ([MODEL], ["pod-a"])  # as it is followed, whatever it was asked for by


# ---- health, reflection, the life of a server


def test_health():
    with Service() as service:
        for name in ("", "indexer.v1.IndexerService", "kvindex.v1.ScorerService"):
            asked = field(1, name) if name else b""
            assert fields(service.call(HEALTH + "Check", asked)) == [(1, 1)]  # SERVING
        assert service.refusal(HEALTH + "Check", field(1, "nobody"))[0] == grpc.StatusCode.NOT_FOUND
        watch = service.channel.unary_stream(HEALTH + "Watch")(field(1, "indexer.v1.IndexerService"), timeout=20)
        assert fields(next(watch)) == [(1, 1)]
        closing = threading.Thread(target=service.server.close)
        closing.start()
        assert fields(next(watch)) == [(1, 2)]  # NOT_SERVING
        watch.cancel()
        closing.join()


def test_reflection_describes_all_that_is_there(service):
    """As grpcurl does it: ask for the services, make messages of what is said, and call with them."""
    database = ProtoReflectionDescriptorDatabase(service.channel)
    assert set(database.get_services()) == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "indexer.v1.IndexerService",
        "kvindex.v1.ScorerService",
    }
    pool = descriptor_pool.DescriptorPool(database)
    for name in database.get_services():
        assert pool.FindServiceByName(name).methods
    method = pool.FindServiceByName("indexer.v1.IndexerService").FindMethodByName("GetPodScores")
    request = message_factory.GetMessageClass(method.input_type)(prompt=words(50), model_name=MODEL)
    answer = message_factory.GetMessageClass(method.output_type).FromString(
        service.call(LLMD, request.SerializeToString())
    )
    assert json_format.MessageToDict(answer) == {
        "scores": [{"pod": "pod-a", "score": 3.0}, {"pod": "pod-b", "score": 1.0}]
    }


def test_what_is_under_way_is_answered_before_the_end():
    with Service() as service:
        begun, go_on = threading.Event(), threading.Event()
        match = service.scorer.match

        def slow(*args, **kwargs):
            begun.set()
            assert go_on.wait(20)
            return match(*args, **kwargs)

        service.scorer.match = slow
        answer = service.channel.unary_unary(OURS).future(ours(), timeout=20)
        assert begun.wait(20)
        closing = threading.Thread(target=service.server.close)
        closing.start()
        # no new calls from the moment on in which it closes
        late = grpc.insecure_channel(f"127.0.0.1:{service.port}", options=[("grpc.use_local_subchannel_pool", 1)])

        def refused():
            try:
                late.unary_unary(HEALTH + "Check")(b"", timeout=20)
            except grpc.RpcError:
                return True
            return False

        assert until(refused)
        go_on.set()
        assert dict(fields(answer.result()))[5] == b"pod-a"
        closing.join()
        late.close()


def test_a_port_that_is_taken_is_said(service):
    config = GrpcConfig(port=service.port)
    with ExitStack() as running, pytest.raises(UserError, match=f"grpc.port {service.port}.*choose another"):
        serve_grpc(config, service.scorer, service.followed, Asked(), AnswerMetrics(), running)


def test_without_the_packages_the_remedy_is_said():
    program = "import sys; sys.modules['grpc'] = None; from kvindex.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "--port", "0", "--grpc-port", "0"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert answer.returncode == 2
    assert "kv-cache-indexer[grpc]" in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr


def test_serve_answers_over_grpc_what_its_pods_hold():
    command = [sys.executable, "-m", "kvindex", "serve", "--port", "0", "--grpc-port", "0"]
    with Fleet(3, num_blocks=256) as fleet:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("KVINDEX_")}
        environ["KVINDEX_PODS"] = json.dumps(fleet.endpoints())
        with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as serving:
            try:
                told = (json.loads(line) for line in serving.stderr)
                address = next(line["address"] for line in told if line.get("event") == "serving_grpc")
                until(lambda: all(pod.publisher.subscribers for pod in fleet.pods))
                prompts = [[*range(number, number + 200)] for number in range(3)]
                for number, prompt in enumerate(prompts):
                    for pod in range(number + 1):
                        fleet.step(pod, prompt)
                with grpc.insecure_channel(address) as channel:
                    for prompt in prompts:
                        held = {pod.name.encode(): pod.engine.hit_blocks(prompt) for pod in fleet.pods}
                        held = {pod: blocks for pod, blocks in held.items() if blocks}
                        asked = field(1, fleet.model) + field(2, prompt)

                        def agrees(asked=asked, held=held, channel=channel):
                            answer = fields(channel.unary_unary(OURS)(asked, timeout=20, wait_for_ready=True))
                            scores = [dict(fields(value)) for number, value in answer if number == 1]
                            return {one[1]: one[2] for one in scores} == held

                        until(agrees)
            finally:
                serving.terminate()
                rest = serving.stderr.read()
                serving.wait(30)
    assert serving.returncode == 0, rest
    assert '"stopped"' in rest
    assert "Traceback" not in rest


# ---- the schema


@pytest.mark.parametrize(("kept", "folders"), [(SCHEMA, ["indexer", "kvindex"]), (TOKENIZATION, ["tokenization"])])
def test_the_schema_is_what_the_proto_files_give(tmp_path, kept, folders):
    proto = ROOT / "proto"
    assert {path.name for path in proto.iterdir()} == {"indexer", "kvindex", "tokenization"}
    files = sorted(str(path.relative_to(proto)) for folder in folders for path in (proto / folder).rglob("*.proto"))
    made = tmp_path / "schema"
    assert protoc.main(["protoc", f"-I{proto}", f"--descriptor_set_out={made}", *files]) == 0
    read = [descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()) for path in (made, kept)]
    assert read[0] == read[1], "run `make proto`"
