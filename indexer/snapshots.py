"""Snapshots: what an index in this process knows, as a file or a stream.

A snapshot is a line of frames: a beginning, one frame for each part, and an end that says how many there were, so that
one that was cut short is told from a whole one. Each frame has its number, its length and a checksum over both and its
bytes. Parts are compressed each by itself, so that no more than one is in memory at a time.
"""

import os
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

import msgspec
import zstandard
from xxhash import xxh3_64_intdigest

from indexer.base import Source
from indexer.errors import SnapshotError

__all__ = ["Part", "SnapshotError", "SnapshotIndex", "frames", "read_snapshot", "save_snapshot", "write_snapshot"]

VERSION = 1

_MAGIC = b"KVINDEX-SNAPSHOT"
_START = struct.Struct("<16sI")
_FRAME = struct.Struct("<4sIBQQ")
"""Kind, number, whether it is compressed, length as it stands there, and length of what it holds."""
_SUM = struct.Struct("<Q")
_PART, _END = b"PART", b"END."
_LEVEL = 1
_MOST_RATIO, _SMALL = 64, 4096
"""Nothing is compressed further than this, but for what is small: who reads a forged length makes no more room than
that many times what he was sent."""
_REMEDY = "delete it, or restore another; the index starts empty without it"


class Part(NamedTuple):
    """Some sources that were written at one moment, and what their writer wants to find again with them."""

    note: bytes
    sources: list[bytes]
    """What `SnapshotIndex.dump` gave."""


@runtime_checkable
class SnapshotIndex(Protocol):
    """An index that snapshots can be taken of. One in Redis keeps its blocks itself."""

    def followed(self) -> list[Source]:
        """Give all sources in the order in which they were registered; in that order they are to be loaded."""

    def dump(self, source: Source) -> bytes:
        """Give all that is known of a source, so that it goes on from there wherever it is loaded.

        Raises `InvalidQuestion` when the source is not registered.
        """

    def load(self, section: bytes) -> Source:
        """Follow a source from where it was when `dump` was called. Before anything else is done with the index.

        Raises `SnapshotError` for bytes that are no source, or one that is followed already; nothing changes then.
        Raises `InvalidQuestion` where other sources were registered before.
        """

    def settle(self) -> None:
        """Hear that all is loaded that is to be.

        Sources are written one after the other: one that the fleet shares may still wait for what another was told
        before that one was written.
        """


def frames(parts: Iterable[Part]) -> Iterator[bytes]:
    """Give the bytes of a snapshot. Parts are asked for one after the other."""
    yield _START.pack(_MAGIC, VERSION)
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    number = 0
    for part in parts:
        content = msgspec.msgpack.encode([part.note, part.sources])
        packed = compressor.compress(content)
        fits = len(packed) < len(content) <= max(_SMALL, _MOST_RATIO * len(packed))
        yield from _frame(_PART, number, packed if fits else content, len(content), is_packed=fits)
        number += 1
    content = msgspec.msgpack.encode({"parts": number, "written_at": time.time()})
    yield from _frame(_END, number, content, len(content), is_packed=False)


def _frame(kind: bytes, number: int, stored: bytes, length: int, *, is_packed: bool) -> Iterator[bytes]:
    head = _FRAME.pack(kind, number, is_packed, len(stored), length)
    yield head + _SUM.pack(_sum(head, stored))
    yield stored


def _sum(head: bytes, stored: bytes) -> int:
    return xxh3_64_intdigest(stored, xxh3_64_intdigest(head))


def write_snapshot(path: Path, parts: Iterable[Part]) -> int:
    """Write a snapshot in the place of the one before, at once or not at all; give its length in bytes.

    Raises `SnapshotError` when the file cannot be written; the one before is still there then.
    """
    return save_snapshot(path, frames(parts))


def save_snapshot(path: Path, chunks: Iterable[bytes]) -> int:
    """Write the bytes of a snapshot as `write_snapshot` does."""
    unfinished: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            unfinished = Path(file.name)
            length = sum(file.write(chunk) for chunk in chunks)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        unfinished = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise SnapshotError(
            f"snapshot {path}: cannot be written: {error}; see that its folder is there, is writable and has room"
        ) from error
    finally:
        if unfinished is not None:
            with suppress(OSError):
                unfinished.unlink()
    return length


def read_snapshot(path: Path) -> Iterator[Part]:
    """Give the parts of a snapshot. All of it is checked before the first is given.

    Raises `SnapshotError`, naming file, place and remedy, for a file that cannot be read, is no snapshot, is of another
    version, was cut short or changed.
    """
    try:
        with path.open("rb") as file:
            for _ in _read(file):
                pass
            file.seek(0)
            decompressor = zstandard.ZstdDecompressor()
            for at, is_packed, length, stored in _read(file):
                yield _part(at, decompressor.decompress(stored) if is_packed else stored, length)
    except OSError as error:
        raise SnapshotError(f"snapshot {path}: cannot be read: {error}") from error
    except zstandard.ZstdError as error:
        raise SnapshotError(f"snapshot {path}: cannot be unpacked: {error}; {_REMEDY}") from error
    except _Flaw as flaw:
        raise SnapshotError(f"snapshot {path}: {flaw}; {_REMEDY}") from None


class _Flaw(Exception):
    """What is wrong, and where."""


def _part(at: int, content: bytes, length: int) -> Part:
    try:
        if len(content) == length:
            note, sources = msgspec.msgpack.decode(content, type=tuple[bytes, list[bytes]])
            return Part(note, sources)
    except msgspec.DecodeError:
        pass
    raise _Flaw(f"no part of a snapshot at byte {at}")


def _read(file: BinaryIO) -> Iterator[tuple[int, bool, int, bytes]]:
    """Give place, form and bytes of each part, checked."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(_START.size)
    magic, version = _START.unpack(start) if len(start) == _START.size else (start, VERSION)
    if magic != _MAGIC:
        raise _Flaw("it is no snapshot of this program, its first bytes are others")
    if version != VERSION:
        raise _Flaw(f"it is of version {version}, and version {VERSION} is understood")
    number = 0
    while True:
        at = file.tell()
        head = file.read(_FRAME.size + _SUM.size)
        if len(head) < _FRAME.size + _SUM.size:
            raise _Flaw(f"it was cut short at byte {at}")
        kind, said, packed, stored_length, length = _FRAME.unpack_from(head)
        if stored_length > size - file.tell():
            raise _Flaw(f"it was cut short, or changed, in what begins at byte {at}")
        stored = file.read(stored_length)
        if _SUM.unpack_from(head, _FRAME.size)[0] != _sum(head[: _FRAME.size], stored):
            raise _Flaw(f"the checksum of what begins at byte {at} is wrong")
        if said != number or packed > 1 or kind not in (_PART, _END):
            raise _Flaw(f"no part of a snapshot at byte {at}")
        if kind == _END:
            if file.tell() != size:
                raise _Flaw(f"more than was expected at byte {file.tell()}")
            return
        fits = length <= max(_SMALL, _MOST_RATIO * stored_length) if packed else length == stored_length
        if not fits or (packed and zstandard.frame_content_size(stored) != length):
            raise _Flaw(f"lengths that cannot be at byte {at}")
        yield at, bool(packed), length, stored
        number += 1
