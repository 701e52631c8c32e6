"""The network that misbehaves on demand, between plain sockets and around what is built on them."""

import contextlib
import os
import random
import select
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
import zmq

from kvevents.faults import Proxy
from kvevents.testing import Publisher

from .conftest import NEEDS_REDIS

SECONDS = 20
RESET_WHEN_CLOSED = struct.pack("ii", 1, 0)


class Line:
    """A target that takes connections, a proxy in front of it, and the sockets of both ends."""

    def __init__(self, **more):
        self.target = socket.create_server(("127.0.0.1", 0))
        self.target.settimeout(SECONDS)
        self.proxy = Proxy(*self.target.getsockname(), **more)
        self.sockets = [self.target]

    def client(self):
        client = socket.create_connection(("127.0.0.1", self.proxy.port), timeout=SECONDS)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sockets.append(client)
        return client

    def taken(self):
        server, _ = self.target.accept()
        server.settimeout(SECONDS)
        self.sockets.append(server)
        return server

    def pair(self):
        client = self.client()
        return client, self.taken()

    def close(self):
        self.proxy.close()
        for one in self.sockets:
            one.close()


@pytest.fixture
def line():
    line = Line()
    yield line
    line.close()


def until(true):
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        os.sched_yield()


def take(one, count):
    data = bytearray()
    while len(data) < count:
        chunk = one.recv(count - len(data))
        assert chunk, "it ended early"
        data += chunk
    return data


def is_silent(one):
    one.settimeout(0)
    try:
        one.recv(1)
    except BlockingIOError:
        return True
    finally:
        one.settimeout(SECONDS)
    return False


def is_reset(one):
    try:
        while one.recv(1000):
            pass
    except ConnectionResetError:
        return True
    return False


# ---- what goes through


def talk(line, rng, connections=1, count=2_000_000):
    """Send in both directions at once, in pieces of any size, and take it in pieces of any size."""

    def send(one, data, seed):
        rng, place = random.Random(seed), 0
        while place < len(data):
            size = rng.choice([1, 10, 1000, 100_000])
            one.sendall(data[place : place + size])
            place += size
        one.shutdown(socket.SHUT_WR)

    def hear(one, seed):
        rng, data = random.Random(seed), []
        while chunk := one.recv(rng.choice([100, 5000, 200_000])):
            data.append(chunk)
        return b"".join(data)

    pairs = [line.pair() for _ in range(connections)]
    with ThreadPoolExecutor(4 * connections) as threads:
        said, heard = [], []
        for pair in pairs:
            for sender, hearer in (pair, pair[::-1]):
                said.append(rng.randbytes(count))
                threads.submit(send, sender, said[-1], rng.random())
                heard.append(threads.submit(hear, hearer, rng.random()))
        yield heard
        assert [one.result(SECONDS) for one in heard] == said
    until(lambda: line.proxy.connections == 0)


@pytest.mark.parametrize("delay", [0.0, 0.03])
@pytest.mark.parametrize("connections", [1, 8])
def test_all_arrives_in_order(line, delay, connections):
    line.proxy.delay(delay)
    for _ in talk(line, random.Random(connections), connections, 2_000_000 // connections):
        pass


def test_all_arrives_in_order_while_it_changes_all_the_time():
    line, rng = Line(buffer_bytes=20_000), random.Random(3)
    for heard in talk(line, rng, 4, 300_000):
        while not all(one.done() for one in heard):
            line.proxy.delay(rng.choice([0.0, 0.0001, 0.01]))
            line.proxy.stall(rng.choice(["both", "there", "back"]))
            os.sched_yield()
            line.proxy.resume()
            rng.choice([line.proxy.refuse, line.proxy.accept, lambda: None])()
    line.close()


def test_one_side_may_end_before_the_other(line):
    client, server = line.pair()
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert take(server, 8) == b"question"
    assert server.recv(1) == b""
    server.sendall(b"answer")
    assert take(client, 6) == b"answer"
    server.close()
    assert client.recv(1) == b""
    until(lambda: line.proxy.connections == 0)


@pytest.mark.parametrize("side", [0, 1])
def test_a_reset_is_passed_on_after_what_was_said_before(line, side):
    pair = line.pair()
    one, other = pair[side], pair[1 - side]
    line.proxy.stall()
    one.sendall(b"last words")
    until(lambda: line.proxy.held == 10)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_WHEN_CLOSED)
    one.close()
    other.sendall(b"unheard")
    line.proxy.resume()
    assert is_reset(other)
    until(lambda: line.proxy.connections == 0)


