"""How a service ends: nobody is sent to it, nobody is let in, what is under way ends, and then all is closed."""

import contextlib
import json
import signal
import socket
import threading

import grpc
import httpx
import pytest

from indexer import snapshots

from .conftest import until
from .grpc_service import HEALTH, OURS, Service, field, ours
from .serving import service

QUESTION = json.dumps({"model": "m", "token_ids": [1]}).encode()
HEAD = b"POST /v1/score HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(QUESTION)
GRPC_QUESTION = field(1, "m") + field(2, [1])
NOT_SERVING = b"\x08\x02"
FOREVER = 600


class Asking:
    """One connection, whose bytes go out when a test says so."""

    def __init__(self, served):
        self.socket = socket.create_connection(served.address, timeout=30)

    def send(self, data):
        self.socket.sendall(data)

    def answer(self):
        """Read one answer: its first line, its headers, its body."""
        got = b""
        while b"\r\n\r\n" not in got:
            got += self._more()
        head, _, body = got.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        while len(body) < int(headers["content-length"]):
            body += self._more()
        return int(status.split()[1]), headers, body

    def _more(self):
        got = self.socket.recv(65_536)
        assert got, "the connection ended"
        return got

    def is_over(self):
        """Wait until nothing can come any more."""
        try:
            return self.socket.recv(65_536) == b""
        except ConnectionResetError:
            return True


@contextlib.contextmanager
def asking(served):
    asked = Asking(served)
    with asked.socket:
        yield asked


@contextlib.contextmanager
def under_way(served):
    """A question of which half has been sent, and which the service has begun."""
    with asking(served) as asked:
        asked.send(HEAD.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert asked.socket.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        asked.send(QUESTION[:5])
        yield asked


def refuses(served):
    """Whether nobody is let in any more."""
    try:
        socket.create_connection(served.address, timeout=30).close()
    except ConnectionRefusedError:
        return True
    return False


def ends(served, status=0):
    assert served.process.wait(30) == status, served.log.read_text()
    assert "Traceback" not in served.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_not_ready_at_once_and_answers_on_until_the_delay_is_over(tmp_path, number):
    with service(tmp_path, grpc=True, http_shutdown_delay_s=FOREVER) as served:
        with httpx.Client(base_url=served.url) as client, grpc.insecure_channel(served.grpc) as channel:
            health = channel.unary_unary(HEALTH + "Check")
            assert client.get("/readyz").status_code == 200
            assert "connection" not in client.get("/healthz").headers
            served.process.send_signal(number)
            until(lambda: client.get("/readyz").status_code == 503)
            assert client.get("/readyz").json() == {"status": "leaving"}
            assert client.get("/healthz").status_code == 200
            answer = client.post("/v1/score", content=QUESTION)
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            until(lambda: health(b"", timeout=20) == NOT_SERVING)
            assert health(field(1, "kvindex.v1.ScorerService"), timeout=20) == NOT_SERVING
            assert channel.unary_unary(OURS)(GRPC_QUESTION, timeout=20) is not None
            date = client.get("/healthz").headers["date"]  # of each second, so that it has had time to stop listening
            until(lambda: client.get("/healthz").headers["date"] != date)
            assert not refuses(served)
        served.process.send_signal(number)
        ends(served)
        assert served.events("stopped")


def test_after_the_delay_it_ends(tmp_path):
    with service(tmp_path, http_shutdown_delay_s=0.2) as served:
        served.process.send_signal(signal.SIGTERM)
        ends(served)


def test_what_is_under_way_ends_and_idle_connections_are_closed(tmp_path):
    with (
        service(tmp_path, http_shutdown_timeout_s=FOREVER) as served,
        asking(served) as idle,
        asking(served) as silent,
        under_way(served) as asked,
    ):
        idle.send(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        status, headers, _ = idle.answer()
        assert (status, "connection" in headers) == (200, False)
        served.process.send_signal(signal.SIGTERM)
        until(lambda: refuses(served))
        assert idle.is_over()
        assert silent.is_over()
        assert served.process.poll() is None
        asked.send(QUESTION[5:])
        status, headers, body = asked.answer()
        assert (status, headers["connection"], json.loads(body)["scores"]) == (200, "close", {})
        assert asked.is_over()
        ends(served)


def test_what_does_not_end_is_closed_after_its_time(tmp_path):
    with service(tmp_path, http_shutdown_timeout_s=1) as served, under_way(served) as asked:
        served.process.send_signal(signal.SIGTERM)
        ends(served)
        with contextlib.suppress(AssertionError):
            asked.answer()
        assert asked.is_over()
        assert served.events("requests_cut_off")[0]["requests"] == 1
        assert served.events("stopped")


def test_what_waits_for_somebody_else_is_closed_after_its_time(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        remote = {
            "tokenizers_remote_url": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "tokenizers_remote_timeout_s": 2,
        }
        with service(tmp_path, http_shutdown_timeout_s=0, **remote) as served, asking(served) as asked:
            question = json.dumps({"model": "m", "prompt": "a"}).encode()
            asked.send(HEAD.replace(b"%d" % len(QUESTION), b"%d" % len(question)) + question)
            connection, _ = silent.accept()
            with connection:
                served.process.send_signal(signal.SIGTERM)
                assert asked.is_over()
                ends(served)
            assert served.events("requests_cut_off")[0]["requests"] == 1


@pytest.mark.parametrize("delay", [0, FOREVER])
def test_a_second_signal_ends_it_at_once_and_keeps_what_it_knows(tmp_path, delay):
    settings = {"http_shutdown_delay_s": delay, "http_shutdown_timeout_s": FOREVER}
    settings["snapshot_path"] = tmp_path / "snapshot"
    with service(tmp_path, grpc=True, **settings) as served, under_way(served) as asked:
        served.process.send_signal(signal.SIGTERM)
        if delay:
            until(lambda: httpx.get(f"{served.url}/readyz").status_code == 503)
        else:
            until(lambda: refuses(served))
        assert served.process.poll() is None
        served.process.send_signal(signal.SIGTERM)
        ends(served)
        assert asked.is_over()
    assert list(snapshots.read_snapshot(tmp_path / "snapshot")) == []


def test_calls_under_way_are_given_the_shortest_time_that_was_said(tmp_path):
    with Service() as running:
        begun, go_on = threading.Event(), threading.Event()

        def slow(*_, **__):
            begun.set()
            assert go_on.wait(20)
            raise AssertionError("nobody waits for it")

        running.scorer.match = slow
        answer = running.channel.unary_unary(OURS).future(ours(), timeout=60)
        assert begun.wait(20)
        running.server.stop(FOREVER)
        health = grpc.insecure_channel(f"127.0.0.1:{running.port}", options=[("grpc.use_local_subchannel_pool", 1)])
        with health:
            until(lambda: _is_away(health))
        assert not answer.done()
        running.server.stop(None)
        with pytest.raises(grpc.RpcError):
            answer.result()
        go_on.set()


def _is_away(channel):
    try:
        channel.unary_unary(HEALTH + "Check")(b"", timeout=20)
    except grpc.RpcError:
        return True
    return False
