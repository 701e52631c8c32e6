"""The publisher for tests, over real sockets."""

import threading

import msgspec
import pytest
import zmq

from kvevents import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch
from kvevents.testing import DIALECTS, Publisher, cleared, removed, stored

LOCAL = "tcp://127.0.0.1:0"
WAIT_MS = 5_000


@pytest.fixture
def open_socket():
    context, sockets = zmq.Context(), []

    def open_socket(kind, endpoint=None):
        socket = context.socket(kind)
        sockets.append(socket)
        socket.linger = 0
        socket.rcvtimeo = WAIT_MS
        if kind == zmq.SUB:
            socket.subscribe(b"")
        if endpoint is not None:
            socket.connect(endpoint)
        return socket

    yield open_socket
    for socket in sockets:
        socket.close(0)
    context.term()


def ask(socket, start):
    """Send a replay request; give the frames of all replies."""
    socket.send_multipart([b"", start.to_bytes(8, "big")])
    replies = []
    while not replies or replies[-1][-1] != b"":
        replies.append(socket.recv_multipart())
    return replies


def test_live_frames_are_topic_number_and_batch(open_socket):
    with Publisher(LOCAL, topic=b"kv@pod-a@m", rank=3) as publisher:
        sub = open_socket(zmq.SUB, publisher.endpoint)
        publisher.wait_for_subscribers(1)
        assert publisher.last_seq == -1
        assert [publisher.publish([cleared("vllm-map")]), publisher.publish([])] == [0, 1]
        topic, seq, payload = sub.recv_multipart()
        assert (topic, seq) == (b"kv@pod-a@m", bytes(8))
        ts, events, rank = msgspec.msgpack.decode(payload)
        assert isinstance(ts, float)
        assert (events, rank) == ([{"type": "AllBlocksCleared"}], 3)
        assert sub.recv_multipart()[1] == (1).to_bytes(8, "big")
        assert publisher.last_seq == 1


def test_a_batch_without_a_rank_has_two_fields(open_socket):
    with Publisher(LOCAL, rank=None) as publisher:
        sub = open_socket(zmq.SUB, publisher.endpoint)
        publisher.wait_for_subscribers(1)
        publisher.publish([])
        assert len(msgspec.msgpack.decode(sub.recv_multipart()[2])) == 2


def test_equal_subscriptions_are_counted_and_leavers_are_taken_off(open_socket):
    with Publisher(LOCAL) as publisher:
        subs = [open_socket(zmq.SUB, publisher.endpoint) for _ in range(3)]
        publisher.wait_for_subscribers(3)
        assert publisher.subscribers == 3
        with pytest.raises(TimeoutError, match="3 of 4"):
            publisher.wait_for_subscribers(4, timeout=0.05)
        subs[0].close(0)
        done = threading.Event()
        for _ in range(500):
            if publisher.subscribers == 2:
                break
            done.wait(0.01)
        assert publisher.subscribers == 2


@pytest.mark.parametrize(("framing", "frames"), [("new", 4), ("old", 3)])
def test_replay_gives_what_was_sent_from_a_number_on(open_socket, framing, frames):
    with Publisher(LOCAL, replay=LOCAL, topic=b"t", framing=framing) as publisher:
        sub = open_socket(zmq.SUB, publisher.endpoint)
        publisher.wait_for_subscribers(1)
        for number in range(5):
            publisher.publish([removed("vllm-map", [number])], lost=number == 3)
        live = {int.from_bytes(seq, "big"): payload for _, seq, payload in (sub.recv_multipart() for _ in range(4))}
        assert sorted(live) == [0, 1, 2, 4]
        replies = ask(open_socket(zmq.DEALER, publisher.replay), 2)
        assert all(len(reply) == frames for reply in replies)
        assert [int.from_bytes(reply[-2], "big") for reply in replies] == [2, 3, 4, 2**64 - 1]
        assert all(reply[-1] == live[seq] for reply, seq in ((replies[0], 2), (replies[2], 4)))
        if framing == "new":
            assert [reply[1] for reply in replies] == [b"t", b"t", b"t", b""]


def test_replay_forgets_what_does_not_fit_and_stays_silent_on_nonsense(open_socket):
    with Publisher(LOCAL, replay=LOCAL, buffer_steps=2) as publisher:
        for _ in range(5):
            publisher.publish([])
        dealer = open_socket(zmq.DEALER, publisher.replay)
        dealer.send_multipart([b"only one frame"])
        dealer.send_multipart([b"", b"short"])
        assert [int.from_bytes(reply[-2], "big") for reply in ask(dealer, 0)] == [3, 4, 2**64 - 1]


