"""What is measured with and on: clocks, cores, memory, the machine's name."""

import ctypes
import gc
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")

CORES = frozenset(os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1))
"""The cores that this process may use."""

_STATM = Path("/proc/self/statm")


@contextmanager
def on_cores(count: int | None) -> Iterator[None]:
    """Keep this thread, and the threads that it starts, to some of the cores; None is all of them.

    Where the system has no such call, nothing is done.
    """
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(CORES)[-count:] if count else CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def each(work: Callable[[Value], object], values: Sequence[Value]) -> list[float]:
    """Give the seconds that `work` takes for each value."""
    clock = time.perf_counter
    times = []
    gc.collect()
    gc.disable()
    try:
        for value in values:
            start = clock()
            work(value)
            times.append(clock() - start)
    finally:
        gc.enable()
    return times


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Give the value of a sorted sequence that so many percent are not above."""
    return ordered[math.ceil(len(ordered) * percent / 100) - 1]


def tells_memory() -> bool:
    """Say whether `resident_bytes` can be known on this system."""
    return _STATM.exists()


def resident_bytes() -> int:
    """Give the size of the resident set, after what is free has been given back to the system."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def version_of(package: str) -> str:
    """Give the version of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from source"


def cpu_model() -> str:
    """Name the processor as the system does."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    return model


def machine() -> str:
    """Name the processor and the number of its cores."""
    return f"{cpu_model()}, {os.cpu_count()} cores"
