"""The index in Redis: one shared view for many builders and many scorers.

A builder keeps the ledgers of its sources in memory, as the index in this process does, and writes what they say to
Redis: the bits of each block, a record of each source, and each ledger as a log, from which a builder that was killed
goes on. What could not be written waits within bounds; where that is not enough, or where Redis lost what it had, the
source is written anew from its ledger. So a fault costs time, never truth.
"""

import os
import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeAlias

import structlog

from indexer.base import Copies, Holding, Limits, Source, SourceStatus
from indexer.errors import IndexUnavailable
from indexer.groups import GroupSpec
from indexer.keys import BlockKey
from indexer.ledger import Change, Slot
from indexer.prompt import Prompt
from indexer.redis_layout import (
    APPEND,
    AT_ONCE,
    HOLD,
    LEAVE,
    MAX_SLOTS,
    PUBLISH,
    RELEASE,
    REPLACE,
    TAKE_SLOT,
    Layout,
    Replayed,
    SlotRecord,
    SourceRecord,
    bit_of,
    decode_records,
    encode_record,
    log_blocks,
    log_copies,
)
from indexer.redis_reader import Questions, ask
from indexer.redis_store import Command, RedisStore
from indexer.redis_sweep import Sweeper
from indexer.redis_url import parse_url
from indexer.tracking import Tracked, TrackingIndex

_ENTRY = 4096
"""Blocks in one entry of a log that is written anew."""

_PORTION = 256 * 1024
"""Bytes, about, that are written in one round trip: each has the time that an answer may take."""

_LOG_SLACK = 1024
"""A log is written anew when it has twice the entries that its slot has blocks, and so many more."""

_COUNT_S = 86_400
"""How long a builder's count of writes outlives it."""

_BACKOFF_S = 0.05, 2.0

_Outlook: TypeAlias = tuple[str, bool, list[bool]]


class _Mirror:
    """What is in Redis of a slot."""

    __slots__ = ("keys", "logged", "number", "published")

    def __init__(self, number: int, *, published: bool = False) -> None:
        self.number = number
        self.published = published
        """Whether the source's record has the number: from then on nobody takes it for lost."""
        self.keys: dict[BlockKey, int] = {}
        """How many names stand for each key."""
        self.logged = 0
        """Blocks mentioned in the log."""