def test_a_restart_begins_at_number_0_with_nothing_to_replay(open_socket):
    with Publisher(LOCAL, replay=LOCAL) as publisher:
        endpoints = (publisher.endpoint, publisher.replay)
        sub = open_socket(zmq.SUB, publisher.endpoint)
        publisher.wait_for_subscribers(1)
        for _ in range(3):
            publisher.publish([])
            sub.recv_multipart()
        publisher.restart()
        assert (publisher.endpoint, publisher.replay) == endpoints
        assert ask(open_socket(zmq.DEALER, publisher.replay), 0)[0][-1] == b""
        # libzmq subscribes again only when the application touches the socket
        poll_until(sub, lambda: publisher.subscribers == 1)
        assert publisher.publish([]) == 0
        assert sub.recv_multipart()[1] == bytes(8)


def poll_until(socket, condition):
    for _ in range(500):
        if condition():
            return
        socket.poll(10)
    pytest.fail("the condition did not become true")


def test_connects_to_a_subscriber_that_binds(open_socket):
    sub = open_socket(zmq.SUB)
    sub.bind(LOCAL)
    with Publisher(sub.get_string(zmq.LAST_ENDPOINT), connect=True) as publisher:
        # a socket that binds takes new peers in only when the application touches it
        poll_until(sub, lambda: publisher.subscribers == 1)
        publisher.publish([])
        assert sub.recv_multipart()[1] == bytes(8)


def test_replay_and_publishing_go_on_from_several_threads(open_socket):
    with Publisher(LOCAL, replay=LOCAL) as publisher:
        sub = open_socket(zmq.SUB, publisher.endpoint)
        publisher.wait_for_subscribers(1)
        threads = [threading.Thread(target=lambda: [publisher.publish([]) for _ in range(200)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        dealer = open_socket(zmq.DEALER, publisher.replay)
        for _ in range(5):
            numbers = [int.from_bytes(reply[-2], "big") for reply in ask(dealer, 0)][:-1]
            assert numbers == list(range(len(numbers)))
        for thread in threads:
            thread.join()
        assert [int.from_bytes(sub.recv_multipart()[1], "big") for _ in range(800)] == list(range(800))


def test_close_may_be_called_twice_and_ends_publishing():
    publisher = Publisher(LOCAL, replay=LOCAL)
    publisher.close()
    publisher.close()
    with pytest.raises(RuntimeError, match="closed"):
        publisher.publish([])
    with pytest.raises(zmq.ZMQError):
        Publisher("tcp://127.0.0.1:not-a-port")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_decodes_to_the_same_events(dialect):
    high = 2**63 + 5
    events = [
        removed(dialect, [7]),
        stored(dialect, [high, 2], None, range(8), 4),
        stored(dialect, [3], high, range(4), 4),
        cleared(dialect),
    ]
    batch = decode_batch(msgspec.msgpack.encode([1.0, events, 0]))
    assert not batch.discards
    gone, first, second, clear = batch.events
    assert isinstance(gone, BlockRemoved)
    assert gone.block_hashes == [7]
    assert isinstance(first, BlockStored)
    assert (first.block_hashes, list(first.token_ids), first.block_size) == ([high, 2], list(range(8)), 4)
    assert (first.medium, first.extras, first.cache_salt) == ("gpu", None, None)
    assert second.parent_block_hash == high
    assert isinstance(clear, AllBlocksCleared)


@pytest.mark.parametrize("dialect", ["vllm-map", "vllm-array", "sglang"])
def test_adapter_and_salt_are_carried_where_the_dialect_can(dialect):
    events = [
        stored(dialect, [1, 2], None, range(8), 4, lora_name="ad", cache_salt="s"),
        stored(dialect, [3], 2, range(4), 4, lora_name="ad", cache_salt="s"),
    ]
    first, second = decode_batch(msgspec.msgpack.encode([1.0, events, 0])).events
    assert (first.lora, first.cache_salt, first.extras) == ("ad", "s", None)
    assert (second.lora, second.cache_salt, second.extras) == ("ad", None, None)


def test_sglang_names_are_signed():
    assert stored("sglang", [2**64 - 1, 1], None, range(8), 4)["block_hashes"] == [-1, 1]
