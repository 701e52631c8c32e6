"""Captures as they lie on disk: JSON lines, also gzipped, also of a recorder that was killed."""

import gzip
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from kvevents import Message
from kvindex.errors import UserError

KINDS = ("meta", "message", "resident", "query")
MAX_LINE_BYTES = 160 * 1024 * 1024
"""A payload of 64 MiB, which is the most that is received, in hex and with some room."""
_GZIP = b"\x1f\x8b"

Line = dict[str, Any]


class Capture:
    """The lines of one or more files or folders, in their order: rotated files of one recording are one capture.

    They are read again for each use and never held, so that a small file that unpacks to very much takes time and no
    memory. A gzipped file that ends in the middle, as a killed recorder leaves it, gives its whole lines; that is said
    once on standard error.
    """

    def __init__(self, files: Sequence[Path], pod: str | None = None) -> None:
        self._files = [one for file in files for one in _files_of(file)]
        self._pod = pod
        self._told: set[Path] = set()

    def __str__(self) -> str:
        first = self._files[0]
        return first.name if len(self._files) == 1 else f"{first.name} and {len(self._files) - 1} more"

    def lines(self) -> Iterator[Line]:
        """Give every line, with ``line`` and ``file`` for where it is. Raises `UserError` for what is no capture."""
        for file in self._files:
            yield from self._lines_of(file)

    def messages(self) -> Iterator[tuple[Line, Message]]:
        """Give every message. Raises `UserError`."""
        for line in self.lines():
            if line["kind"] == "message":
                yield line, message_of(line, self._pod)

    def _lines_of(self, file: Path) -> Iterator[Line]:
        number = 0
        try:
            with _open(file) as lines:
                while text := lines.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if len(text) > MAX_LINE_BYTES:
                        raise UserError(
                            f"{file}, line {number}: longer than {MAX_LINE_BYTES} bytes; this is no capture"
                        )
                    yield _line_of(text, file, number)
        except EOFError:
            if file not in self._told:
                self._told.add(file)
                print(
                    f"kvindex: {file}: it ends in the middle, as when its recorder was killed; "
                    f"its {number} whole lines are taken",
                    file=sys.stderr,
                )
        except (OSError, zlib.error) as error:
            raise UserError(f"{file}: cannot be read{f' after line {number}' if number else ''}: {error}") from error


def _files_of(path: Path) -> list[Path]:
    """Give the captures of a folder, oldest first, or the file itself. Raises `UserError` for a folder without any."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if ".jsonl" in file.suffixes)
    if not found:
        raise UserError(f"{path}: no captures in it (files called *.jsonl, *.jsonl.gz or *.jsonl.gz.part)")
    return found


def _open(file: Path) -> IO[bytes]:
    """Open a file for its bytes, unpacked; it is gzipped where it says so, whatever it is called."""
    with file.open("rb") as opened:
        is_packed = opened.read(len(_GZIP)) == _GZIP
    return cast("IO[bytes]", gzip.open(file)) if is_packed else file.open("rb")


def _line_of(text: bytes, file: Path, number: int) -> Line:
    where = f"{file}, line {number}"
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, got {type(value).__name__}")
    kind = value.get("kind", "message")
    if kind not in KINDS:
        raise UserError(f"{where}: kind {kind!r:.80}: expected one of {', '.join(KINDS)}")
    return value | {"kind": kind, "line": number, "file": str(file)}


def message_of(line: Line, pod: str | None = None) -> Message:
    """Give the message that a line is; `pod` goes before what it says. Raises `UserError`."""
    try:
        topic = bytes.fromhex(line["topic_hex"]) if "topic_hex" in line else str(line["topic"]).encode()
        payload = bytes.fromhex(line.get("payload_hex") or line["payload"])
        seq = int(line["seq"])
        if not 0 <= seq < 2**64:
            raise ValueError(f"seq: expected 0 to 2**64-1, got {seq}")  # noqa: TRY301
        endpoint = str(line.get("endpoint", ""))
        name = pod or line.get("pod") or (None if topic else endpoint or "pod-0")
        return Message(topic, seq, payload, pod=None if name is None else str(name))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"{line['file']}, line {line['line']}: no message with topic, seq and payload in hex: {error!r}"
        ) from error
