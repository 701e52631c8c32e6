"""The router of the examples, between scripted pods and a scripted scorer on real sockets."""

import asyncio
import contextlib
import json
import threading

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.router import ATTEMPTS, POLICIES, REQUEST_TOKENS, Pod, Router, cached_tokens_of, create_app, question_of

from .conftest import until
from .serving import refusing_port, serving

BODY = b'{"model": "m",  "prompt": [1, 2, 3], "stream": true}'
PIECES = [b"data: {\xf0\x9f", b"\x98\x80}\r\n\r\n\x00\xff", b"data: [DONE]\n\n"]
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}}\n\n'


class ScriptedPod:
    """Sends pieces, each when it is let go, and notes what it got."""

    def __init__(self, pieces=PIECES, status=200, headers=(), *, gated=False):
        self.pieces = pieces
        self.status = status
        self.headers = [(b"content-type", b"text/event-stream"), *headers]
        self.gate = threading.Semaphore(0 if gated else 1_000_000)
        self.calls = []
        self.left = threading.Event()
        """Set when the other side went away before the end."""

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.calls.append((scope["path"], dict(scope["headers"]), body))
        gone = asyncio.create_task(self._gone(receive))
        started = False
        for piece in [*self.pieces, None]:
            while not self.gate.acquire(blocking=False):
                await asyncio.sleep(0.001)
                if gone.done():
                    return
            if not started:
                started = True
                await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
            if piece is ConnectionError:
                raise ConnectionError
            await send({"type": "http.response.body", "body": piece or b"", "more_body": piece is not None})
        gone.cancel()

    async def _gone(self, receive):
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()


class ScriptedScorer:
    """Answers with what it is told to and notes what it was asked."""

    def __init__(self, matches=(), prompt_tokens=3):
        self.answer = {"matches": list(matches), "prompt_tokens": prompt_tokens}
        self.calls = []
        self.tokens = set()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.calls.append((scope["path"], json.loads(body)))
        self.tokens.add(dict(scope["headers"]).get(b"authorization"))
        answer = json.dumps(self.answer).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": answer})


@contextlib.contextmanager
def routing(*pods, scorer=None, policy="round-robin", token=""):
    """Serve scripted pods (or URLs) and a router in front of them; give its URL and itself."""
    router = Router([Pod(f"pod-{number}", "") for number in range(len(pods))], [], policy, token=token)
    apps = [pod for pod in pods if not isinstance(pod, str)]
    with serving(create_app(router), *apps, *([scorer] if scorer else [])) as (url, *urls):
        for place, pod in zip(router.pods, pods, strict=True):
            place.url = pod if isinstance(pod, str) else urls.pop(0)
        router.scorers = urls
        yield url, router


def idle(router):
    return all(pod.in_flight == 0 and pod.waiting_tokens == 0 for pod in router.pods)


def test_bytes_go_through_as_they_are_and_as_they_come():
    pod = ScriptedPod(gated=True, headers=[(b"x-engine", b"one"), (b"date", b"then")])
    headers = {"content-type": "application/json", "x-request-id": "7", "authorization": "Bearer k"}
    with routing(pod) as (url, router):
        pod.gate.release()
        with httpx.stream("POST", f"{url}/v1/completions?echo=1", content=BODY, headers=headers) as answer:
            chunks = answer.iter_raw()
            for piece in PIECES:
                # the next piece is let go only when this one is here, so that nothing is held back on the way
                assert next(chunks) == piece
                assert router.pods[0].in_flight == 1
                pod.gate.release()
            assert list(chunks) == []
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["x-engine"] == "one"
        assert answer.headers["x-routed-to"] == "pod-0"
        assert answer.headers.get_list("date") == ["then"]
        until(lambda: idle(router))
    ((path, sent, body),) = pod.calls
    assert (path, body) == ("/v1/completions", BODY)
    assert sent[b"x-request-id"] == b"7"
    assert sent[b"authorization"] == b"Bearer k"
    assert sent[b"host"] == httpx.URL(router.pods[0].url).netloc