def test_a_target_that_is_not_there(line):
    line.target.close()
    with contextlib.suppress(ConnectionResetError):  # it may be reset before it is known to be connected
        assert is_reset(line.client())
    until(lambda: line.proxy.connections == 0)


# ---- delay


def test_a_delay_is_added_in_each_direction(line):
    client, server = line.pair()
    line.proxy.delay(0.15)
    for _ in range(3):
        began = time.monotonic()
        client.sendall(b"ping")
        assert take(server, 4) == b"ping"
        there = time.monotonic()
        assert there - began >= 0.15
        server.sendall(b"pong")
        assert take(client, 4) == b"pong"
        assert time.monotonic() - there >= 0.15
    line.proxy.delay(0)


def test_many_that_are_late_are_late_together(line):
    """One after the other they would take longer than a test may."""
    client, server = line.pair()
    line.proxy.delay(1.0)
    began = time.monotonic()
    for number in range(500):
        client.sendall(b"%09d\n" % number)
        until(lambda: line.proxy.held)
    assert take(server, 5000) == b"".join(b"%09d\n" % number for number in range(500))
    assert time.monotonic() - began >= 1.0


def test_what_was_late_stays_before_what_follows(line):
    client, server = line.pair()
    line.proxy.delay(0.2)
    client.sendall(b"first ")
    until(lambda: line.proxy.held == 6)
    line.proxy.delay(0)
    client.sendall(b"second")
    assert take(server, 12) == b"first second"


# ---- stalls


def test_nothing_is_delivered_in_a_stall_and_all_of_it_afterwards(line):
    client, server = line.pair()
    line.proxy.stall()
    client.sendall(b"a" * 1000)
    server.sendall(b"b" * 500)
    until(lambda: line.proxy.held == 1500)
    client.sendall(b"c")
    client.shutdown(socket.SHUT_WR)
    until(lambda: line.proxy.held == 1501)
    assert is_silent(server)
    assert is_silent(client)
    assert line.proxy.connections == 1
    line.proxy.resume()
    assert take(server, 1001) == b"a" * 1000 + b"c"
    assert server.recv(1) == b""
    assert take(client, 500) == b"b" * 500
    assert line.proxy.held == 0


def test_a_client_that_gave_up_in_a_stall_is_heard_afterwards(line):
    client, server = line.pair()
    line.proxy.stall()
    client.sendall(b"late")
    client.close()
    other, server_of_other = line.pair()
    other.sendall(b"more")
    until(lambda: line.proxy.held == 8)
    assert is_silent(server)
    assert is_silent(server_of_other)
    line.proxy.resume()
    assert take(server, 4) == b"late"
    assert server.recv(1) == b""
    assert take(server_of_other, 4) == b"more"


@pytest.mark.parametrize("direction", ["there", "back"])
def test_one_direction_stalls_alone(line, direction):
    client, server = line.pair()
    line.proxy.stall(direction)
    still, flows = (client, server) if direction == "there" else (server, client)
    still.sendall(b"held")
    flows.sendall(b"free")
    assert take(still, 4) == b"free"
    until(lambda: line.proxy.held == 4)
    assert is_silent(flows)
    line.proxy.resume()
    assert take(flows, 4) == b"held"


def test_new_connections_may_overtake_those_that_stall(line):
    client, server = line.pair()
    line.proxy.stall(new_ones=False)
    client.sendall(b"old")
    until(lambda: line.proxy.held == 3)
    other, server_of_other = line.pair()
    other.sendall(b"new")
    assert take(server_of_other, 3) == b"new"
    server_of_other.sendall(b"answer")
    assert take(other, 6) == b"answer"
    assert is_silent(server)
    line.proxy.resume()
    assert take(server, 3) == b"old"


@pytest.mark.parametrize("size", [500, 50_000])
def test_who_sends_too_much_in_a_stall_has_to_wait(size):
    line = Line(buffer_bytes=100_000)
    client, server = line.pair()
    for one in (client, server):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
    line.proxy.stall()
    rng, sent = random.Random(4), bytearray()
    client.settimeout(0)
    while select.select([], [client], [], 0.5)[1]:
        sent += (data := rng.randbytes(size))[: client.send(data)]
        assert line.proxy.held < 100_000 + 65_536
        assert len(sent) < 50_000_000, "it takes everything"
    assert line.proxy.held
    line.proxy.resume()
    assert take(server, len(sent)) == sent
    line.close()


