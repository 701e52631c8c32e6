"""Connections before they carry HTTP: how many there may be, and how long they may greet."""

import asyncio
import contextlib
import errno
import resource
import signal
import socket
import ssl

import httpx
import pytest
from structlog.testing import capture_logs

from kvindex import arriving
from kvindex.access import Access
from kvindex.arriving import Arrivals
from kvindex.gate import Gate
from kvindex.serve import make_room

from .conftest import until
from .serving import service
from .test_access import Certificates

GET = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"
FOREVER = 600


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


class Visitors:
    """Connections to a service, which say nothing until they are told to."""

    def __init__(self, served, context, stack):
        self._served, self._context, self._stack = served, context, stack

    def comes(self):
        return self._stack.enter_context(socket.create_connection(self._served.address, timeout=20))

    def greets(self, connection):
        if self._context is None:
            return connection
        return self._stack.enter_context(self._context.wrap_socket(connection, server_hostname="127.0.0.1"))

    def counted(self, name):
        """What a metric says, asked for by a connection of its own; None where there is no place for one."""
        try:
            lines = httpx.get(f"{self._served.url}/metrics", verify=self._context or True).text.splitlines()
        except httpx.TransportError:
            return None
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


@contextlib.contextmanager
def visiting(folder, certificates=None, **settings):
    if certificates is not None:
        settings |= {"tls_cert": certificates.cert, "tls_key": certificates.key}
    with service(folder, **settings) as served, contextlib.ExitStack() as stack:
        yield served, Visitors(served, certificates and certificates.context(), stack)


def is_over(connection):
    try:
        return connection.recv(100) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_more_connections_than_there_may_be_end_at_once_and_are_counted(tmp_path, certificates, tls):
    with visiting(tmp_path, certificates if tls else None, http_max_connections=3) as (_, visitors):
        silent = [visitors.comes() for _ in range(5)]
        assert all(map(is_over, silent[3:]))
        spoken = visitors.greets(silent[0])
        spoken.sendall(GET)
        assert spoken.recv(100).startswith(b"HTTP/1.1 200")
        silent[1].close()
        assert until(lambda: visitors.counted("kvindex_http_turned_away_total")) >= 2


def test_a_handshake_that_does_not_come_ends_with_its_connection(tmp_path, certificates):
    with visiting(tmp_path, certificates, http_read_timeout_s=0.3) as (_, visitors):
        assert visitors.counted("kvindex_http_late_total") == 0
        assert is_over(visitors.comes())
        assert until(lambda: visitors.counted("kvindex_http_late_total")) == 1


def test_who_does_not_speak_tls_is_not_logged(tmp_path, certificates):
    with visiting(tmp_path, certificates) as (served, visitors):
        connection = visitors.comes()
        connection.sendall(GET)
        while not is_over(connection):  # an alert may come first
            pass
        stranger = visitors.comes()
        with pytest.raises(ssl.SSLError):
            ssl.create_default_context().wrap_socket(stranger, server_hostname="127.0.0.1")
        assert visitors.counted("kvindex_http_late_total") == 0
        assert "Traceback" not in served.log.read_text()


def test_those_who_are_greeting_are_not_waited_for_at_the_end(tmp_path, certificates):
    settings = {"http_shutdown_timeout_s": FOREVER, "http_read_timeout_s": FOREVER}
    with visiting(tmp_path, certificates, **settings) as (served, visitors):
        silent = visitors.comes()
        asked = visitors.greets(visitors.comes())  # after it
        asked.sendall(b"POST /v1/score HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
        assert asked.recv(100).startswith(b"HTTP/1.1 100")
        served.process.send_signal(signal.SIGTERM)
        assert is_over(silent)
        assert served.process.poll() is None
        asked.sendall(b"{}")
        assert asked.recv(100).startswith(b"HTTP/1.1 400")
        asked.close()
        assert served.process.wait(30) == 0, served.log.read_text()
        assert "Traceback" not in served.log.read_text()


def test_what_is_wrong_with_one_connection_and_too_many_open_files_end_nothing(monkeypatch):
    monkeypatch.setattr(arriving, "_NO_FILES_S", 0.0)
    failed, answers = (
        [],
        [OSError(errno.EMFILE, "too many"), ConnectionAbortedError(), OSError(errno.ENFILE, "too many")],
    )

    async def main():
        loop, begun = asyncio.get_running_loop(), asyncio.Event()
        take = loop.sock_accept

        async def sock_accept(listener):
            if answers:
                raise answers.pop()
            return await take(listener)

        monkeypatch.setattr(loop, "sock_accept", sock_accept)

        class Spoken(asyncio.Protocol):
            def connection_made(self, transport):
                begun.set()
                transport.close()

        def protocol():
            if not failed:
                failed.append("once")
                raise ValueError("a mistake of ours")
            return Spoken()

        gate = Gate(Access(), max_under_way=1, max_bytes_under_way=1)
        arrivals = Arrivals(protocol, (), gate, max_connections=1, greet_s=1.0, tls=None)
        with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
            arrivals.start(listener)
            for _ in range(2):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                await loop.sock_connect(client, listener.getsockname())
            await asyncio.wait_for(begun.wait(), 20)
            await arrivals.close()

    asyncio.run(main())
    assert (answers, failed) == ([], ["once"])


def test_a_limit_of_open_files_that_connections_could_use_up_is_said(monkeypatch):
    limits = [1_024, 8_192]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: limits.__setitem__(slice(None), given))
    with capture_logs() as said:
        make_room(4_096)
        assert (said, limits) == ([], [8_192, 8_192])
        make_room(4_097)
        limits[:] = [resource.RLIM_INFINITY] * 2
        make_room(4_097)
    assert [(line["event"], line["limit"], line["connections"]) for line in said] == [("few_open_files", 8_192, 4_097)]
