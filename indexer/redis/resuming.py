"""How a builder goes on with a source where another left it: its ledger is in Redis, in a record and in logs."""

import time

import structlog

from indexer.groups import GroupSpec
from indexer.ledger import Slot
from indexer.redis.builder import Builder
from indexer.redis.layout import Names, field_of
from indexer.redis.log import Replayed
from indexer.redis.ownership import Ownership
from indexer.redis.records import SlotRecord, SourceRecord, decode_records
from indexer.redis.standing import UNREADABLE
from indexer.redis.store import Command
from indexer.tracking import Tracked


class Resumer:
    """Takes sources over for one builder. One thread at a time."""

    def __init__(self, builder: Builder, ownership: Ownership) -> None:
        self._store, self._layout, self._writer, self._standing = builder
        self._ownership = ownership
        self._log = structlog.get_logger("indexer")

    def resume(self, tracked: Tracked) -> SourceRecord | None:
        """Take over what Redis has of a source, and give its record: the builder that wrote it is gone.

        Where that cannot be read the source is called so, and written anew. Raises `IndexUnavailable`.
        """
        names = self._layout.of(tracked.model)
        self._ownership.claim(tracked, by_force=True)
        _, value = self._store.run(
            [
                ("HSET", self._layout.models, names.tag, tracked.model.encode()),
                ("HGET", names.directory, field_of(tracked.source)),
            ]
        )
        records = decode_records({b"": value} if value else {})
        if not records:
            return None
        (record,) = records
        self._ownership.note_numbers(names, [slot.number for slot in record.slots])
        replays = [self._take_over(names, slot.number) for slot in record.slots]
        whole = [replayed for replayed in replays if replayed is not None]
        if len(whole) < len(replays):
            self._log.warning("redis_log_unreadable", pod=tracked.source.pod, rank=tracked.source.rank)
            tracked.reason, tracked.since = UNREADABLE, time.time()
            self._standing.call_stale(tracked)  # begins anew under other numbers
            return None
        _restore(tracked, record)
        for known, replayed in zip(record.slots, whole, strict=True):
            self._restore_slot(tracked, known, replayed)
        return record

    def _take_over(self, names: Names, number: int) -> Replayed | None:
        """Make a slot this builder's own and read its ledger; None where not all of that is there."""
        commands: list[Command] = []
        for part in names.parts:
            commands += [("SET", part.guard(number), self._writer.me, "XX"), ("GET", part.log(number))]
        answers = self._store.run(commands, again=False)
        whole = Replayed()
        for guarded, log in zip(answers[::2], answers[1::2], strict=True):
            replayed = Replayed()
            replayed.feed(log or b"")
            if not guarded or replayed.read < len(log or b""):
                return None
            whole.add(replayed)
        return whole

    def _restore_slot(self, tracked: Tracked, known: SlotRecord, replayed: Replayed) -> None:
        slot = Slot(known.medium, known.group, known.block_size)
        slot.bit = 1 << known.number
        slot.held, slot.copies = replayed.held, replayed.copies
        if slot.seen is not None:
            now = time.monotonic()
            slot.seen.update(dict.fromkeys(slot.held, now))
            slot.seen = slot.seen if known.ages else None
        mirror = self._standing.replace_slot(slot, known.number)
        for key in slot.held.values():
            mirror.keys[key] = mirror.keys.get(key, 0) + 1
        mirror.logged = len(replayed.mentioned)
        tracked.ledger.slots[known.medium, known.group, known.block_size] = slot


def _restore(tracked: Tracked, record: SourceRecord) -> None:
    tracked.incarnation = record.incarnation
    # what waited for a parent or for tokens is not in Redis: what the ledger said of that stands until a reset
    tracked.reason, tracked.since = record.reason or record.degraded, record.since or time.time()
    tracked.last_seq = record.last_seq
    tracked.ledger.groups.update({number: GroupSpec(size, tail) for number, size, tail in record.groups})
