"""A tokenizer that is a running vLLM: a server with its `/tokenize` route, and every way in which it may fail."""

import contextlib
import http.server
import json
import re
import threading

import pytest
from transformers import AutoTokenizer

from kvindex import remote_tokenizer
from kvindex.config import TokenizersConfig
from kvindex.errors import UserError
from kvindex.remote_tokenizer import VllmTokenizer
from kvindex.tokenizing import open_prompts
from scorer import InvalidRequest, NoTokenizer, Prompts, Tokenizers, Unavailable

from .models import make_folder
from .test_prefix_store import tokenizer_named
from .test_prompts import TOOL, USER, same


class Server(http.server.ThreadingHTTPServer):
    """Answers as vLLM does, with transformers."""

    daemon_threads = True

    def __init__(self, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = tokenizer
        self.asked = []
        self.fails = None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        status, answer = self.server.fails or (200, self.tokens(body))
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def tokens(self, body):
        tokenizer = self.server.tokenizer
        text = body.get("prompt")
        if text is None:
            text = tokenizer.apply_chat_template(
                body["messages"],
                tools=body.get("tools"),
                tokenize=False,
                add_generation_prompt=body["add_generation_prompt"],
                continue_final_message=body["continue_final_message"],
                **(body.get("chat_template_kwargs") or {}),
            )
        tokens = tokenizer.encode(text, add_special_tokens=body["add_special_tokens"])
        return {"count": len(tokens), "max_model_len": 1000, "tokens": tokens, "token_strs": None}

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    folder = make_folder(tmp_path / "models" / "m", tokenizer_named("llama3"))
    with Server(AutoTokenizer.from_pretrained(folder)) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def far(server):
    made = VllmTokenizer(server.url + "/", api_key="secret", timeout_s=5)
    yield made
    made.close()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hello wörld 中"},
        {"prompt": "hello", "add_special_tokens": False},
        {"messages": USER},
        {"messages": USER, "add_generation_prompt": False, "tools": [TOOL]},
        {"messages": [*USER, {"role": "assistant", "content": "so"}], "continue_final_message": True},
        {"messages": USER, "chat_template_kwargs": {"a": 1}, "documents": [{"a": "b"}], "reasoning_effort": "low"},
    ],
)
def test_the_ids_are_those_of_a_tokenizer_here(server, far, tmp_path, body):
    with Prompts(Tokenizers([tmp_path / "models"])) as here, Prompts(remote=far) as there:
        (made,), (want,) = there.read({"model": "m"} | body), here.read({"model": "m"} | body)
    assert made.length == want.length
    assert made.keys(1, made.length) == want.keys(1, want.length)
    path, key, asked = server.asked[0]
    assert (path, key, asked["model"]) == ("/tokenize", "Bearer secret", "m")
    if "documents" in body:
        assert asked["chat_template_kwargs"] == {
            "a": 1,
            "documents": [{"a": "b"}],
            "reasoning_effort": "low",
            "enable_thinking": True,
        }


@pytest.mark.parametrize(
    ("fails", "kind", "says"),
    [
        ((404, {"error": {"message": "The model `m` does not exist."}}), NoTokenizer, "does not exist"),
        ((400, {"error": {"message": "bad role"}}), InvalidRequest, "bad role"),
        ((401, {"error": "Unauthorized"}), Unavailable, "401"),
        ((500, b"x" * 100_000), Unavailable, "500"),
        ((302, b""), Unavailable, "302"),
        ((200, b"<html>"), Unavailable, "without tokens"),
        ((200, {"tokens": "abc"}), Unavailable, "tokens"),
        ((200, {"tokens": [1, -1]}), InvalidRequest, "-1"),
        ((200, {"tokens": [1] * 100_000}), Unavailable, "too long"),
    ],
)
def test_each_failure_is_one_clear_error(server, far, fails, kind, says, monkeypatch):
    monkeypatch.setattr(remote_tokenizer, "MAX_ANSWER_BYTES", 200_000)
    server.fails = fails
    with Prompts(remote=far) as prompts:
        with pytest.raises(kind, match=says) as error:
            prompts.read({"model": "m", "prompt": "a"})
        assert len(str(error.value)) < 600
        server.fails = None
        assert prompts.read({"model": "m", "prompt": "a"})


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense"])
def test_nobody_there(url):
    far = VllmTokenizer(url, timeout_s=1)
    with Prompts(remote=far) as prompts, pytest.raises(Unavailable, match=re.escape(url)):
        prompts.read({"model": "m", "prompt": "a"})
    far.close()


def test_text_that_is_no_unicode_is_refused_here(server, far):
    with Prompts(remote=far) as prompts:
        for body in ({"prompt": "a\ud800"}, {"messages": [{"role": "user", "content": "\udfff"}]}):
            with pytest.raises(InvalidRequest, match="Unicode"):
                prompts.read({"model": "m"} | body)
    assert server.asked == []


def test_the_server_is_not_asked_for_what_is_here(server, far, tmp_path):
    with Prompts(Tokenizers([tmp_path / "models"]), remote=far) as prompts:
        (made,) = prompts.read({"model": "m", "prompt": "one"})
        assert same(made, tokenizer_named("llama3").encode("one").ids)
    assert server.asked == []


def test_images_are_refused_as_nobody_would_know_where_they_lie(server, far):
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://example/cat.png"}}]}
    with Prompts(remote=far) as prompts, pytest.raises(InvalidRequest, match=r"messages\[0\].*image_url"):
        prompts.read({"model": "m", "messages": [image]})
    assert not server.asked


def test_a_scheme_that_nobody_speaks_is_refused_at_the_start():
    with contextlib.ExitStack() as running, pytest.raises(UserError, match=r"remote_url: grpcs://"):
        open_prompts(TokenizersConfig(remote_url="grpcs://127.0.0.1:1"), running)
