"""The pool over real sockets and without."""

import errno
import threading
from types import SimpleNamespace

import msgspec
import pytest
import zmq

from indexer import Limits, Prompt, Source, open_index
from kvevents import EventPool, Message, PoolClosed, SubscriptionError
from kvevents import pool as pool_module
from kvevents.message import Note, Publisher
from kvevents.queue import ShardQueue
from kvevents.trust import FAILED
from scorer import PrefixScorer

from .conftest import blocks_in, payload, until

TOPIC = b"kv@pod-a@m"
STORED = ["BlockStored", [1], None, [1, 2, 3, 4], 4, None]


def message(seq, *events, topic=TOPIC, rank=0, **more):
    return Message(topic, seq, payload(*events, rank=rank), **more)


@pytest.fixture
def index(open_new):
    return open_new()


@pytest.fixture
def pool(index):
    with EventPool(index, workers=3) as opened:
        yield opened


def trust(index, pod="pod-a", rank=0):
    return next(status.degraded for status in index.sources() if status.source == (pod, rank))


def blocks(index, tokens=(1, 2, 3, 4), model="m"):
    return {str(h.source): h.tokens // 4 for h in index.match(Prompt(list(tokens), model))}


def test_submitted_messages_are_applied_in_order(index, pool):
    for seq in range(200):
        pool.submit(message(seq, STORED, ["BlockRemoved", [1]]) if seq % 2 else message(seq, STORED))
    pool.drain()
    assert blocks(index) == {"pod-a": 1}
    assert index.stats()["copies_total"] == 199
    assert pool.sequences() == {Source("pod-a"): 199}


def test_ranks_of_one_topic_are_numbered_apart(index, pool):
    for seq in range(3):
        for rank in (0, 1):
            pool.submit(message(seq, ["BlockStored", [seq], None, [1, 2, 3, 4], 4, None], rank=rank))
    pool.drain()
    assert blocks(index) == {"pod-a": 1, "pod-a#1": 1}
    assert pool.stats()["restarts_total"] == pool.stats()["gaps_total"] == 0


def test_a_gap_degrades_until_a_reset(index, pool):
    pool.submit(message(0, STORED))
    pool.drain()
    assert trust(index) == ""
    pool.submit(message(5, STORED))
    pool.drain()
    assert trust(index).startswith("gap")
    assert pool.stats()["missing_total"] == 4
    pool.submit(message(6, ["AllBlocksCleared"]))
    pool.drain()
    assert trust(index) == ""
    assert blocks(index) == {"pod-a": 0}


@pytest.mark.parametrize(("seq", "degraded"), [(0, False), (3, True)])
def test_numbers_that_go_back_start_anew(index, pool, seq, degraded):
    pool.submit(message(9, STORED))
    pool.submit(message(seq))
    pool.drain()
    assert blocks(index) == {"pod-a": 0}
    assert bool(trust(index)) is degraded
    assert pool.stats()["restarts_total"] == 1


def test_a_late_start_is_degraded(index, pool):
    pool.submit(message(7, STORED))
    pool.drain()
    (match,) = PrefixScorer(index).match([1, 2, 3, 4], model="m")
    assert (match.trust, match.blocks) == ("degraded", 1)


def test_bad_messages_are_counted_and_cost_nothing_else(index, pool):
    pool.submit(message(0, STORED))
    pool.submit(Message(TOPIC, 1, b"\xc1"))
    pool.submit(message(0, STORED, topic=b""))
    pool.submit(message(2, STORED, ["Unknown"], 7))
    pool.drain()
    stats = pool.stats()
    assert stats["dropped_bad_msgpack_total"] == stats["dropped_no_identity_total"] == 1
    assert stats["dropped_event_unknown_event_total"] == stats["dropped_event_bad_event_total"] == 1
    assert stats["worker_errors_total"] == 0
    assert blocks(index) == {"pod-a": 1}


def test_events_that_could_not_be_used_degrade_until_a_reset(index, pool):
    def said(*events):
        pool.submit(message(next(numbers), *events))
        pool.drain()
        return trust(index)

    numbers = iter(range(99))
    assert said(STORED, ["Unknown"]) == ""
    assert said(["BlockRemoved", ["no hash"]]).startswith("unread")
    assert said(["BlockRemoved", [1]]).startswith("unread")
    assert said(["AllBlocksCleared"]) == ""
    assert said(["AllBlocksCleared"], 7).startswith("unread")  # who knows which came first
    numbers = iter(range(99))
    assert said(STORED) == ""
    assert blocks(index) == {"pod-a": 1}


@pytest.mark.parametrize(("size", "count", "takes"), [(10, 130, [64, 64, 2]), (700_000, 3, [2, 1])])
def test_a_worker_takes_so_many_messages_or_bytes_at_once(size, count, takes):
    queue = ShardQueue(1000, 1 << 30)
    for seq in range(count):
        queue.put(Publisher("a", ""), Message(b"", seq, bytes(size)))
    assert [len(queue.take(0)[1]) for _ in takes] == takes
    assert (queue.messages, queue.bytes, queue.take(0)) == (0, 0, None)


def test_a_panic_costs_one_source_its_trust_and_nothing_else(index, pool, monkeypatch):
    class Panic(BaseException):
        """As the core's, which is no `Exception`."""

    def panic(self, source, batches, **more):
        if len(batches[0]) == 2:
            raise Panic
        return apply_all(self, source, batches, **more)

    def panic_reading(source, payloads, first_seq):
        if message(1, STORED, STORED).payload in payloads:
            raise Panic
        return decoder.apply_payloads(source, payloads, first_seq)

    apply_all, decoder = type(index).apply_all, index.decoder
    monkeypatch.setattr(type(index), "apply_all", panic)
    if decoder is not None:
        reading = SimpleNamespace(apply_payloads=panic_reading, decode_batches=decoder.decode_batches)
        monkeypatch.setattr(type(index), "decoder", reading)
    pool.submit(message(0, STORED))
    pool.submit(message(0, STORED, topic=b"kv@pod-b@m"))
    pool.drain()
    pool.submit(message(1, STORED, STORED))
    pool.submit(message(1, STORED, topic=b"kv@pod-b@m"))
    pool.drain()
    assert pool.stats()["worker_errors_total"] == 1
    assert (trust(index), trust(index, "pod-b")) == (FAILED, "")
    assert blocks(index) == {"pod-a": 1, "pod-b": 1}


def send(socket, seq, *events, topic=TOPIC):
    socket.send_multipart([topic, seq.to_bytes(8, "big"), payload(*events)])


def await_subscription(socket):
    assert socket.poll(10_000)
    assert socket.recv()[:1] == b"\x01"


@pytest.fixture
def context():
    with zmq.Context() as opened:
        yield opened
        opened.destroy(0)


def wait_for(pool, count):
    reached = threading.Event()
    for _ in range(1000):
        if pool.stats().get("received_total", 0) >= count:
            pool.drain()
            return
        reached.wait(0.01)
    pytest.fail(f"{count} messages never came: {pool.stats()}")


def test_connecting_to_a_publisher(index, pool, context):
    with context.socket(zmq.XPUB) as publisher:
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        pool.subscribe("10.0.0.7:8000", f"tcp://127.0.0.1:{port}", model="m")
        assert trust(index, "10.0.0.7:8000").startswith("no events yet")
        await_subscription(publisher)
        send(publisher, 0, STORED, topic=b"any text")
        publisher.send_multipart([b"", b"short", b""])
        publisher.send_multipart([b"", b"x" * 8])
        send(publisher, 1, STORED, topic=b"x" * 1025)
        send(publisher, 1, ["BlockStored", [2], 1, [5, 6, 7, 8], 4, None])
        wait_for(pool, 5)
        assert blocks(index, range(1, 9)) == {"10.0.0.7:8000": 2}
        assert trust(index, "10.0.0.7:8000") == ""
        assert pool.stats()["dropped_bad_frames_total"] == 3
        assert pool.connected() == {"10.0.0.7:8000": True}
        pool.unsubscribe("10.0.0.7:8000")
        assert blocks(index) == {}
        assert blocks_in(index) == 0


def test_what_is_on_its_way_does_not_bring_an_unsubscribed_pod_back(index, pool):
    endpoint = "tcp://127.0.0.1:9"
    pool.subscribe("pod-a", endpoint, model="m")
    late = message(0, STORED, pod="pod-a", model="m", endpoint=endpoint)
    pool.submit(late)
    pool.drain()
    assert blocks(index) == {"pod-a": 1}
    pool.unsubscribe("pod-a")
    pool.submit(late)
    pool.drain()
    assert blocks(index) == {}


def test_the_pools_way_to_count_copies_holds_for_subscribed_pods(index):
    with EventPool(index, copies="set") as pool:
        pool.subscribe("pod-a", "tcp://127.0.0.1:9", model="m")
        pool.submit(message(0, STORED, STORED, ["BlockRemoved", [1]], pod="pod-a", endpoint="tcp://127.0.0.1:9"))
        pool.drain()
    assert blocks(index) == {"pod-a": 0}


def test_shared_storage_that_is_subscribed_by_name_counts_for_every_pod(index, pool):
    pool.subscribe("SHARED_STORAGE", "tcp://127.0.0.1:9", model="m")
    pool.submit(message(0, STORED))
    pool.submit(message(0, topic=b"kv@pod-b@m"))
    packed = msgspec.msgpack.encode(["BlockStored", [1], 0, [], 0, None, "SHARED_STORAGE"])
    pool.drain()
    pool.submit(message(1, packed, pod="SHARED_STORAGE", endpoint="tcp://127.0.0.1:9"))
    pool.drain()
    assert blocks(index) == {"pod-a": 1, "pod-b": 1}
    assert trust(index, "SHARED_STORAGE") == ""


def test_binding_for_publishers_that_connect(index, pool, context):
    endpoint = pool.bind("tcp://127.0.0.1:0", topic="kv@")
    for pod in (b"a", b"b"):
        with context.socket(zmq.XPUB) as publisher:
            publisher.connect(endpoint)
            await_subscription(publisher)
            send(publisher, 0, STORED, topic=b"kv@%b@m" % pod)
            wait_for(pool, 1 if pod == b"a" else 2)
    assert blocks(index) == {"a": 1, "b": 1}


def test_endpoints_that_cannot_be_used_are_refused(pool):
    with pytest.raises(SubscriptionError, match="nonsense"):
        pool.subscribe("pod", "nonsense")
    with pytest.raises(SubscriptionError, match="nonsense"):
        pool.bind("nonsense://x")
    pool.subscribe("pod", "tcp://127.0.0.1:9")
    with pytest.raises(SubscriptionError, match="already"):
        pool.subscribe("pod", "tcp://127.0.0.1:9")


def test_more_pods_than_an_index_follows_are_refused_by_name(open_new):
    index = open_new(Limits(max_sources=1))
    with EventPool(index) as pool:
        pool.subscribe("pod-a", "tcp://127.0.0.1:9", model="m")
        for _ in range(2):  # nothing is left of the first try
            with pytest.raises(SubscriptionError, match=r"pod-b.*max_sources"):
                pool.subscribe("pod-b", "tcp://127.0.0.1:9", model="m")
        assert pool.connected() == {"pod-a": False}
        pool.unsubscribe("pod-a")
        pool.subscribe("pod-b", "tcp://127.0.0.1:9", model="m")
        assert [status.source.pod for status in index.sources()] == ["pod-b"]


def test_a_closed_pool_says_so(index):
    pool = EventPool(index)
    with pytest.raises(PoolClosed):
        pool.submit(message(0))
    pool.start()
    pool.start()
    pool.close()
    pool.close()
    with pytest.raises(PoolClosed):
        pool.submit(message(0))


def test_a_full_queue_drops_the_busiest_publisher_and_counts(index):
    queue = ShardQueue(10, 1000)
    for seq in range(20):
        queue.put_all([(Publisher("noisy", ""), message(seq))])
    queue.put_all([(Publisher("quiet", ""), message(0))])
    assert (queue.messages, queue.dropped) == (10, 11)
    (first, sent), (second, other) = queue.take(0), queue.take(0)
    assert (first.pod, [m.seq for m in sent]) == ("noisy", list(range(11, 20)))
    assert (second.pod, [m.seq for m in other]) == ("quiet", [0])
    assert (queue.messages, queue.bytes) == (0, 0)


def test_what_was_dropped_or_discarded_leaves_nothing_behind():
    queue = ShardQueue(1, 1000)
    for pod in "abc":
        queue.put_all([(Publisher(pod, ""), message(0))])
    mark = queue.mark()
    queue.discard("c")
    assert (queue.messages, queue.bytes, queue.dropped, queue.take(0)) == (0, 0, 2, None)
    assert queue.join(mark, 0)
    queue.put_all([(Publisher("a", ""), message(7))])
    assert [m.seq for m in queue.take(0)[1]] == [7]


def test_publishers_take_turns():
    queue = ShardQueue(1000, 100_000)
    for seq in range(100):
        queue.put_all([(Publisher("noisy", ""), message(seq))])
    queue.put_all([(Publisher("quiet", ""), message(7))])
    taken = [queue.take(0) for _ in range(3)]
    assert [publisher.pod for publisher, _ in taken] == ["noisy", "quiet", "noisy"]
    assert [m.seq for m in taken[1][1]] == [7]
    assert [m.seq for m in taken[0][1] + taken[2][1]] == list(range(100))


def test_waiting_for_what_was_put_does_not_wait_for_what_comes_after():
    queue = ShardQueue(1000, 100_000)
    queue.put_all([(Publisher("a", ""), message(0))])
    queue.put_all([(Publisher("b", ""), message(0))])
    mark = queue.mark()
    assert not queue.join(mark, 0)
    queue.take(0)
    assert not queue.join(mark, 0)  # taken, not applied
    queue.put_all([(Publisher("a", ""), message(1))])
    queue.done()
    assert not queue.join(mark, 0)  # b still waits
    queue.take(0)
    queue.done()
    assert queue.join(mark, 0)
    assert queue.messages == 1


def test_the_library_calls_of_the_readme(index):
    with EventPool(index, workers=4) as pool:
        pool.submit(
            Message(topic=b"kv@pod-a@Qwen/Qwen3-8B", seq=0, payload=msgspec.msgpack.encode([1.0, [
                ["BlockStored", [1, 2], None, list(range(32)), 16, None]], 0]))
        )  # fmt: skip
        pool.drain(timeout=5.0)
        scorer = PrefixScorer(index, block_size=16, tier_weights={"gpu": 1.0, "cpu": 0.8})
        assert scorer.score(list(range(40)), model="Qwen/Qwen3-8B", pods=None) == {"pod-a": 2.0}
        (match,) = scorer.match(list(range(32)), model="Qwen/Qwen3-8B")
        assert (match.blocks, match.tokens, match.reusable_tokens, match.tiers) == (2, 32, 16, {"gpu": 2})
        pool.unsubscribe("pod-a")
        assert scorer.score(list(range(40)), model="Qwen/Qwen3-8B") == {}


def test_live_messages_make_room_before_what_was_asked_for_and_notes_never_do():
    queue, publisher = ShardQueue(4, 1 << 20), Publisher("a", "")
    come = [
        message(7, STORED, replay=1),
        message(0, note=Note.CONNECTED),
        message(8, STORED, replay=1),
        *(message(seq, STORED) for seq in (20, 21, 22)),
    ]
    for one in come:
        queue.put_all([(publisher, one)])
    publisher, taken = queue.take(0)
    assert taken == [come[0], come[1], come[2], come[5]]
    assert queue.dropped == 2
    assert queue.messages == queue.bytes == 0


def test_it_is_counted_what_each_source_said_and_lacks(index):
    with EventPool(index, model="m") as pool:
        for seq in (0, 1, 5, 6, 9):
            pool.submit(message(seq, STORED))
        pool.submit(message(0, STORED, rank=1))
        pool.drain()
        heard = pool.heard()
        assert {source: (last.messages, last.gaps) for source, last in heard.items()} == {
            Source("pod-a"): (5, 2),
            Source("pod-a", 1): (1, 0),
        }
        pool.unsubscribe("pod-a")
        assert pool.heard() == {}


def test_as_many_pods_are_followed_as_the_files_allow(index, monkeypatch):
    with EventPool(index) as pool:
        for number in range(400):  # libzmq's own limit is reached at 340
            pool.subscribe(f"pod-{number}", f"ipc:///nowhere/{number}")
        monkeypatch.setattr(zmq.Context, "socket", no_more)
        with pytest.raises(SubscriptionError, match="ulimit"):
            pool.subscribe("one-more", "ipc:///nowhere/more")
        monkeypatch.undo()
        pool.subscribe("one-more", "ipc:///nowhere/more")


def no_more(*_):
    raise zmq.ZMQError(errno.EMFILE)


def test_an_index_that_cannot_drop_what_is_old_stops_no_worker(monkeypatch):
    monkeypatch.setattr(pool_module, "_EXPIRE_EVERY_S", 0.01)
    index = open_index()
    monkeypatch.setattr(type(index), "expire", lambda _: 1 / 0)
    with EventPool(index, workers=1) as pool:
        until(lambda: pool.stats()["worker_errors_total"] > 1)
        pool.submit(Message(b"kv@pod-a@m", 0, payload(["BlockStored", [1], None, [1, 2, 3, 4], 4, None])))
        pool.drain()
        assert [status.blocks for status in index.sources()] == [1]
