"""`kvindex record`: what pods publish, into capture files."""

import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from kvevents import Heard, Listener, Recorder, pods_of


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

    An endpoint may say what its pod is called, ``pod-0=tcp://10.0.0.7:5557``. Raises `RecordingError` and
    `SubscriptionError`.
    """
    pods = pods_of(endpoints)
    stopping = stop or threading.Event()
    # a pod must have a name where neither topics nor the person give one: its endpoint tells publishers apart
    recorder = Recorder(
        folder,
        max_file_bytes=max_file_bytes,
        max_total_bytes=max_total_bytes,
        pods={endpoint: pod for endpoint, pod in pods.items() if pod},
    )

    def end(_: int, __: FrameType | None) -> None:
        stopping.set()

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, end) for number in signals}
    until = time.monotonic() + seconds if seconds else float("inf")
    try:
        with recorder, Listener(list(pods), topic=topic) as listener:
            print(f"recording {len(pods)} publishers into {folder}; interrupt to end", file=sys.stderr, flush=True)
            while not stopping.is_set() and time.monotonic() < until:
                for what in listener.receive(0.1):
                    if isinstance(what, Heard):
                        recorder.write(what)
                recorder.tick()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"{recorder.recorded} messages recorded, {recorder.skipped} were none, {recorder.deleted} files deleted")
    for path in recorder.files:
        print(f"  {path}")
    return 0 if recorder.recorded else 1