@pytest.mark.parametrize("seen", [0, 1])
def test_a_client_that_leaves_ends_the_request_at_the_pod(seen):
    pod = ScriptedPod(gated=True)
    with routing(pod) as (url, router):
        if seen:
            pod.gate.release()
            with httpx.stream("POST", f"{url}/v1/completions", content=BODY) as answer:
                assert next(answer.iter_raw()) == PIECES[0]
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", content=BODY, timeout=httpx.Timeout(5, read=0.2))
        assert pod.left.wait(10)
        until(lambda: idle(router))
    assert len(pod.calls) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_another_pod_answers_where_one_refuses(policy):
    busy, good = ScriptedPod([b"busy"], 503), ScriptedPod()
    dead = f"http://127.0.0.1:{refusing_port()}"
    with routing(dead, busy, good, policy=policy) as (url, router):
        for _ in range(6):
            answer = httpx.post(f"{url}/v1/chat/completions", content=BODY)
            assert (answer.status_code, answer.content) == (200, b"".join(PIECES))
            assert answer.headers["x-routed-to"] == "pod-2"
        until(lambda: idle(router))
    assert len(good.calls) == 6
    # who refused is not asked first again at once
    assert len(busy.calls) <= 1


def test_a_pod_that_breaks_off_before_the_first_byte_has_refused():
    broken, good = ScriptedPod([ConnectionError]), ScriptedPod()
    with routing(broken, good) as (url, _):
        answers = {httpx.post(f"{url}/v1/completions", content=BODY).headers["x-routed-to"] for _ in range(2)}
    assert answers == {"pod-1"}


def test_what_the_client_has_begun_to_read_is_not_begun_again():
    pods = [ScriptedPod([PIECES[0], ConnectionError]) for _ in range(2)]
    with routing(*pods) as (url, router):
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"{url}/v1/completions", content=BODY)
        until(lambda: idle(router))
    assert sum(len(pod.calls) for pod in pods) == 1


def test_an_error_of_the_request_is_the_pods_to_tell():
    pods = [ScriptedPod([b"too long"], 400) for _ in range(2)]
    with routing(*pods) as (url, _):
        answer = httpx.post(f"{url}/v1/completions", content=BODY)
    assert (answer.status_code, answer.content) == (400, b"too long")
    assert sum(len(pod.calls) for pod in pods) == 1


def test_when_all_refuse_the_answer_says_so_after_a_few():
    pods = [ScriptedPod([b"busy"], 503) for _ in range(ATTEMPTS + 1)]
    with routing(*pods) as (url, _):
        answer = httpx.post(f"{url}/v1/completions", content=BODY)
    assert answer.status_code == 503
    assert "pod-2: status 503" in answer.json()["error"]["message"]
    assert sum(len(pod.calls) for pod in pods) == ATTEMPTS


@pytest.mark.parametrize(
    ("headers", "body", "says"),
    [({}, b"no", "body"), ({}, b"[1]", "body"), ({"x-routing-policy": "best"}, BODY, "x-routing-policy")],
)
def test_what_cannot_be_routed_is_refused(headers, body, says):
    pod = ScriptedPod()
    with routing(pod) as (url, _):
        answer = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert pod.calls == []


def test_round_robin_takes_one_after_the_other_and_asks_nobody():
    pods, scorer = [ScriptedPod() for _ in range(3)], ScriptedScorer()
    with routing(*pods, scorer=scorer, policy="kv") as (url, _):
        headers = {"x-routing-policy": "round-robin"}
        order = [
            httpx.post(f"{url}/v1/completions", content=BODY, headers=headers).headers["x-routed-to"] for _ in range(6)
        ]
    assert order == ["pod-0", "pod-1", "pod-2"] * 2
    assert scorer.calls == []


@pytest.mark.parametrize("stream", [True, False])
def test_the_scorer_is_told_where_a_prompt_went_and_what_was_reused(stream):
    whole = USAGE.removeprefix(b"data: ")
    pods = [ScriptedPod([b'data: {"a":1}\n\n', USAGE, b"data: [DONE]\n\n"] if stream else [whole]) for _ in range(2)]
    scorer = ScriptedScorer([{"pod": "pod-1", "rank": 0, "tokens": 2}])
    token = "secret" if stream else ""
    with routing(*pods, scorer=scorer, policy="kv", token=token) as (url, _):
        answer = httpx.post(f"{url}/v1/completions", content=BODY)
        assert answer.headers["x-routed-to"] == "pod-1"
        until(lambda: len(scorer.calls) == 3)
    assert scorer.tokens == {b"Bearer secret" if stream else None}
    asked = {"model": "m", "token_ids": [1, 2, 3]}
    assert scorer.calls[0] == ("/v1/score", {**asked, "holders_only": True})
    assert sorted(scorer.calls[1:], key=str) == [
        ("/v1/observe", {**asked, "pod": "pod-1", "cached_tokens": 2}),
        ("/v1/routed", {**asked, "pod": "pod-1"}),
    ]


