"""A capture played as the pods would: at its own speed or another, and to a running service over sockets."""

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator

import zmq

from kvevents import DecodeError, Message, decode_batch, parse_topic
from kvevents.testing import Publisher
from kvindex.captures import Capture, Line
from kvindex.errors import UserError
from kvindex.signals import stopped_by_signals
from kvindex.traffic import wait_for_subscribers

_PAUSE = threading.Event()
"""Never set: to wait a moment."""
_LONG_S = 5.0
_MOST_PODS = 1_024
_MAX_PORT = 65_535


def speed_of(text: str) -> float:
    """Read ``full`` (infinity), ``original`` (1) or a factor over 0. Raises `UserError`."""
    named = {"full": math.inf, "original": 1.0}
    try:
        speed = named[text] if text in named else float(text)
    except ValueError:
        speed = 0.0
    if not speed > 0:
        raise UserError(f"--speed {text}: expected full, original, or how many times as fast, like 2 or 0.5")
    return speed


def paced(messages: Iterable[tuple[Line, Message]], speed: float, stop: threading.Event = _PAUSE) -> Iterator[Message]:
    """Give messages when they are due: by their time of arrival, or by the engine's time where that was not recorded.

    A message without a time, or with one before the last, is due at once. Ends when `stop` is set. A long wait is said
    on standard error.
    """
    start = time.monotonic()
    first: float | None = None
    for line, message in messages:
        at = math.nan if math.isinf(speed) else _time_of(line, message)
        if math.isfinite(at):
            first = at if first is None else first
            wait = min(max(0.0, start + (at - first) / speed - time.monotonic()), threading.TIMEOUT_MAX)
            if wait > _LONG_S:
                print(f"the next message is due in {wait:,.0f} s (--speed)", file=sys.stderr, flush=True)
            if stop.wait(wait):
                return
        if stop.is_set():
            return
        yield message


def _time_of(line: Line, message: Message) -> float:
    arrival = line.get("arrival")
    if isinstance(arrival, int | float):
        return float(arrival)
    try:
        return decode_batch(message.payload).ts
    except DecodeError:
        return math.nan


def run_play(
    capture: Capture,
    *,
    speed: float,
    host: str,
    base_port: int,
    wait_subscribers: int,
    hold: float,
    model: str,
    as_json: bool,
) -> int:
    """Publish a capture as its pods did, one publisher for each, with a replay socket.

    Publisher i, by the names of the pods, binds `base_port + 2 * i`, and its replay the port after it; 0: any. Begins
    when each has `wait_subscribers` subscribers and stays for `hold` seconds after the last message, so that what was
    missed can be asked for. Ends early at SIGINT or SIGTERM. Endpoints are printed, with `as_json` as `KVINDEX_PODS`
    takes them. Raises `UserError` for what is no capture, and when a port cannot be had.
    """
    out = sys.stderr if as_json else sys.stdout

    def say(text: str) -> None:
        print(text, file=out, flush=True)

    pods, total = _survey(capture)
    sent = 0
    with stopped_by_signals() as stop, contextlib.ExitStack() as running:
        publishers = {
            pod: running.enter_context(_publisher(host, base_port, number)) for number, pod in enumerate(pods)
        }
        said = [
            {"pod": pod, "endpoint": one.endpoint, "replay": one.replay, "model": pods[pod] or model}
            for pod, one in publishers.items()
        ]
        if as_json:
            print(json.dumps(said), flush=True)
        else:
            for line in said:
                say(f"{line['pod']}: {line['endpoint']}, replay {line['replay']}")
        if wait_subscribers:
            wait_for_subscribers(list(publishers.values()), wait_subscribers, stop, say)
        for message in paced(capture.messages(), speed, stop):
            one = publishers[_pod(message)]
            one.topic = message.topic
            one.send(bytes(message.payload), seq=message.seq)
            sent += 1
        say(f"{sent} of {total} messages played")
        if hold and not stop.is_set():
            say(f"answering replays for {hold:g} s")
            stop.wait(hold)
    return 0 if sent == total else 1


def _survey(capture: Capture) -> tuple[dict[str, str], int]:
    """Read a capture once: the model of each pod, "" where no topic says it, and how many messages there are."""
    pods: dict[str, str] = {}
    total = 0
    for line, message in capture.messages():
        total += 1
        pod = _pod(message)
        if not pods.get(pod):
            pods[pod] = parse_topic(message.topic).model
        if len(pods) > _MOST_PODS:
            raise UserError(f"{line['file']}, line {line['line']}: more than {_MOST_PODS} pods; name one with --pod")
    if not total:
        raise UserError(f"{capture}: holds no messages")
    return dict(sorted(pods.items())), total


def _publisher(host: str, base_port: int, number: int) -> Publisher:
    events, replay = (base_port + 2 * number, base_port + 2 * number + 1) if base_port else (0, 0)
    if replay > _MAX_PORT:
        raise UserError(
            f"--base-port {base_port}: pod number {number} would publish at port {events}; take a lower one"
        )
    try:
        return Publisher(f"tcp://{host}:{events}", replay=f"tcp://{host}:{replay}")
    except zmq.ZMQError as error:
        raise UserError(f"cannot bind ports {events} and {replay} on {host}: {error.strerror}") from error


def _pod(message: Message) -> str:
    return message.pod or parse_topic(message.topic).pod