# ---- cuts


def test_a_cut_is_seen_by_both_sides(line):
    pairs = [line.pair() for _ in range(5)]
    unnoticed = line.client()  # it may be that nobody took it yet
    line.proxy.stall()
    for client, server in pairs:
        client.sendall(b"lost")
        server.sendall(b"lost too")
    until(lambda: line.proxy.held == 60)
    line.proxy.cut()
    assert (line.proxy.connections, line.proxy.held) == (0, 0)
    line.proxy.resume()
    for one in [end for pair in pairs for end in pair] + [unnoticed]:
        with pytest.raises(ConnectionResetError):
            one.recv(1)
    line.target.settimeout(0)
    while True:  # that of the unnoticed one, if it came so far
        try:
            line.target.accept()[0].close()
        except BlockingIOError:
            break
    line.target.settimeout(SECONDS)
    client, server = line.pair()
    client.sendall(b"again")
    assert take(server, 5) == b"again"


def test_cuts_at_any_moment_end_what_is_there_and_nothing_else(line):
    stop = threading.Event()

    def cut():
        while not stop.is_set():
            line.proxy.cut()

    thread = threading.Thread(target=cut)
    thread.start()
    ended = 0
    for _ in range(200):
        try:
            client = line.client()
            client.sendall(b"x" * 100_000)
            while client.recv(1000):
                pass
        except OSError:
            ended += 1
    stop.set()
    thread.join()
    assert ended == 200
    until(lambda: line.proxy.connections == 0)


# ---- refusals


def test_new_connections_are_refused_and_old_ones_go_on(line):
    client, server = line.pair()
    for _ in range(3):
        line.proxy.refuse()
        line.proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            line.client()
        client.sendall(b"still")
        assert take(server, 5) == b"still"
        line.proxy.accept()
        line.proxy.accept()
        other, server_of_other = line.pair()
        other.sendall(b"here")
        assert take(server_of_other, 4) == b"here"
    line.proxy.refuse()
    line.proxy.cut()
    with pytest.raises(ConnectionRefusedError):
        line.client()


# ---- the proxy itself


def test_closing_ends_everything(line):
    client, server = line.pair()
    port = line.proxy.port
    assert (
        repr(line.proxy) == f"Proxy(tcp://127.0.0.1:{port} to 127.0.0.1:{line.target.getsockname()[1]}, 1 connections)"
    )
    with line.proxy as proxy:
        assert proxy.endpoint == f"tcp://127.0.0.1:{port}"
    assert is_reset(client)
    assert is_reset(server)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert not line.proxy._thread.is_alive()
    assert line.proxy.connections == 0
    line.proxy.close()
    for method in (line.proxy.cut, line.proxy.accept, line.proxy.refuse, line.proxy.stall, line.proxy.resume):
        with pytest.raises(RuntimeError, match="closed"):
            method()


def test_it_carries_events():
    context, publisher = zmq.Context(), Publisher("tcp://127.0.0.1:0")
    heard = context.socket(zmq.SUB)
    heard.linger, heard.rcvtimeo, heard.reconnect_ivl = 0, SECONDS * 1000, 10
    heard.subscribe(b"")
    with publisher, Proxy("127.0.0.1", int(publisher.endpoint.rpartition(":")[2])) as proxy:
        heard.connect(proxy.endpoint)
        for _ in range(3):
            # it subscribes anew only while somebody looks for messages
            until(lambda: heard.poll(1) or publisher.subscribers)
            publisher.publish([])
            assert int.from_bytes(heard.recv_multipart()[1], "big") == publisher.last_seq
            proxy.cut()
            until(lambda: not publisher.subscribers)
            publisher.publish([])  # nobody hears it
        heard.close()
    context.term()


@NEEDS_REDIS
def test_it_carries_commands(redis_server):
    with Proxy("127.0.0.1", redis_server.port) as proxy:
        client = redis.Redis(port=proxy.port, socket_timeout=SECONDS)
        proxy.delay(0.01)
        for number in range(20):
            assert client.echo(b"%d" % number) == b"%d" % number
            if number % 5 == 0:
                proxy.cut()
        client.close()