def test_text_is_asked_about_as_it_is():
    pods, scorer = [ScriptedPod([b"{}"]) for _ in range(3)], ScriptedScorer([{"pod": "pod-2", "rank": 0, "tokens": 2}])
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5}
    with routing(*pods, scorer=scorer, policy="kv") as (url, router):
        assert httpx.post(f"{url}/v1/chat/completions", json=body).headers["x-routed-to"] == "pod-2"
        until(lambda: idle(router) and len(scorer.calls) == 2)
    assert scorer.calls == [("/v1/score", {**body, "holders_only": True}), ("/v1/routed", {**body, "pod": "pod-2"})]


def test_without_a_scorer_the_idlest_pod_answers():
    pods, scorer = [ScriptedPod(gated=True), ScriptedPod(gated=True)], f"http://127.0.0.1:{refusing_port()}"
    with routing(*pods, policy="kv") as (url, router):
        router.scorers = [scorer]
        pods[0].gate.release()
        pods[1].gate.release()
        with httpx.stream("POST", f"{url}/v1/completions", content=BODY) as one:
            chunks = one.iter_raw()  # when it is collected the answer is closed
            assert next(chunks) == PIECES[0]
            with httpx.stream("POST", f"{url}/v1/completions", content=BODY) as other:
                assert {one.headers["x-routed-to"], other.headers["x-routed-to"]} == {"pod-0", "pod-1"}


LOADS = st.lists(st.tuples(*[st.integers(0, 600)] * 3, st.integers(0, 5)), min_size=1, max_size=6)


@given(prompt=st.integers(1, 600), loads=LOADS)
@settings(max_examples=200, deadline=None)
def test_the_pod_with_the_least_left_to_do_is_first(prompt, loads):
    IDLE.pods = [
        Pod(f"pod-{n}", "http://nowhere", in_flight, waiting) for n, (_, _, waiting, in_flight) in enumerate(loads)
    ]
    matches = []
    for number, (held, coming, _, _) in enumerate(loads):
        # of two ranks the better one counts; the worse one is sometimes first
        ranks = [{"tokens": held, "speculative_tokens": coming}, {"tokens": held // 2}]
        matches += [{"pod": f"pod-{number}", "rank": n, **rank} for n, rank in enumerate(ranks[:: 1 - 2 * (held % 2)])]
    IDLE.answer = {"matches": [*matches, {"pod": "of another router", "tokens": 9}], "prompt_tokens": prompt}
    chosen = asyncio.run(IDLE.choose("kv", {"model": "m"}))
    to_compute = {f"pod-{n}": max(1, prompt - held - coming) for n, (held, coming, _, _) in enumerate(loads)}
    assert {pod.name: tokens for pod, tokens in chosen} == to_compute
    work = [to_compute[pod.name] + pod.waiting_tokens + REQUEST_TOKENS * pod.in_flight for pod, _ in chosen]
    assert work == sorted(work)


class Answered(Router):
    """Has an answer of the scorer already."""

    answer = {}

    async def _ask(self, path, body):
        return json.dumps(self.answer).encode()


IDLE = Answered([], [])


@pytest.mark.parametrize(
    ("end", "cached"),
    [
        (USAGE, 2),
        (USAGE.replace(b"\n", b"\r\n") + b"data: [DONE]\r\n\r\n", 2),
        (USAGE + b": a comment\n\ndata: [DONE]\n\n", 2),
        (b'{"usage": {"prompt_tokens_details": {"cached_tokens": 7}}, "choices": [{"text": "data: x\\n"}]}', 7),
        (b'{"usage": {"prompt_tokens_details": null}}', None),
        (b'{"usage": {"prompt_tokens_details": {"cached_tokens": "x"}}}', None),
        (b'{"usage": null}', None),
        (b'data: {"choices": [1]}\n\ndata: [DONE]\n\n', None),
        (b"\xff\x00", None),
        (b"", None),
    ],
)
def test_reading_what_was_reused(end, cached):
    assert cached_tokens_of(end) == cached


@pytest.mark.parametrize(
    ("request_body", "question"),
    [
        ({"model": "m", "prompt": [1, 2], "stream": True, "cache_salt": "s"}, {"token_ids": [1, 2], "cache_salt": "s"}),
        ({"model": "m", "prompt": "hello", "n": 3}, {"prompt": "hello", "n": 3}),
        (
            {"model": "m", "messages": [{"role": "user"}], "tools": None},
            {"messages": [{"role": "user"}], "tools": None},
        ),
        ({"model": "m", "prompt": ["a", "b"]}, None),
        ({"model": "m", "prompt": [[1], [2]]}, None),
    ],
)
def test_what_the_scorer_is_asked(request_body, question):
    assert question_of(request_body) == (question and {"model": "m", **question})