class RedisIndex(TrackingIndex):
    """An `Index` in Redis or Valkey. All methods may be called from any thread.

    `url` is ``redis://user:password@host:port/db``, ``rediss://``, ``valkey://``, ``valkeys://`` or ``unix://path``.
    Its options are ``prefix`` of all keys (``kvindex:``) and ``timeout`` in seconds (1.0). Nothing else in the database
    is touched. `buffer_bytes` bounds what waits while Redis does not answer.

    Questions raise `IndexUnavailable` when Redis does not answer. Events never do: what they say is written when it
    does again, at the latest with the next call of `expire`.
    """

    def __init__(self, url: str, limits: Limits | None = None, *, buffer_bytes: int = 64 * 1024 * 1024) -> None:
        super().__init__(limits)
        parsed = parse_url(url)
        self._store = RedisStore(parsed)
        self._layout = Layout(parsed.prefix)
        self._questions = Questions(self._layout, self._limits.block_sizes)
        self._log = structlog.get_logger("indexer")
        self._buffer_bytes = buffer_bytes
        self._builder = os.urandom(8).hex().encode()
        self._writes = 0
        self._sweeper = Sweeper(self._store, self._layout, self._builder)
        self._mirrors: dict[Slot, _Mirror] = {}
        self._due: list[tuple[Tracked, Command]] = []
        self._due_bytes = 0
        self._unpublished: dict[Source, Tracked] = {}
        """Sources whose record has to be written; with a new version where `_changed` has them too."""
        self._changed: set[Source] = set()
        self._stale: dict[Source, Tracked] = {}
        """Sources that have to be written anew from their ledgers."""
        self._unclaimed: set[Source] = set()
        """Stale sources that Redis does not know to be ours yet."""
        self._lost: set[Source] = set()
        """Sources that another builder follows now: nothing of them is written here any more."""
        self._shown: dict[Source, _Outlook] = {}
        """What else the records of sources say, see `_outlook`."""
        self._gone: dict[Source, Tracked] = {}
        """Sources that were forgotten and are still in Redis."""
        self._fresh: list[_Mirror] = []
        """Mirrors whose numbers are in no record yet."""
        self._retry_at = 0.0
        self._backoff = _BACKOFF_S[0]
        self._counters.update(dict.fromkeys(("write_failures_total", "rewritten_total", "swept_total"), 0))

    def __repr__(self) -> str:
        return f"RedisIndex({self._store.shown}, {len(self._tracked)} sources of its own)"

    # ---- questions

    def match(
        self,
        prompt: Prompt,
        *,
        pods: Collection[str] | None = None,
        block_size: int | None = None,
        holders_only: bool = False,
    ) -> list[Holding]:
        """Say what each source holds of a prompt, see `Index.match`. Raises `IndexUnavailable`."""
        question = self._questions.match(prompt, pods=pods, block_size=block_size, holders_only=holders_only)
        return ask(question, self._store.run)

    def block_size(self, model: str) -> int | None:
        """Give the usual block size of a model, see `Index.block_size`. Raises `IndexUnavailable`."""
        return ask(self._questions.block_size(model), self._store.run)

    def sources(self) -> list[SourceStatus]:
        """Describe all sources, those of other builders too, see `Index.sources`. Raises `IndexUnavailable`."""
        return ask(self._questions.sources(), self._store.run)

    def stats(self) -> dict[str, int]:
        """Give the counters and gauges of this builder, see `Index.stats`."""
        with self._lock:
            waiting = {
                "write_waiting_bytes": self._due_bytes,
                "stale_sources": len(self._stale),
                "lost_sources": len(self._lost),
            }
            return self._gauges() | waiting

    def close(self) -> None:
        """Write what is due and give the connections back. The sources stay in Redis: another builder goes on."""
        with self._lock:
            self._retry_at = 0.0
            self._flush()
            self._tracked.clear()
            self._mirrors.clear()
        self._store.close()

    # ---- events

    def register(
        self, source: Source, *, model: str, copies: Copies = "count", fleet_wide: bool = False, degraded: str = ""
    ) -> None:
        """Begin to follow a source, see `Index.register`; what another builder wrote of it is gone on with."""
        with self._lock:
            is_new = source not in self._tracked
            if source in self._gone:
                self._flush()
            super().register(source, model=model, copies=copies, fleet_wide=fleet_wide)
            if is_new:
                if source in self._gone:  # Redis still has what was forgotten
                    self._stale[source] = self._tracked[source]
                    self._unclaimed.add(source)
                else:
                    self._resume(self._tracked[source])
                self._flush()
            if degraded and is_new:
                self.degrade(source, degraded)

    def expire(self) -> None:
        """Drop blocks that outlived their time, write what waits, and sweep a little, see `Index.expire`."""
        super().expire()
        with self._lock:
            self._flush(look=True)
        try:
            self.sweep()
        except IndexUnavailable:
            self._counters["write_failures_total"] += 1

    def _change(self, tracked: Tracked, changes: list[Change]) -> None:
        if self._is_unwritten(tracked):
            return
        tag = self._layout.tag(tracked.model)
        for slot, names, keys, held in changes:
            mirror = self._mirrors[slot]
            log = self._layout.log(tag, mirror.number)
            self._unpublished[tracked.source] = tracked
            if not keys:
                entries = b"".join(log_copies(name, slot.copies.get(name, 1)) for name in names)
                self._add(tracked, APPEND, [log], entries)
                continue
            entry = log_blocks(names, keys, held=held)
            mirror.logged += len(names)
            first = [key for key in keys if _counted(mirror.keys, key, held=held)]
            # a log may say too much, never too little: from it the bits are taken back
            if held:
                self._add(tracked, APPEND, [log], entry)
            for at in range(0, len(first), AT_ONCE):
                blocks = self._layout.blocks(first[at : at + AT_ONCE])
                self._add(tracked, HOLD if held else RELEASE, blocks, bit_of(mirror.number))
            if not held:
                self._add(tracked, APPEND, [log], entry)

    def _is_unwritten(self, tracked: Tracked) -> bool:
        return tracked.source in self._stale or tracked.source in self._lost

    def _add(self, tracked: Tracked, script: str, keys: Sequence[bytes], *values: Any) -> None:  # noqa: ANN401
        command = self._guarded(tracked, script, keys, *values)
        self._due.append((tracked, command))
        self._due_bytes += _weight(command)

    def _guarded(self, tracked: Tracked, script: str, keys: Sequence[bytes], *values: Any) -> Command:  # noqa: ANN401
        """Make a command that does nothing once another builder follows the source."""
        owner = self._layout.owner(self._layout.tag(tracked.model), _field(tracked.source))
        return ("EVAL", script, len(keys) + 1, owner, *keys, self._builder, *values)

    def _take_slot(self, tracked: Tracked, slot: Slot) -> bool:
        number = -1
        try:
            if not self._is_unwritten(tracked) and time.monotonic() < self._retry_at:
                self._stale[tracked.source] = tracked
            elif not self._is_unwritten(tracked):
                number = self._new_number(tracked)
                if number < 0:
                    return False
        except IndexUnavailable as error:
            self._failed(error)
            self._stale[tracked.source] = tracked
        mirror = self._mirrors[slot] = _Mirror(number)
        self._fresh.append(mirror)
        self._layout_changed(tracked)
        slot.bit = 1 << max(number, 0)
        return True

    def _new_number(self, tracked: Tracked) -> int:
        key = self._layout.numbers(self._layout.tag(tracked.model))
        (number,) = self._store.run([("EVAL", TAKE_SLOT, 1, key, MAX_SLOTS)])
        return int(number)

    def _layout_changed(self, tracked: Tracked) -> None:
        if self._tracked.get(tracked.source) is not tracked:
            self._gone[tracked.source] = tracked
            if self._stale.get(tracked.source) is tracked:
                del self._stale[tracked.source]
        self._unpublished[tracked.source] = tracked
        self._changed.add(tracked.source)

    def _trust_changed(self, tracked: Tracked) -> None:
        self._layout_changed(tracked)
        self._flush()

    def _applied(self, tracked: Tracked) -> None:
        if self._tracked.get(tracked.source) is not tracked:
            return
        self._unpublished[tracked.source] = tracked
        for slot in () if self._is_unwritten(tracked) else tracked.ledger.slots.values():
            mirror = self._mirrors[slot]
            if mirror.logged > 2 * len(slot.held) + _LOG_SLACK:
                tag = self._layout.tag(tracked.model)
                self._add(tracked, REPLACE, [self._layout.log(tag, mirror.number)], _log_of(slot))
                mirror.logged = len(slot.held)
        self._flush()

    def _reclaim(self, tracked: Tracked, slots: Iterable[Slot]) -> None:
        """Leave slots to the sweep, in the step that takes them out of their source's record."""
        with self._lock:
            gone = [self._mirrors.pop(slot) for slot in slots if slot in self._mirrors]
            # what is written anew, or forgotten, leaves all that its record says
            if self._tracked.get(tracked.source) is tracked and not self._is_unwritten(tracked):
                self._publish(tracked, [mirror.number for mirror in gone])
            self._flush()

    def release(self, pod: str) -> None:
        """Stop following a pod and leave what it holds in Redis to the builder that follows it from now on."""
        with self._lock:
            self._flush()
            for source in [source for source in self._tracked if source.pod == pod]:
                tracked = self._tracked.pop(source)
                for slot in tracked.ledger.slots.values():
                    self._mirrors.pop(slot, None)
                for known in (self._stale, self._unpublished, self._shown):
                    known.pop(source, None)
                self._lost.discard(source)
                self._unclaimed.discard(source)

    # ---- writing

    def _flush(self, *, look: bool = False) -> None:
        """Write what is due, or leave it for later; `look` whether Redis still has what we wrote, if nothing is due."""
        if time.monotonic() < self._retry_at:
            self._keep_within_bounds()
            return
        try:
            self._publish_due()
            while self._due or (look and self._writes):
                self._write()
                look = False
            # later than what was due: in that may be what these sources were before
            for tracked in list(self._stale.values()):
                self._rewrite(tracked)
            for tracked in list(self._gone.values()):
                self._leave(tracked)
            self._backoff = _BACKOFF_S[0]
        except IndexUnavailable as error:
            self._failed(error)

    def _write(self) -> None:
        counter = self._layout.writes(self._builder)
        count: list[Command] = [("GET", counter), ("SET", counter, self._writes + 1, "EX", _COUNT_S)]
        portion, size = 0, 0
        while portion < len(self._due) and size < _PORTION:
            size += _weight(self._due[portion][1])
            portion += 1
        now, later = self._due[:portion], self._due[portion:]
        before, _, *answers = self._store.run([*count, *(command for _, command in now)])
        is_older = self._writes and int(before or 0) not in (self._writes, self._writes + 1)
        refused = {tracked.source: tracked for (tracked, _), answer in zip(now, answers, strict=True) if not answer}
        self._writes += 1
        self._due, self._due_bytes = later, self._due_bytes - size
        if not later:
            self._note_published()
        if is_older:
            self._start_over()
        elif refused:
            self._look_who_follows(list(refused.values()))

    def _look_who_follows(self, refused: list[Tracked]) -> None:
        """Find out why Redis refused what we said of some sources: others follow them now, or it began empty."""
        owners = self._store.run(
            [
                ("GET", self._layout.owner(self._layout.tag(tracked.model), _field(tracked.source)))
                for tracked in refused
            ]
        )
        for tracked, owner in zip(refused, owners, strict=True):
            if owner is None:
                self._start_over()
                return
            if owner != self._builder and self._tracked.get(tracked.source) is tracked:
                self._log.warning("source_taken_over", pod=tracked.source.pod, rank=tracked.source.rank)
                self._lost.add(tracked.source)

    def _note_published(self) -> None:
        for mirror in self._fresh:
            mirror.published = True
        self._fresh.clear()

    def _start_over(self) -> None:
        """Redis is not what it was when we wrote last: it began empty, or an older copy took over."""
        self._log.warning("redis_lost_writes", index=self._store.shown)
        self._writes = 0
        self._due, self._due_bytes = [], 0
        self._make_all_stale()
        for tracked in list(self._stale.values()):
            self._rewrite(tracked)

    def _make_all_stale(self) -> None:
        self._stale = {source: tracked for source, tracked in self._tracked.items() if source not in self._lost}

    def _leave(self, tracked: Tracked) -> None:
        """Take a forgotten source out of Redis: from one step to the next nobody sees its blocks."""
        if tracked.source not in self._tracked:
            tag, field = self._layout.tag(tracked.model), _field(tracked.source)
            (value,) = self._store.run([("HGET", self._layout.directory(tag), field)])
            records = decode_records({field: value} if value else {})
            numbers = [slot.number for record in records for slot in record.slots]
            keys = [self._layout.directory(tag), self._layout.version(tag), self._layout.retired(tag)]
            self._store.run([self._guarded(tracked, LEAVE, keys, field, _step(), *numbers)])
            self._questions.forget(tracked.model)
            self._shown.pop(tracked.source, None)
            self._lost.discard(tracked.source)
        self._gone.pop(tracked.source, None)

    def _failed(self, error: IndexUnavailable) -> None:
        for source, tracked in self._tracked.items():
            if source not in self._lost and not all(
                self._mirrors[slot].published for slot in tracked.ledger.slots.values()
            ):
                self._stale[source] = tracked
        self._counters["write_failures_total"] += 1
        self._log.warning("redis_write_failed", error=str(error), waiting_bytes=self._due_bytes)
        self._retry_at = time.monotonic() + self._backoff
        self._backoff = min(2 * self._backoff, _BACKOFF_S[1])
        self._keep_within_bounds()

    def _keep_within_bounds(self) -> None:
        if self._due_bytes > self._buffer_bytes:
            self._due, self._due_bytes = [], 0
            self._make_all_stale()

    def _publish_due(self) -> None:
        """Put the records that changed behind what is due."""
        for tracked in list(self._unpublished.values()):
            if self._tracked.get(tracked.source) is tracked and not self._is_unwritten(tracked):
                self._publish(tracked, [])
        self._unpublished.clear()
        self._changed.clear()

    def _publish(self, tracked: Tracked, gone: list[int]) -> None:
        """Put a source's record behind what is due, and slots that it no longer has."""
        tag, field = self._layout.tag(tracked.model), _field(tracked.source)
        is_new = (
            tracked.source in self._changed
            or bool(gone)
            or self._shown.get(tracked.source) != _outlook(tracked, bare=tracked.model in self._bare_models)
        )
        if is_new:
            self._questions.forget(tracked.model)
        keys = [self._layout.directory(tag), self._layout.version(tag), self._layout.retired(tag)]
        self._add(tracked, PUBLISH, keys, field, encode_record(self._record(tracked)), _step() if is_new else 0, *gone)
        self._unpublished.pop(tracked.source, None)
        self._changed.discard(tracked.source)

    def _record(self, tracked: Tracked) -> SourceRecord:
        ledger = tracked.ledger
        outlook = _outlook(tracked, bare=tracked.model in self._bare_models)
        degraded, bare, _ = self._shown[tracked.source] = outlook
        slots = [
            SlotRecord(
                self._mirrors[slot].number,
                slot.medium,
                slot.group,
                slot.block_size,
                len(slot.held),
                slot.seen is not None,
            )
            for slot in ledger.slots.values()
        ]
        groups = [(number, spec.block_size, spec.tail) for number, spec in ledger.groups.items()]
        return SourceRecord(
            *tracked.source,
            tracked.incarnation,
            tracked.fleet_wide,
            tracked.copies,
            tracked.reason,
            degraded,
            tracked.since,
            bare,
            tracked.last_seq,
            groups,
            slots,
        )

    def _rewrite(self, tracked: Tracked) -> None:
        """Write a source anew from its ledger, under new slot numbers; the old ones are swept."""
        tag, field = self._layout.tag(tracked.model), _field(tracked.source)
        directory = self._layout.directory(tag)
        owner = self._layout.owner(tag, field)
        claim: Command = ("SET", owner, self._builder, *(() if tracked.source in self._unclaimed else ("NX",)))
        before, _, now = self._store.run([("HGET", directory, field), claim, ("GET", owner)])
        self._unclaimed.discard(tracked.source)
        self._stale.pop(tracked.source, None)
        if now != self._builder:
            self._lost.add(tracked.source)
            return
        try:
            old = [slot.number for record in decode_records({field: before} if before else {}) for slot in record.slots]
            mine = [self._write_slot(tracked, slot) for slot in tracked.ledger.slots.values()]
            keys = [directory, self._layout.version(tag), self._layout.retired(tag)]
            gone = [number for number in old if number not in mine]
            record = encode_record(self._record(tracked))
            self._run_guarded(
                tracked,
                [
                    ("HSET", self._layout.models, tag, tracked.model.encode()),
                    self._guarded(tracked, PUBLISH, keys, field, record, _step(), *gone),
                ],
            )
        except IndexUnavailable:
            self._stale[tracked.source] = tracked
            raise
        self._questions.forget(tracked.model)
        self._unpublished.pop(tracked.source, None)
        self._counters["rewritten_total"] += 1

    def _write_slot(self, tracked: Tracked, slot: Slot) -> int:
        """Write the blocks of a slot under a new number, which is given."""
        number = self._new_number(tracked)
        if number < 0:
            raise IndexUnavailable(f"{self._store.shown}: all {MAX_SLOTS} slots of {tracked.model!r} are in use")
        mirror = self._mirrors[slot] = _Mirror(number, published=True)
        slot.bit = 1 << number
        for key in slot.held.values():
            mirror.keys[key] = mirror.keys.get(key, 0) + 1
        mirror.logged = len(slot.held)
        log = self._layout.log(self._layout.tag(tracked.model), number)
        commands = [self._guarded(tracked, REPLACE, [log], _log_of(slot))]
        keys = list(mirror.keys)
        for at in range(0, len(keys), AT_ONCE):
            blocks = self._layout.blocks(keys[at : at + AT_ONCE])
            commands.append(self._guarded(tracked, HOLD, blocks, bit_of(number)))
        for at in range(0, len(commands), 64):
            self._run_guarded(tracked, commands[at : at + 64])
        return number

    def _run_guarded(self, tracked: Tracked, commands: Sequence[Command]) -> None:
        answers = self._store.run(commands)
        if any(not answer for command, answer in zip(commands, answers, strict=True) if command[0] == "EVAL"):
            raise IndexUnavailable(f"{self._store.shown}: source {tracked.source} was taken over while it was written")

    # ---- going on after another builder

    def _resume(self, tracked: Tracked) -> None:
        """Take over what Redis has of a source: the builder that wrote it is gone."""
        tag = self._layout.tag(tracked.model)
        field = _field(tracked.source)
        try:
            # from here on what the builder before may still say is refused
            _, _, value = self._store.run(
                [
                    ("SET", self._layout.owner(tag, field), self._builder),
                    ("HSET", self._layout.models, tag, tracked.model.encode()),
                    ("HGET", self._layout.directory(tag), field),
                ]
            )
            records = decode_records({field: value} if value else {})
            if not records:
                return
            (record,) = records
            logs = self._store.run([("GET", self._layout.log(tag, slot.number)) for slot in record.slots])
        except IndexUnavailable as error:
            self._failed(error)
            self._stale[tracked.source] = tracked  # what is there is replaced when Redis answers
            self._unclaimed.add(tracked.source)
            return
        replays = [_replayed(log) for log in logs]
        whole = [replayed for replayed in replays if replayed is not None]
        if len(whole) < len(replays):
            self._log.warning("redis_log_unreadable", pod=tracked.source.pod, rank=tracked.source.rank)
            self._stale[tracked.source] = tracked  # begins anew under other numbers
            return
        tracked.incarnation = record.incarnation
        tracked.reason, tracked.since, tracked.last_seq = record.reason, record.since, record.last_seq
        ledger = tracked.ledger
        ledger.groups.update({number: GroupSpec(size, tail) for number, size, tail in record.groups})
        if record.bare_images:
            self._bare_models.add(tracked.model)
        for known, replayed in zip(record.slots, whole, strict=True):
            slot = Slot(known.medium, known.group, known.block_size)
            slot.bit = 1 << known.number
            slot.held, slot.copies = replayed.held, replayed.copies
            if slot.seen is not None:
                now = time.monotonic()
                slot.seen.update(dict.fromkeys(slot.held, now))
                slot.seen = slot.seen if known.ages else None
            mirror = self._mirrors[slot] = _Mirror(known.number, published=True)
            for key in slot.held.values():
                mirror.keys[key] = mirror.keys.get(key, 0) + 1
            mirror.logged = len(replayed.mentioned)
            ledger.slots[known.medium, known.group, known.block_size] = slot

    def sweep(self, budget: int = 16) -> int:
        """Take blocks that nobody sees any more out of Redis, see `Sweeper.sweep`. Raises `IndexUnavailable`."""
        done, swept = self._sweeper.sweep(budget)
        with self._lock:
            self._counters["swept_total"] += swept
        return done


