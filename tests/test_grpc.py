"""Questions over gRPC, those of llm-d's clients and our own, and bytes that are none."""

import threading
from array import array

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer import IndexUnavailable, Source
from kvevents import Message
from scorer import InvalidRequest, Unavailable

from .conftest import payload
from .grpc_service import (
    ADDRESS,
    LLMD,
    MODEL,
    OURS,
    SHARED,
    Service,
    field,
    fields,
    llmd_request,
    llmd_scores,
    ours,
    varint,
    words,
)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Service(tmp_path_factory.mktemp("tokenizers")) as running:
        yield running


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
