"""Text, messages and OpenAI bodies over HTTP, and the service with tokenizers as a person configures it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from litestar.testing import TestClient

from indexer import open_index
from kvevents import EventPool, Message
from kvindex.config import Config, TokenizersConfig, load
from kvindex.errors import ConfigError, UserError
from kvindex.http import create_app
from kvindex.score import read_messages
from kvindex.tokenizing import open_prompts
from scorer import PrefixScorer

from .conftest import payload
from .models import CONFIG, make_folder
from .test_prefix_store import tokenizer_named
from .test_prompts import HOSTILE

TEXT = "the quick brown fox jumps over the lazy dogs, and so on and on"
USER = [{"role": "user", "content": TEXT}]


def chat_ids():
    text = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer_named("llama3").encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    make_folder(made / "org" / "m", tokenizer_named("llama3"))
    make_folder(made / "bare", tokenizer_named("gpt2"), {k: v for k, v in CONFIG.items() if k != "chat_template"})
    return made


@pytest.fixture(scope="module")
def client(folder):
    index = open_index()
    config = TokenizersConfig(
        folders=[str(folder)],
        aliases={"served": "org/m"},
        loras={"poems": "org/m"},
        max_chars=200_000,
        template_timeout_s=0.3,
        trust_templates=True,
    )
    with EventPool(index) as pool, contextlib.ExitStack() as running:
        held = {"chat": (chat_ids(), None), "text": (tokenizer_named("llama3").encode(TEXT).ids, None)}
        held["poet"] = (chat_ids(), "poems")
        for pod, (ids, lora) in held.items():
            names = list(range(1, len(ids) // 4 + 1))
            event = ["BlockStored", names, None, ids[: len(names) * 4], 4, None, "GPU", lora]
            pool.submit(Message(f"kv@{pod}@org/m".encode(), 0, payload(event)))
        pool.drain()
        scorer = PrefixScorer(index, prompts=open_prompts(config, running))
        app = create_app(scorer, index, pool, max_tokens=5_000, max_body_bytes=16 * 1024 * 1024)
        with TestClient(app) as opened:
            yield opened


def ask(client, **body):
    return client.post("/v1/score", json={"model": "org/m"} | body)


def test_text_and_messages_are_scored(client):
    ids = chat_ids()
    answer = ask(client, messages=USER).json()
    assert (answer["best"], answer["prompt_tokens"], answer["block_size"]) == ("chat", len(ids), 4)
    assert answer["scores"] == {"chat": len(ids) // 4}
    assert "timings" not in answer
    whole = {"messages": USER, "temperature": 1, "stream": True, "max_tokens": 5, "user": "u"}
    assert ask(client, **whole).json()["scores"] == answer["scores"]
    text = ask(client, prompt=TEXT).json()
    assert text["best"] == "text"
    assert ask(client, prompt=[TEXT, TEXT]).json()["prompt_tokens"] == 2 * text["prompt_tokens"]
    assert ask(client, prompt=ids).json()["scores"] == answer["scores"]
    assert ask(client, token_ids=ids).json()["scores"] == answer["scores"]
    assert ask(client, messages=USER, pods=["text"]).json()["scores"] == {}
    assert ask(client, messages=USER, cache_salt="s").json()["scores"] == {}


def test_names_of_models_are_resolved(client):
    blocks = len(chat_ids()) // 4
    for body in ({"messages": USER}, {"token_ids": chat_ids()}, {"prompt": chat_ids()}):
        assert ask(client, model="served", **body).json()["scores"] == {"chat": blocks}
        assert ask(client, model="poems", **body).json()["scores"] == {"poet": blocks}
        assert ask(client, lora_name="poems", **body).json()["scores"] == {"poet": blocks}
    assert "org/m" in client.get("/v1/stats").json()["asked_models"]
    assert "poems" not in client.get("/v1/stats").json()["asked_models"]


def tell(client, route, **body):
    return client.post(f"/v1/{route}", json={"model": "org/m", "pod": "text"} | body)


def test_routers_tell_back_what_they_were_asked(client):
    asked = {"messages": USER, "temperature": 0.5}
    assert tell(client, "routed", **asked).json() == {"pod": "text"}
    (match,) = ask(client, pods=["text"], **asked).json()["matches"]
    assert match["speculative_tokens"] == len(chat_ids()) // 4 * 4
    seen = tell(client, "observe", cached_tokens=0, **asked).json()
    assert (seen["outcome"], seen["predicted_tokens"]) == ("routed_elsewhere", 0)
    seen = tell(client, "observe", pod="poet", model="poems", prompt=chat_ids()[:9], cached_tokens=8).json()
    assert (seen["outcome"], seen["predicted_tokens"]) == ("reused", 8)
    for body, status, says in (
        ({"prompt": [TEXT, TEXT]}, 400, "2 prompts"),
        ({"prompt": TEXT, "model": "never"}, 422, "never/tokenizer.json"),
        ({"prompt": [1] * 6000}, 400, "at most 5000"),
        ({"token_ids": [1], "temperature": 1}, 400, "temperature"),
        ({}, 400, "token_ids"),
    ):
        for route, more in (("routed", {}), ("observe", {"cached_tokens": 0})):
            response = tell(client, route, **body, **more)
            assert response.status_code == status
            assert says in response.json()["detail"]


def test_stages_are_told_when_asked_for(client):
    for body, spent in (({"messages": USER}, {"render", "tokenize"}), ({"token_ids": [1] * 40}, set())):
        timings = ask(client, timings=True, **body).json()["timings"]
        assert {stage for stage, seconds in timings.items() if seconds > 0} == {"keys", "match"} | spent


def test_the_metrics_tell_of_the_store(client):
    for _ in range(2):
        ask(client, prompt=TEXT * 40)
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(lines['kvindex_prefix_store_lookups_total{outcome="hit"}']) >= 1
    assert float(lines["kvindex_prefix_store_bytes"]) > 0
    assert float(lines['kvindex_prefix_store_characters_total{from="store"}']) > 1000
    assert float(lines["kvcache_tokenization_tokenization_latency_seconds_count"]) >= 2
    assert "kvcache_tokenization_render_chat_template_latency_seconds_count" in lines


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": "a", "model": "never"}, 422, "never/tokenizer.json"),
        ({"messages": USER, "model": "../secret"}, 422, "not a name"),
        ({"messages": USER, "model": "a\x00b"}, 422, "not a name"),
        ({"messages": USER, "model": "bare"}, 422, "chat_template.jinja"),
        ({}, 400, "token_ids, prompt or messages"),
        ({"prompt": "a", "messages": USER}, 400, "prompt and messages"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": [1, -1]}, 400, "prompt"),
        ({"prompt": "a", "truncate_prompt_tokens": "x"}, 400, "truncate_prompt_tokens"),
        ({"messages": [5]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "mm_items"),
        ({"messages": USER, "tools": "x"}, 400, "tools"),
        ({"messages": USER, "pods": "x"}, 400, "pods"),
        ({"prompt": "a " * 20_000}, 400, "at most 5000"),
        ({"prompt": "a" * 10_000_000}, 400, "at most 200000"),
        ({"messages": [{"role": "user", "content": "a" * 10_000_000}]}, 400, "at most 200000"),
        ({"token_ids": [1], "prompt": "a"}, 400, "prompt"),
        ({"token_ids": [1], "temperature": 1}, 400, "temperature"),
        *(({"messages": USER, "chat_template": template}, 400, "chat_template") for template, _ in HOSTILE),
    ],
)
def test_what_cannot_be_answered_is_one_clear_line(client, body, status, says):
    response = ask(client, **body)
    assert response.status_code == status, response.text[:300]
    detail = response.json()["detail"]
    assert says in detail
    assert len(detail) < 1000
    assert "\n" not in detail
    assert ask(client, messages=USER).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        rb'{"model": "org/m", "prompt": "a\ud800"}',
        rb'{"model": "org/m", "messages": [{"role": "user", "content": "\udfff"}]}',
        rb'{"model": "org/m", "prompt": "a", "other": "\ud800"}',
        b'{"model": "org/m", "prompt": "a", "other": "\xff"}',
        b'{"model": "org/m", "token_ids": [1], "\xff": 1}',
        b'{"model": "org/m", "prompt": "a", "other": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"model": "org/m", "messages": [' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"]}",
        b'{"model": "org/m", "prompt": "\xff"}',
    ],
)
def test_bodies_that_are_no_json_text_are_refused(client, content):
    response = client.post("/v1/score", content=content)
    assert response.status_code == 400
    assert response.json()["status"] == 400


def test_a_service_that_is_busy_says_when_to_come_again(folder):
    index = open_index()
    with EventPool(index) as pool, contextlib.ExitStack() as running:
        prompts = open_prompts(TokenizersConfig(folders=[str(folder)]), running)
        app = create_app(PrefixScorer(index, prompts=prompts), index, pool, max_tokens=100, max_body_bytes=10_000)
        with TestClient(app) as client:
            prompts.close()
            response = ask(client, prompt="a")
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    assert "closed" in response.json()["detail"]


def test_the_configuration(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        '[tokenizers]\nfolders = ["/models"]\naliases = { a = "b" }\nloras = { l = "b" }\nstore_bytes = 0\n'
        '[tokenizers.models."org/m"]\nchat_template = "x.jinja"\ncontent_format = "openai"\n'
        "chat_template_kwargs = { enable_thinking = false }\n"
    )
    loaded = load(file, {"KVINDEX_TOKENIZERS_THREADS": "3", "KVINDEX_TOKENIZERS_TRUST_TEMPLATES": "true"}).tokenizers
    assert (loaded.folders, loaded.aliases, loaded.loras) == (["/models"], {"a": "b"}, {"l": "b"})
    assert (loaded.store_bytes, loaded.threads, loaded.trust_templates) == (0, 3, True)
    assert loaded.models["org/m"].chat_template_kwargs == {"enable_thinking": False}
    environ = {
        "KVINDEX_TOKENIZERS_FOLDERS": '["/models"]',
        "KVINDEX_TOKENIZERS_MODELS": '{"m": {"tokenizer": "/x"}}',
        "KVINDEX_TOKENIZERS_ALIASES": '{"a": "b"}',
        "KVINDEX_TOKENIZERS_LORAS": '{"l": "b"}',
    }
    assert load(None, environ).tokenizers.models["m"].tokenizer == "/x"
    assert Config().tokenizers.store_bytes == 256 * 1024 * 1024
    for text, says in (
        ("threads = 0", "threads"),
        ("folder = []", "folder"),
        ("[tokenizers.models.m]\nx = 1", "models"),
    ):
        file.write_text("[tokenizers]\n" + text)
        with pytest.raises(ConfigError, match=f"tokenizers.*{says}|{says}.*tokenizers"):
            load(file, {})


def test_places_that_are_not_there_are_refused_at_start(tmp_path):
    with contextlib.ExitStack() as running:
        with pytest.raises(UserError, match=r"tokenizers\.folders: .*nowhere"):
            open_prompts(TokenizersConfig(folders=[str(tmp_path / "nowhere")]), running)
        config = load(None, {"KVINDEX_TOKENIZERS_MODELS": '{"m": {"chat_template": "nowhere.jinja"}}'})
        with pytest.raises(UserError, match=r"tokenizers\.models\.m\.chat_template: nowhere"):
            open_prompts(config.tokenizers, running)


def test_messages_are_read_from_a_file(tmp_path):
    file = tmp_path / "m.json"
    file.write_text(json.dumps(USER))
    assert read_messages(file) == {"messages": USER}
    file.write_text(json.dumps({"messages": USER, "tools": [], "model": "x"}))
    assert read_messages(file) == {"messages": USER, "tools": [], "model": "x"}
    for text in ("{}", "5", "[", '{"prompt": "a"}'):
        file.write_text(text)
        with pytest.raises(UserError, match="--messages"):
            read_messages(file)
    with pytest.raises(UserError, match="nowhere"):
        read_messages(tmp_path / "nowhere.json")


def children_of(pid):
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_the_programs_together(folder, tmp_path):
    """A service with tokenizers, asked on the command line; then it leaves nothing behind."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {key: value for key, value in os.environ.items() if key != "KVINDEX_SHARED"}
    environ |= {"KVINDEX_TOKENIZERS_FOLDERS": json.dumps([str(folder)]), "KVINDEX_HTTP_PORT": str(port)}
    command = [sys.executable, "-m", "kvindex", "serve"]
    serving = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/healthz")
                break
            assert time.monotonic() < until
            assert serving.poll() is None, serving.stderr.read()
            time.sleep(0.05)
        file = tmp_path / "messages.json"
        file.write_text(json.dumps(USER))
        for more, tokens in (
            (["--prompt", TEXT], len(tokenizer_named("llama3").encode(TEXT).ids)),
            (["--messages", str(file)], len(chat_ids())),
        ):
            command = [sys.executable, "-m", "kvindex", "score", "--json", "--model", "org/m", "--url", url, *more]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            assert json.loads(answer.stdout)["prompt_tokens"] == tokens
        command = [sys.executable, "-m", "kvindex", "score", "--url", url, "--prompt", "a", "1"]
        assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 2
        renderers = children_of(serving.pid)
        assert renderers
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(30) == 0
        assert "Traceback" not in serving.stderr.read()
        while any(map(is_running, renderers)):
            assert time.monotonic() < until + 60
            time.sleep(0.05)
    finally:
        serving.kill()
        serving.wait()
        serving.stderr.close()