def _step() -> int:
    """Give what a version grows by: to one that it never was, also in a database that began empty since."""
    return 1 + secrets.randbelow(2**31)


def _outlook(tracked: Tracked, *, bare: bool) -> _Outlook:
    """Give what may change in a record while its layout stays."""
    return tracked.degraded(), bare, [slot.seen is not None for slot in tracked.ledger.slots.values()]


def _weight(command: Command) -> int:
    """Give the bytes of a command, about."""
    return 64 + 24 * len(command) + sum(len(part) for part in command[-2:] if isinstance(part, bytes))


def _replayed(log: bytes | None) -> Replayed | None:
    """Read a log; None where not all of it can be read."""
    replayed = Replayed()
    replayed.feed(log or b"")
    return replayed if replayed.read == len(log or b"") else None


def _field(source: Source) -> bytes:
    return f"{source.rank} {source.pod}".encode()


def _counted(counts: dict[BlockKey, int], key: BlockKey, *, held: bool) -> bool:
    """Count the names of a key; say whether it is the first that came, or the last that went."""
    names = counts.get(key, 0) + (1 if held else -1)
    if names > 0:
        counts[key] = names
    else:
        counts.pop(key, None)
    return names == (1 if held else 0)


def _log_of(slot: Slot) -> bytes:
    names, keys = list(slot.held), list(slot.held.values())
    entries = [
        log_blocks(names[at : at + _ENTRY], keys[at : at + _ENTRY], held=True) for at in range(0, len(names), _ENTRY)
    ]
    return b"".join([*entries, *(log_copies(name, copies) for name, copies in slot.copies.items())])
