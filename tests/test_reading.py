"""What of a request is read, and for how long."""

import contextlib
import socket

import httpx
import pytest

from .conftest import until
from .serving import service

HEAD = b"POST /v1/score HTTP/1.1\r\nhost: a\r\n"
QUESTION = b'{"model":"m","token_ids":[1]}'
WHOLE = HEAD + b"content-length: %d\r\n\r\n%s" % (len(QUESTION), QUESTION)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    with service(folder, http_read_timeout_s=0.3, http_max_body_bytes=65_536, http_max_under_way=1) as served:
        yield served


def said(served, *parts):
    """What is answered until the connection ends."""
    with socket.create_connection(served.address, timeout=20) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
            while more := connection.recv(65_536):
                answer += more
        return answer


def late(served):
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("kvindex_http_late_total")))


@pytest.mark.parametrize(
    "part",
    [b"", HEAD, HEAD + b"content-length: 100\r\n\r\n{", HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{"],
    ids=["nothing", "half a head", "half a body", "half a chunk"],
)
def test_a_request_that_does_not_come_ends_with_its_connection(served, part):
    before = late(served)
    assert said(served, part) == b""
    assert late(served) == before + 1
    # its place is free again, and nobody is told of a mistake of ours
    until(lambda: httpx.post(f"{served.url}/v1/score", content=QUESTION).status_code == 200)
    assert not served.events("request_failed")


def test_half_a_head_after_an_answer_ends_with_its_connection(served):
    before = late(served)
    with socket.create_connection(served.address, timeout=20) as connection:
        connection.sendall(WHOLE)
        answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 200")
        while not answer.endswith(b"}"):
            answer = connection.recv(65_536)
        connection.sendall(HEAD)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(65_536) == b""
    assert late(served) == before + 1


def test_endless_heads_are_refused(served):
    for start, more in ((b"GET /", b"a" * 4096), (HEAD, b"a: b\r\n" * 512), (HEAD + b"a: ", b"a" * 4096)):
        # a part at a time: what comes at once is read at once
        with socket.create_connection(served.address, timeout=20) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(start)
            for _ in range(10_000):
                connection.sendall(more)
            pytest.fail("40 MB of head were taken")
    answer = said(served, HEAD + b"a: " + b"a" * 70_000, b"a" * 70_000)
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")) or not answer


def test_what_comes_after_a_body_is_bounded_too(served):
    with socket.create_connection(served.address, timeout=20) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\na: ")
        for _ in range(10_000):
            connection.sendall(b"a" * 4096)
        pytest.fail("40 MB of trailers were taken")


def test_many_requests_on_one_connection_are_no_long_head(served):
    with socket.create_connection(served.address, timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2000):
            connection.sendall(WHOLE[:10])
            connection.sendall(WHOLE[10:])
            answer = connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200")
            while not answer.endswith(b"}"):
                answer = connection.recv(65_536)


def test_a_client_that_goes_is_no_mistake_of_ours(served):
    with socket.create_connection(served.address) as connection:
        connection.sendall(HEAD + b"content-length: 100\r\n\r\n{")
    until(lambda: httpx.post(f"{served.url}/v1/score", content=QUESTION).status_code == 200)
    assert not served.events("request_failed")


def test_what_is_no_http_is_refused_and_not_logged(served):
    assert said(served, b"\x16\x03\x01\x02\x00\xff\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert b"Invalid HTTP" not in served.log.read_bytes()
