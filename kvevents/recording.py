"""Messages into capture files, as `kvindex replay` reads them.

A capture is JSON lines, gzipped: one of kind ``meta``, then one of kind ``message`` for each message with its topic,
number, time of arrival, publisher and payload in hex. The file that is written is called ``.part`` until it is
complete; a file without that ending is whole.
"""

import gzip
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvevents.errors import KVEventsError
from kvevents.listening import Heard

_NAME = "capture"
_SUFFIX = ".jsonl.gz"
_PART = ".part"
_CALLED = re.compile(rf"{_NAME}-[0-9]{{8}}T[0-9]{{6}}-[0-9]{{9}}-[0-9]{{6}}{re.escape(_SUFFIX)}({re.escape(_PART)})?")
_FLUSH_EVERY_S = 1.0


class RecordingError(KVEventsError):
    """A capture cannot be written; the message names the file and what to do."""


class Recorder:
    """Writes captures into a folder: `max_file_bytes` each, the oldest deleted so that all take `max_total_bytes`.

    Sizes are of the files as they lie on disk. Only files that are called as a recorder calls them are counted and
    deleted. `pods` says what the pod behind an endpoint is called. A context manager; `close` completes the last file.
    After a crash the last file is left as ``.part``: what was flushed, at least once a second and every 256 messages,
    can be unpacked.

    Raises `RecordingError` when a file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_file_bytes: int = 64 * 1024 * 1024,
        max_total_bytes: int = 1024 * 1024 * 1024,
        pods: dict[str, str] | None = None,
    ) -> None:
        if not 0 < max_file_bytes <= max_total_bytes:
            raise RecordingError(
                f"{max_file_bytes} bytes a file, {max_total_bytes} in all: expected more in all than for one file"
            )
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._max_total_bytes = max_total_bytes
        self._pods = pods or {}
        self._file: TextIOWrapper | None = None
        self._path = folder
        self._number = 0
        self._flush_at = 0.0
        self._is_flushed = True
        self.recorded = 0
        """Messages written."""
        self.skipped = 0
        """Messages that have not the three frames of one."""
        self.deleted = 0
        """Files that had to go."""
        self.written: list[Path] = []
        """The files of this recorder that are there, oldest first, under the names they have when they are whole."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordingError(f"{folder}: {error.strerror}; name a folder that can be written") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, heard: Heard) -> None:
        """Write one message; begin another file where this one is full."""
        if len(heard.frames) != 3 or len(heard.frames[1]) != 8:
            self.skipped += 1
            return
        topic, seq, payload = heard.frames
        line: dict[str, Any] = {"kind": "message", **_text_of(topic), "seq": int.from_bytes(seq, "big")}
        line |= {"arrival": heard.arrival, "endpoint": heard.endpoint}
        if heard.endpoint in self._pods:
            line["pod"] = self._pods[heard.endpoint]
        with self._writing():
            if self._file is None:
                self._begin()
            self._put(line | {"payload": payload.hex()})
            self.recorded += 1
            self._is_flushed = False
            self._keep_within_bounds(len(payload))

    def flush(self) -> None:
        """Let what was written be on disk, so that a crash of this process leaves it."""
        with self._writing():
            self._flush()

    def tick(self) -> None:
        """Flush where that is due; to be called also while nothing comes."""
        if not self._is_flushed and time.monotonic() >= self._flush_at:
            self.flush()

    def close(self) -> None:
        """Complete the last file. May be called twice."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
                self._path.rename(_whole(self._path))
            except OSError as error:
                raise RecordingError(f"{self._path}: {error.strerror}; what was flushed before is there") from error

    @property
    def files(self) -> list[Path]:
        """The captures there are, of other recorders too, oldest first, the one that is written included."""
        return sorted(path for path in self._folder.glob(f"{_NAME}-*") if _CALLED.fullmatch(path.name))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecordingError(
                f"{self._path}: {error.strerror}; {self.recorded} messages recorded; make room, or name another folder"
            ) from error

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            self._is_flushed = True
            self._flush_at = time.monotonic() + _FLUSH_EVERY_S

    def _begin(self) -> None:
        self._number += 1
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self._path = self._folder / f"{_NAME}-{stamp}-{time.time_ns() % 10**9:09}-{self._number:06}{_SUFFIX}{_PART}"
        self._file = gzip.open(self._path, "xt", compresslevel=6, encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        self.written.append(_whole(self._path))
        self._put({"kind": "meta", "about": "recorded by kvindex", "started": time.time(), "pods": self._pods})

    def _put(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def _keep_within_bounds(self, written: int) -> None:
        # what is compressed is known only after a flush: one each second, and one for each large payload
        if written < 65_536 and time.monotonic() < self._flush_at and self.recorded % 256:
            return
        self._flush()
        if self._path.stat().st_size >= self._max_file_bytes:
            self.close()
        sizes: dict[Path, int] = {}
        for path in self.files:
            with suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
        total = sum(sizes.values())
        for path, size in list(sizes.items())[:-1]:
            if total <= self._max_total_bytes:
                return
            path.unlink(missing_ok=True)
            self.deleted += 1
            self.written = [one for one in self.written if one != _whole(path)]
            total -= size


def _whole(path: Path) -> Path:
    """Give what a file is called when it is complete."""
    return path.with_name(path.name.removesuffix(_PART))


def _text_of(topic: bytes) -> dict[str, str]:
    try:
        return {"topic": topic.decode()}
    except UnicodeDecodeError:
        return {"topic_hex": topic.hex()}
