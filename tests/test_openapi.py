"""The description of the service against the service: what Schemathesis makes of it, and what stands in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from litestar.testing import TestClient

from indexer import open_index
from kvevents import EventPool, Message
from kvindex.http import create_app
from kvindex.openapi import document
from scorer import PrefixScorer, Prompts, Tokenizers

from .conftest import payload
from .models import make_folder
from .serving import serving
from .test_prefix_store import tokenizer_named

CONFIG = Path(__file__).with_name("schemathesis.toml")
MODEL = "Qwen/Qwen3-8B"  # as the examples of the description say it


@pytest.fixture
def app(tmp_path):
    """A service with a pod and a tokenizer of the examples' names, so that they are answered."""
    make_folder(tmp_path / MODEL, tokenizer_named("llama3"))
    index = open_index()
    with EventPool(index) as pool, Prompts(Tokenizers([tmp_path])) as prompts:
        event = ["BlockStored", [1, 2], None, list(range(1000, 1032)), 16, None]
        pool.submit(Message(f"kv@10.0.0.7:8000@{MODEL}".encode(), 0, payload(event)))
        pool.drain()
        yield create_app(PrefixScorer(index, prompts=prompts), index, pool, max_tokens=10_000, max_body_bytes=1 << 20)


def test_schemathesis_finds_nothing(app, tmp_path):
    with serving(app) as (url,):
        command = [Path(sys.executable).with_name("schemathesis"), "--config-file", CONFIG, "run", f"{url}/schema"]
        more = ["--checks", "all", "--max-examples", "20", "--generation-deterministic", "--no-color"]
        found = subprocess.run(
            [*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False
        )
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-1000:]


def test_every_route_is_described_and_every_example_is_answered_as_it_says(app):
    routes = {
        (re.sub(r":str\}", "}", route.path), method.lower())
        for route in app.routes
        for method in getattr(route, "methods", [])
        if method not in ("HEAD", "OPTIONS")
    }
    described = {(path, method) for path, methods in document()["paths"].items() for method in methods}
    assert routes - {("/schema/openapi.json", "get")} == described
    with TestClient(app) as client:
        assert client.get("/schema").json() == client.get("/schema/openapi.json").json() == document()
        for path, operation in document()["paths"].items():
            if "{" in path or "post" not in operation:
                continue
            content = operation["post"]["requestBody"]["content"]["application/json"]
            for example in content["examples"].values():
                answer = client.post(path, json=example["value"])
                assert answer.status_code == 200, (path, answer.text)
            shown = operation["post"]["responses"]["200"]["content"]["application/json"]["example"]
            assert shown.keys() == answer.json().keys(), path
