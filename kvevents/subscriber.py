"""The receiving thread: one ZMQ SUB socket for each endpoint, all polled together.

Nothing else touches the sockets. The thread never waits for anybody but the poll, so that libzmq can re-send its
subscriptions after a reconnect (it does so only when the application touches the socket, WIRE A4).
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar, cast

import zmq
import zmq.utils.monitor
from structlog.typing import FilteringBoundLogger

from kvevents.errors import SubscriptionError
from kvevents.message import MAX_TOPIC_BYTES, Message, Note, Publisher
from kvevents.readable import Readable
from kvevents.replays import Replays, Request

HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 15_000
RECONNECT_MS = 100
RECONNECT_MAX_MS = 5_000
RECEIVE_MESSAGES = 2_048
"""How many may wait in each socket. They are read at once, so more would only be memory that no bound holds; past it
the engine keeps them, and past its own mark PUB drops, which shows as a gap."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_BURST, _BURST_BYTES = 256, 4 * 1024 * 1024
"""How much is read from one socket before the next one's turn."""
_ROUND_S = 0.0005
"""From one look at the sockets to the next at least: it costs about as much as ten messages do, and workers that are
woken for each of them keep the interpreter from everybody else for longer."""
_IN = int(zmq.POLLIN)  # pyzmq's flags take as long as the question itself

_T = TypeVar("_T")


@dataclass(frozen=True)
class Subscription:
    """An endpoint and what is known of who publishes there."""

    endpoint: str
    pod: str | None = None
    model: str = ""
    topic: str = ""
    copies: str = ""
    bind: bool = False
    replay: str | None = None


@dataclass
class _Open:
    subscription: Subscription
    socket: "zmq.Socket[bytes]"
    monitor: "zmq.Socket[bytes]"
    connected: int = 0
    heard: bool = False
    unreachable_since: float = field(default_factory=time.monotonic)
    """Since when nobody is connected; of no meaning where somebody is."""


