"""A capture played as the pods would: at its own speed or another, and to a running service over sockets."""

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import zmq

from kvevents import DecodeError, Message, decode_batch, parse_topic
from kvevents.testing import Publisher
from kvindex.errors import UserError

_PAUSE = threading.Event()
"""Never set: to wait a moment."""


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


def paced(
    messages: Sequence[tuple[dict[str, Any], Message]], speed: float, stop: threading.Event = _PAUSE
) -> Iterator[Message]:
    """Give messages when they are due: by their time of arrival, or by the engine's time where that was not recorded.

    A message without a time, or with one before the last, is due at once. Ends when `stop` is set.
    """
    start = time.monotonic()
    first: float | None = None
    for line, message in messages:
        at = math.nan if math.isinf(speed) else _time_of(line, message)
        if not math.isnan(at):
            first = at if first is None else first
            if stop.wait(max(0.0, start + (at - first) / speed - time.monotonic())):
                return
        if stop.is_set():
            return
        yield message


def _time_of(line: dict[str, Any], message: Message) -> float:
    arrival = line.get("arrival")
    if isinstance(arrival, int | float):
        return float(arrival)
    try:
        return decode_batch(message.payload).ts
    except DecodeError:
        return math.nan


def run_play(
    messages: Sequence[tuple[dict[str, Any], Message]],
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

    Publisher i binds `base_port + 2 * i`, and its replay the port after it; 0: any. Begins when each has
    `wait_subscribers` subscribers and stays for `hold` seconds after the last message, so that what was missed can be
    asked for. Ends early at SIGINT or SIGTERM. Endpoints are printed, with `as_json` as `KVINDEX_PODS` takes them.
    Raises `UserError` when a port cannot be had.
    """
    pods = list(dict.fromkeys(_pod(message) for _, message in messages))
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    out = sys.stderr if as_json else sys.stdout
    sent = 0
    try:
        with contextlib.ExitStack() as running:
            publishers = {
                pod: running.enter_context(_publisher(host, base_port, number)) for number, pod in enumerate(pods)
            }
            said = [
                {"pod": pod, "endpoint": one.endpoint, "replay": one.replay, "model": _model(pod, messages) or model}
                for pod, one in publishers.items()
            ]
            if as_json:
                print(json.dumps(said), flush=True)
            else:
                for line in said:
                    print(f"{line['pod']}: {line['endpoint']}, replay {line['replay']}", flush=True)
            for one in publishers.values():
                while wait_subscribers and one.subscribers < wait_subscribers and not stop.wait(0.02):
                    pass
            for message in paced(messages, speed, stop):
                one = publishers[_pod(message)]
                one.topic = message.topic
                one.send(bytes(message.payload), seq=message.seq)
                sent += 1
            print(f"{sent} of {len(messages)} messages played", file=out, flush=True)
            stop.wait(hold)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if sent == len(messages) else 1


def _publisher(host: str, base_port: int, number: int) -> Publisher:
    ports = (base_port + 2 * number, base_port + 2 * number + 1) if base_port else (0, 0)
    try:
        return Publisher(f"tcp://{host}:{ports[0]}", replay=f"tcp://{host}:{ports[1]}")
    except zmq.ZMQError as error:
        raise UserError(f"cannot bind ports {ports[0]} and {ports[1]} on {host}: {error.strerror}") from error


def _pod(message: Message) -> str:
    return message.pod or parse_topic(message.topic).pod


def _model(pod: str, messages: Sequence[tuple[dict[str, Any], Message]]) -> str:
    return next((parse_topic(m.topic).model for _, m in messages if _pod(m) == pod and m.topic), "")
