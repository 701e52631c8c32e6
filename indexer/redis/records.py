"""The records of sources, as builders write and readers read them. No I/O."""

from typing import Any

import msgspec

from indexer.base import Copies, Source


class SlotRecord(msgspec.Struct, array_like=True):
    """A slot as readers need it, and as its builder finds it again."""

    number: int
    medium: str
    group: int | None
    block_size: int
    blocks: int
    ages: bool
    """No removal was ever announced here, so blocks have to age out."""


class SourceRecord(msgspec.Struct, array_like=True):
    """A source in the directory of its model."""

    pod: str
    rank: int
    incarnation: int
    fleet_wide: bool
    copies: Copies
    reason: str
    """Why its builder calls it degraded, "" when exact."""
    degraded: str
    """The same, or what its ledger knows itself."""
    since: float
    bare_images: bool
    last_seq: int | None
    builder: bytes
    """Who wrote the record: other builders' slots may have the same numbers, where Redis lost some of what it had."""
    groups: list[tuple[int, int, int | None]]
    """Number, block size and tail of each cache group."""
    slots: list[SlotRecord]

    @property
    def source(self) -> Source:
        """Whom the record is about."""
        return Source(self.pod, self.rank)


encode_record = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(SourceRecord).decode


def decode_records(directory: dict[bytes, bytes]) -> list[SourceRecord]:
    """Read the directory of a model. Records that cannot be read are somebody else's, or of another version."""
    records = []
    for value in directory.values():
        try:
            records.append(_decode_record(value))
        except msgspec.MsgspecError:
            continue
    records.sort(key=lambda record: record.source)
    return records


def pairs_of(listed: Any) -> dict[bytes, bytes]:  # noqa: ANN401  (a list or a dict, by the version of the protocol)
    """Read the answer to HGETALL."""
    return listed if isinstance(listed, dict) else dict(zip(listed[::2], listed[1::2], strict=True))