class Receiver:
    """The thread and its sockets.

    `deliver` gets all messages, in order and many at a time where many come; it must not block. `has_room` says whether
    there is room for replayed messages of a pod.
    """

    def __init__(
        self, deliver: Callable[[list[Message]], None], has_room: Callable[[str], bool], log: FilteringBoundLogger
    ) -> None:
        self._deliver = deliver
        self._come: list[Message] = []
        """What was read and is not delivered yet."""
        self._log = log
        self._context: zmq.Context[zmq.Socket[bytes]] = new_context()
        self._address = f"inproc://commands-{id(self)}"
        self._wake: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._wake.bind(self._address)
        self._wake_lock = threading.Lock()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: list[_Open] = []
        self._of: dict[zmq.Socket[bytes], _Open] = {}
        """The endpoints by their sockets, those of messages and of connections."""
        self._readable = Readable()
        self._replays = Replays(self._context, self._readable, self._deliver_one, has_room, log)
        self._running = True
        self.counters: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="kvevents-receiver", daemon=True)
        self._thread.start()

    def add(self, subscription: Subscription) -> str:
        """Open a socket; give the endpoint it really has. Raises `SubscriptionError` when that cannot be."""
        return self._call(lambda: self._add(subscription))

    def remove(self, pod: str) -> None:
        """Close the sockets of a pod."""
        self._call(lambda: self._remove(pod))

    def replay(self, publisher: Publisher, number: int, start: int) -> None:
        """Ask a publisher for its messages from a number on; they come like others, marked with the replay's number."""
        self._post(lambda: self._replay(publisher, number, start))

    def settle(self) -> None:
        """Return when everything that has arrived at the sockets has been delivered."""
        self._call(self._receive_all)

    def replay_counters(self) -> dict[str, int]:
        """Say how many replays were asked for, and how many of them failed."""
        return {"replays_total": self._replays.asked, "replays_failed_total": self._replays.failed}

    def connected(self) -> dict[str, bool]:
        """Say for each pod that was subscribed by name whether its publisher is connected."""
        states: dict[str, bool] = {}
        for opened in list(self._open):
            pod = opened.subscription.pod
            if pod is not None:
                states[pod] = states.get(pod, True) and (opened.connected > 0 or opened.heard)
        return states

    def unreachable(self) -> dict[Publisher, float]:
        """Give the publishers of pods subscribed by name that are not connected, and for how many seconds."""
        now = time.monotonic()
        return {
            Publisher(opened.subscription.pod, opened.subscription.endpoint): now - opened.unreachable_since
            for opened in list(self._open)
            if opened.subscription.pod is not None and not opened.connected and not opened.heard
        }

    def unheard(self) -> dict[str, str]:
        """Give the pods whose topic filter does not let through what they publish, with the topic of that."""
        return {pod: topic.decode(errors="replace")[:80] for pod, topic in self._replays.unheard.copy().items() if pod}

    def bound(self) -> set[str]:
        """Give the endpoints that pods connect to."""
        return {opened.subscription.endpoint for opened in list(self._open) if opened.subscription.bind}

    def close(self) -> None:
        """End the thread and close all sockets."""
        if self._thread.is_alive():
            self._post(None)
            self._thread.join()
            self._wake.close(0)
            self._context.destroy(0)

    def _call(self, work: Callable[[], _T]) -> _T:
        """Run `work` on the receiving thread, which owns the sockets."""
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001  (whatever it is, who called waits for it)
                future.set_exception(error)

        self._post(run)
        return future.result()

    def _post(self, command: Callable[[], None] | None) -> None:
        self._commands.put(command)
        with self._wake_lock:
            self._wake.send(b"")

    def _run(self) -> None:
        wake = self._context.socket(zmq.PAIR)
        wake.connect(self._address)
        self._readable.register(wake)
        next_round = 0.0
        while self._running:
            ready = self._readable.wait(self._replays.timeout_ms())
            now = time.monotonic()
            if (early := next_round - now) > 0:
                time.sleep(early)
                now = next_round
            next_round = now + _ROUND_S
            try:
                if wake in ready:
                    self._obey(wake)
                # a command may have closed some of them
                for opened in {id(of): of for of in map(self._of.get, ready) if of is not None}.values():
                    self._receive(opened)
                self._flush()
                self._replays.receive()
            except Exception as error:  # noqa: BLE001  (one broken socket must not end the reception of all others)
                self.counters["receiver_errors_total"] += 1
                count = self.counters["receiver_errors_total"]
                if count & (count - 1) == 0:
                    self._log.error("receiver_error", error=repr(error), times=count)
                for socket in ready & (self._of.keys() | {wake}):
                    self._readable.again(socket)
        self._replays.close()
        for opened in self._open:
            self._close(opened)
        self._readable.close()
        wake.close(0)

    def _obey(self, wake: "zmq.Socket[bytes]") -> None:
        """Do what was posted."""
        try:
            while self._running:
                wake.recv(zmq.NOBLOCK)
                command = self._commands.get()
                if command is None:
                    self._running = False
                else:
                    command()
        except zmq.Again:
            pass

    def _receive_all(self) -> None:
        for opened in self._open:
            # a flood may never end: what a socket could hold when we were called is enough
            enough = self.counters["received_total"] + RECEIVE_MESSAGES
            while self._receive(opened) and self.counters["received_total"] < enough:
                pass
        self._flush()

    def _flush(self) -> None:
        """Deliver what was read."""
        if self._come:
            come = self._come.copy()
            self._come.clear()
            self._deliver(come)

    def _deliver_one(self, message: Message) -> None:
        """Deliver a message of a replay: whether there is room for the next one shows only then."""
        self._deliver([message])

    def _receive(self, opened: _Open) -> bool:
        """Read what waits at a socket, a burst at most; say whether there may be more."""
        socket, burst, size = opened.socket, list[list[bytes]](), 0
        while is_more := _has_any(socket):
            # copied: a frame of libzmq's holds the whole buffer that it was read into, and is freed by another thread
            frames = socket.recv_multipart(zmq.NOBLOCK)
            burst.append(frames)
            size += len(frames[-1])
            if len(burst) == _BURST or size > _BURST_BYTES:
                break
        # later than the messages were read, and told earlier: what came on a new connection may be another engine's
        while _has_any(opened.monitor):
            self._watch(opened)
        self._take(opened, burst)
        if len(self._come) >= _BURST:
            self._flush()
        if is_more:
            self._readable.again(socket)
        return is_more

    def _take(self, opened: _Open, burst: list[list[bytes]]) -> None:
        subscription = opened.subscription
        for frames in burst:
            opened.heard = True
            self.counters["received_total"] += 1
            if len(frames) != 3 or len(frames[1]) != 8 or len(frames[0]) > MAX_TOPIC_BYTES:
                self.counters["dropped_bad_frames_total"] += 1
                count = self.counters["dropped_bad_frames_total"]
                if count & (count - 1) == 0:
                    self._log.warning(
                        "message_discarded",
                        endpoint=subscription.endpoint,
                        reason="bad_frames",
                        frames=[len(frame) for frame in frames[:8]],
                        times=count,
                    )
                continue
            self._come.append(
                Message(
                    topic=frames[0],
                    seq=int.from_bytes(frames[1], "big"),
                    payload=frames[2],
                    pod=subscription.pod,
                    model=subscription.model,
                    endpoint=subscription.endpoint,
                    copies=subscription.copies,
                )
            )

    def _watch(self, opened: _Open) -> None:
        event = zmq.utils.monitor.recv_monitor_message(opened.monitor, zmq.NOBLOCK)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            opened.connected += 1
            if opened.subscription.pod is not None:
                self._come.append(_message(opened.subscription, note=Note.CONNECTED))
        elif event == zmq.EVENT_DISCONNECTED:
            opened.connected = max(0, opened.connected - 1)
            opened.heard = False
            opened.unreachable_since = time.monotonic()

    def _add(self, subscription: Subscription) -> str:
        try:
            socket = self._context.socket(zmq.SUB)
        except zmq.ZMQError as error:
            raise _no_room(subscription.endpoint, error) from error
        socket.linger = 0
        socket.rcvhwm = RECEIVE_MESSAGES
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.IPV6, 1)
        socket.subscribe(subscription.topic)
        try:
            monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        except zmq.ZMQError as error:
            socket.close(0)
            raise _no_room(subscription.endpoint, error) from error
        opened = _Open(subscription, socket, monitor)
        try:
            if subscription.bind:
                socket.bind(subscription.endpoint)
            else:
                socket.connect(subscription.endpoint)
        except zmq.ZMQError as error:
            self._close(opened)
            verb = "bind" if subscription.bind else "connect to"
            raise SubscriptionError(
                f"endpoint {subscription.endpoint!r}: cannot {verb} it: {error.strerror}; "
                "expected something like 'tcp://10.0.0.7:5557'"
            ) from error
        for one in (socket, monitor):
            self._readable.register(one)
            self._of[one] = opened
        self._open.append(opened)
        return socket.get_string(zmq.LAST_ENDPOINT) if subscription.bind else subscription.endpoint

    def _replay(self, publisher: Publisher, number: int, start: int) -> None:
        for opened in self._open:
            subscription = opened.subscription
            if (subscription.pod, subscription.endpoint) == publisher and subscription.replay is not None:
                like = _message(subscription, replay=number)
                self._replays.ask(Request(subscription.replay, start, like, subscription.topic.encode()))

    def _remove(self, pod: str) -> None:
        self._replays.drop(pod)
        for opened in [opened for opened in self._open if opened.subscription.pod == pod]:
            self._open.remove(opened)
            for one in (opened.socket, opened.monitor):
                self._readable.unregister(one)
                del self._of[one]
            self._close(opened)

    def _close(self, opened: _Open) -> None:
        opened.socket.disable_monitor()
        opened.monitor.close(0)
        opened.socket.close(0)


def _has_any(socket: "zmq.Socket[bytes]") -> bool:
    """Say whether a message has come: a third of what it costs to be told so by an exception."""
    return bool(cast(int, socket.get(zmq.EVENTS)) & _IN)


def new_context() -> "zmq.Context[zmq.Socket[bytes]]":
    """Make a context for as many sockets as libzmq can: a followed endpoint takes three, and its default is 1,023."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.max_sockets = context.get(zmq.SOCKET_LIMIT)
    return context


def _no_room(endpoint: str, error: zmq.ZMQError) -> SubscriptionError:
    return SubscriptionError(
        f"endpoint {endpoint!r}: {error.strerror}; three files are open for each endpoint: raise the limit (ulimit -n)"
    )


def _message(subscription: Subscription, *, replay: int = 0, note: Note | None = None) -> Message:
    """Make a message that says something of a publisher, or what those of a replay have in common."""
    return Message(
        topic=b"",
        seq=0,
        payload=b"",
        pod=subscription.pod,
        model=subscription.model,
        endpoint=subscription.endpoint,
        copies=subscription.copies,
        replay=replay,
        note=note,
    )
