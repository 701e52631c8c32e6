"""`kvindex record`: what pods publish, into capture files."""

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from kvevents import Heard, LinkChange, Listener, Recorder
from kvindex.errors import UserError
from kvindex.reach import Reach
from kvindex.signals import stopped_by_signals


def run_record(
    endpoints: list[str],
    folder: Path,
    *,
    topic: str,
    seconds: float,
    max_file_bytes: int,
    max_total_bytes: int,
    stop: threading.Event | None = None,
) -> int:
    """Record for `seconds` (0: until SIGINT or SIGTERM, or `stop` is set), and complete the last file.

    An endpoint may say what its pod is called, ``pod-0=tcp://10.0.0.7:5557``. The exit status is 1 where nothing came.
    Raises `RecordingError`, `SubscriptionError` and `UserError`.
    """
    pods = pods_of(endpoints)
    # a pod must have a name where neither topics nor the person give one: its endpoint tells publishers apart
    recorder = Recorder(
        folder,
        max_file_bytes=max_file_bytes,
        max_total_bytes=max_total_bytes,
        pods={endpoint: pod for endpoint, pod in pods.items() if pod},
    )
    start = time.monotonic()
    until = start + seconds if seconds else float("inf")
    reach = Reach(topic, start)
    with stopped_by_signals() as stopped, recorder, Listener(list(pods), topic=topic) as listener:
        stopping = stop or stopped
        _say(f"recording {len(pods)} publishers into {folder}; interrupt to end")
        while not stopping.is_set() and time.monotonic() < until:
            for what in listener.receive(0.1):
                if isinstance(what, Heard):
                    recorder.write(what)
                    reach.heard(what.endpoint)
                elif isinstance(what, LinkChange) and (text := reach.change(what)):
                    _say(text)
            recorder.tick()
            for text in reach.quiet(time.monotonic()):
                _say(text)
    print(
        f"{recorder.recorded} messages recorded, {recorder.skipped} had not the frames of one, "
        f"{recorder.deleted} files deleted"
    )
    for path in recorder.written:
        print(f"  {path}")
    if not recorder.recorded:
        print(f"nothing was recorded; `kvindex doctor {' '.join(pods)}` tells why")
    return 0 if recorder.recorded else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pods_of(endpoints: Sequence[str]) -> dict[str, str]:
    """Read ``pod=endpoint`` and plain endpoints, which have "" for a pod; give the pod of each endpoint.

    Raises `UserError` for an endpoint that is named twice.
    """
    pods: dict[str, str] = {}
    for text in endpoints:
        pod, _, endpoint = text.rpartition("=")
        if endpoint in pods:
            raise UserError(f"endpoint {endpoint!r} is named twice")
        pods[endpoint] = pod
    return pods
