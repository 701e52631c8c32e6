"""Pods of an SGLang server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvevents import DiscoveryError
from kvevents.discovery import Endpoint, SglangDiscovery, SglangFollow, sglang

from .conftest import Followed, until
from .discovering import following

SERVER_INFO = {
    "model_path": "/models/qwen",
    "served_model_name": "Qwen/Qwen3-8B",
    "page_size": 64,
    "dp_size": 2,
    "kv_events": {
        "publisher": "zmq",
        "endpoint_host": "*",
        "endpoint_port_base": 5557,
        "topic": "kv-events",
        "block_size": 64,
        "dp_size": 2,
        "replay_endpoint_port_base": 5657,
        "load_endpoint_port_base": 5757,
        "load_topic": "load",
    },
}


class Server:
    """An HTTP server that answers every path in `answers`."""

    def __init__(self):
        self.answers = {}
        answers = self.answers

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = answers.get(self.path)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_an_sglang_server_says_where_its_ranks_publish(server, path):
    server.answers[path] = SERVER_INFO
    found = SglangDiscovery(SglangFollow(url=server.url + "/"), interval_s=1).read()
    expected = [(f"tcp://127.0.0.1:{5557 + rank}", f"tcp://127.0.0.1:{5657 + rank}") for rank in (0, 1)]
    assert [(one.endpoint, one.replay) for one in found.endpoints] == expected
    assert {(one.model, one.topic) for one in found.endpoints} == {("Qwen/Qwen3-8B", "kv-events")}
    assert found.name == f"127.0.0.1:{server.port}"


def test_an_sglang_server_that_moves_or_fails_is_followed(server):
    followed = Followed()
    source = SglangDiscovery(SglangFollow(url=server.url, pod="sg-0", model="x"), interval_s=0.005)
    with following(followed, source) as follower:
        until(lambda: follower.stats()["errors_total"])
        server.answers["/server_info"] = SERVER_INFO
        until(lambda: "sg-0" in followed.pods)
        for broken in (b"", b"{", [], {}, {"kv_events": None}, {"kv_events": {"endpoint_port_base": 70000}}):
            errors = follower.stats()["errors_total"]
            server.answers["/server_info"] = broken
            until(lambda errors=errors: follower.stats()["errors_total"] > errors + 1)
            assert set(followed.pods) == {"sg-0"}
        events = SERVER_INFO["kv_events"] | {
            "endpoint_host": "10.0.0.8",
            "replay_endpoint_port_base": None,
            "dp_size": 1,
        }
        server.answers["/server_info"] = SERVER_INFO | {"kv_events": events}
        until(lambda: followed.pods["sg-0"].endpoints == (Endpoint("tcp://10.0.0.8:5557", None, "x", "kv-events"),))
        assert follower.resolve([server.url]) == ["sg-0"]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        [],
        {"kv_events": []},
        {"kv_events": {}},
        {"kv_events": {"endpoint_port_base": "5557"}},
        {"kv_events": {"endpoint_port_base": 70_000}},
        {"kv_events": {"endpoint_port_base": 5557, "dp_size": 10**9}},
        {"kv_events": {"endpoint_port_base": 65_535, "dp_size": 2}},
        {"kv_events": {"endpoint_port_base": 5557, "endpoint_host": "a b"}},
        {"kv_events": {"endpoint_port_base": 5557, "topic": 5}},
    ],
    ids=str,
)
def test_an_sglang_server_that_answers_nonsense_is_an_error_of_that_source(server, answer):
    server.answers["/server_info"] = server.answers["/get_server_info"] = answer
    with pytest.raises(DiscoveryError, match="sglang"):
        SglangDiscovery(SglangFollow(url=server.url), interval_s=1.0).read()


def test_an_sglang_server_that_never_ends_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(sglang, "ANSWER_S", -1.0)
    server.answers["/server_info"] = {"kv_events": {"endpoint_port_base": 5557}}
    with pytest.raises(DiscoveryError, match="not answered whole"):
        SglangDiscovery(SglangFollow(url=server.url), interval_s=1.0).read()
