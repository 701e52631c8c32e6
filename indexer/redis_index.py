"""The index in Redis: one shared view for many builders and many scorers.

A builder keeps the ledgers of its sources in memory, as the index in this process does, and writes what they say to
Redis: the bits of each block, a record of each source, and each ledger as a log, from which a builder that was killed
goes on. What could not be written waits within bounds; where that is not enough, or where Redis lost what it had, the
source is written anew from its ledger. So a fault costs time, never truth.
"""

import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeAlias

import structlog
from redis.exceptions import OutOfMemoryError

from indexer.base import Copies, Holding, Limits, Source, SourceStatus
from indexer.errors import IndexUnavailable
from indexer.events import EngineHash
from indexer.groups import GroupSpec
from indexer.keys import BlockKey
from indexer.ledger import Change, Slot
from indexer.prompt import Prompt
from indexer.redis_layout import MAX_SLOTS, Names, field_of
from indexer.redis_log import Replayed
from indexer.redis_opening import layout_of, open_store
from indexer.redis_reader import Questions, ask
from indexer.redis_records import SlotRecord, SourceRecord, decode_records, encode_record
from indexer.redis_scripts import (
    CLAIM,
    LEAVE,
    PUBLISH,
    SWAP,
    TAKE_SLOT,
)
from indexer.redis_slots import Mirror, copies_of, holds, releases, whole_ledger
from indexer.redis_store import Command
from indexer.redis_sweep import Sweeper
from indexer.redis_url import parse_url
from indexer.redis_writer import Value, Write, Writer, Written, builder_of
from indexer.tracking import Tracked, TrackingIndex

FULL = "full: Redis has no memory for what this source holds"
UNREADABLE = "lost: what was known of this source could not be read from Redis"

_LOG_SLACK = 1024
"""A log is written anew when it has twice the entries that its slot has blocks, and so many more."""

_NUMBERS_TRIED = 8
"""Slot numbers of which something may be left somewhere before none is taken for now."""

_AT_A_TIME = 64
"""Script calls in one round trip, where a source is written anew."""

_BACKOFF_S = 0.05, 2.0

_Outlook: TypeAlias = tuple[str, bool, list[bool]]


class _Merged(NamedTuple):
    """Changes of one slot that follow each other: the more at once, the cheaper each."""

    tracked: Tracked
    slot: Slot
    mirror: Mirror
    hashes: list[EngineHash]
    keys: list[BlockKey]
    held: bool


class RedisIndex(TrackingIndex):
    """An `Index` in Redis or Valkey, one server or a cluster. All methods may be called from any thread.

    `url` is ``redis://user:password@host:port/db``, ``rediss://``, ``valkey://``, ``valkeys://`` or ``unix://path``; or
    ``redis+cluster://user:password@host:port,host:port`` and so on, with some nodes of a cluster. Its options are
    ``prefix`` of all keys (``kvindex:``) and ``timeout`` in seconds (1.0). Nothing else in the database is touched.
    `buffer_bytes` bounds what waits while Redis does not answer.

    Questions raise `IndexUnavailable` when Redis does not answer. Events never do: what they say is written when it
    does again, at the latest with the next call of `expire`.
    """

    def __init__(self, url: str, limits: Limits | None = None, *, buffer_bytes: int = 64 * 1024 * 1024) -> None:
        super().__init__(limits)
        parsed = parse_url(url)
        self._store = open_store(parsed)
        self._layout = layout_of(parsed)
        self._questions = Questions(self._layout, self._limits.block_sizes)
        self._log = structlog.get_logger("indexer")
        self._buffer_bytes = buffer_bytes
        self._writer = Writer(self._store)
        self._sweeper = Sweeper(self._store, self._layout, self._writer)
        self._mirrors: dict[Slot, Mirror] = {}
        self._merged: _Merged | None = None
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
        self._begun: dict[Source, dict[int, bytes]] = {}
        """Slot numbers under which stale sources were begun to be written, each with whose it is at the latest."""
        self._shed: set[Source] = set()
        """Stale sources of which nothing is in Redis, because it is full."""
        self._gone: dict[Source, Tracked] = {}
        """Sources that were forgotten and are still in Redis."""
        self._fresh: list[Mirror] = []
        """Mirrors whose numbers are in no record yet."""
        self._used: dict[Names, set[int]] = {}
        """Slot numbers that were ever ours."""
        self._unmarked: set[Names] = set()
        """Models of which Redis may not know any more that some of these were in use."""
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
                "write_waiting_bytes": self._writer.due_bytes,
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
        self._unpublished[tracked.source] = tracked
        for slot, hashes, keys, held in changes:
            if not keys:
                self._write_merged()
                self._write_copies(tracked, slot, hashes)
                continue
            merged = self._merged
            if merged is None or merged.slot is not slot or merged.held is not held:
                self._write_merged()
                merged = self._merged = _Merged(tracked, slot, self._mirrors[slot], [], [], held)
            merged.hashes.extend(hashes)
            merged.keys.extend(keys)

    def _write_merged(self) -> None:
        """Put the changes of a slot that followed each other behind what is due."""
        merged, self._merged = self._merged, None
        if merged is None or self._is_unwritten(merged.tracked):
            return
        tracked, _, mirror, hashes, keys, held = merged
        mirror.logged += len(hashes)
        for write in (holds if held else releases)(self._layout.of(tracked.model), tracked, mirror, hashes, keys):
            self._writer.add(write)

    def _write_copies(self, tracked: Tracked, slot: Slot, hashes: Iterable[EngineHash]) -> None:
        for write in copies_of(self._layout.of(tracked.model), tracked, slot, self._mirrors[slot], hashes):
            self._writer.add(write)

    def _is_unwritten(self, tracked: Tracked) -> bool:
        return tracked.source in self._stale or tracked.source in self._lost

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
        mirror = self._mirrors[slot] = Mirror(number)
        self._fresh.append(mirror)
        self._layout_changed(tracked)
        slot.bit = 1 << max(number, 0)
        return True

    def _new_number(self, tracked: Tracked) -> int:
        """Take the lowest slot number that is free everywhere; -1 where there is none. Raises `IndexUnavailable`."""
        names, me = self._layout.of(tracked.model), self._writer.me
        for _ in range(_NUMBERS_TRIED):
            (number,) = self._store.run([("EVAL", TAKE_SLOT, 1, names.numbers, MAX_SLOTS)], again=False)
            if number < 0:
                return -1
            self._used.setdefault(names, set()).add(number)
            claims: list[Command] = [
                ("EVAL", CLAIM, 3, part.guard(number), part.dying, part.log(number), me, number) for part in names.parts
            ]
            if all(self._store.run(claims, again=False)):
                return int(number)
            # somewhere something is left of it, from before Redis lost that it was in use: the sweep will find it
        raise IndexUnavailable(f"{self._store.shown}: what is left in {_NUMBERS_TRIED} slots has to be swept first")

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
        self._write_merged()
        self._unpublished[tracked.source] = tracked
        for slot in () if self._is_unwritten(tracked) else tracked.ledger.slots.values():
            mirror = self._mirrors[slot]
            if mirror.logged > 2 * len(slot.held) + _LOG_SLACK:
                for write in whole_ledger(self._layout.of(tracked.model), tracked, slot, mirror.number):
                    self._writer.add(write)
                mirror.logged = len(slot.held)
        self._flush()

    def _reclaim(self, tracked: Tracked, slots: Iterable[Slot]) -> None:
        """Leave slots to the sweep, in the step that takes them out of their source's record."""
        with self._lock:
            self._write_merged()
            gone = [self._mirrors.pop(slot) for slot in slots if slot in self._mirrors]
            numbers = [mirror.number for mirror in gone if mirror.number >= 0]
            if self._tracked.get(tracked.source) is tracked and not self._is_unwritten(tracked):
                self._publish(tracked, numbers)
            else:  # they go when it is written anew, or leaves, with all that its record says
                self._note_begun(tracked, numbers)
            self._flush()

    def release(self, pod: str) -> None:
        """Stop following a pod and leave what it holds in Redis to the builder that follows it from now on."""
        with self._lock:
            self._flush()
            for source in [source for source in self._tracked if source.pod == pod]:
                tracked = self._tracked.pop(source)
                for slot in tracked.ledger.slots.values():
                    self._mirrors.pop(slot, None)
                for known in (self._stale, self._unpublished, self._shown, self._begun):
                    known.pop(source, None)
                self._lost.discard(source)
                self._shed.discard(source)
                self._unclaimed.discard(source)

    # ---- writing

    def _flush(self, *, look: bool = False) -> None:
        """Write what is due, or leave it for later; `look` whether Redis still has what we wrote, if nothing is due."""
        self._write_merged()
        if time.monotonic() < self._retry_at:
            self._keep_within_bounds()
            return
        try:
            if self._writer.is_new_epoch:
                self._begin_epoch()
            self._publish_due()
            while self._writer.is_due:
                written = self._writer.write_due()
                look = False
                if not self._writer.is_due:
                    self._note_published()
                self._judge(written)
            if look and self._writer.has_written:
                self._note_models()
                self._judge(self._writer.look())
            for names in list(self._unmarked):
                # what is left of them in other parts is found by the sweep, as of all numbers that nobody came to use
                self._store.run([("SETBIT", names.numbers, number, 1) for number in self._used.get(names, ())])
                self._unmarked.discard(names)
            for tracked in [tracked for source, tracked in self._stale.items() if source not in self._shed]:
                if self._writer.is_full:
                    self._shed_source(tracked)
            # later than what was due: in that may be what these sources were before
            for tracked in list(self._stale.values()):
                self._rewrite(tracked)
            for tracked in list(self._gone.values()):
                self._leave(tracked)
            self._backoff = _BACKOFF_S[0]
        except IndexUnavailable as error:
            self._failed(error)

    def _begin_epoch(self) -> None:
        """Take what is ours over to a new epoch: nothing that was written in the one before can arrive any more."""
        guards: list[tuple[Tracked, Sequence[bytes]]] = []
        for tracked in [*self._tracked.values(), *self._gone.values()]:
            if self._is_unwritten(tracked):
                continue
            names = self._layout.of(tracked.model)
            guards.append((tracked, [names.owner(tracked.source)]))
            if self._tracked.get(tracked.source) is tracked:
                numbers = [self._mirrors[slot].number for slot in tracked.ledger.slots.values()]
                if numbers:
                    guards += [(tracked, [part.guard(number) for number in numbers]) for part in names.parts]
        self._look_who_follows(self._writer.renew(guards))

    def _judge(self, written: Written) -> None:
        if written.lost:
            self._start_over(written.lost)
        for write in written.unheld:
            if self._is_current(write):
                self._stale[write.tracked.source] = write.tracked
        self._look_who_follows(
            list({write.tracked.source: write.tracked for write in written.refused if self._is_current(write)}.values())
        )

    def _is_current(self, write: Write) -> bool:
        """Whether a write is about what its source has now: slots that it gave up may be swept already."""
        if self._is_unwritten(write.tracked):
            return False
        names = self._layout.of(write.tracked.model)
        numbers = [self._mirrors[slot].number for slot in write.tracked.ledger.slots.values() if slot in self._mirrors]
        guards = [write.part.guard(number) for number in numbers]
        return write.guard in (names.owner(write.tracked.source), *guards)

    def _look_who_follows(self, refused: Sequence[Tracked]) -> None:
        """Find out why Redis refused what we said of some sources: others follow them now, or it lost something."""
        if not refused:
            return
        owners = self._store.run([("GET", self._layout.of(tracked.model).owner(tracked.source)) for tracked in refused])
        for tracked, owner in zip(refused, owners, strict=True):
            if self._tracked.get(tracked.source) is not tracked:
                continue
            if owner is None:
                self._start_over({self._layout.of(tracked.model).tag})
            elif self._writer.is_mine(owner):
                self._stale[tracked.source] = tracked
            else:
                self._log.warning("source_taken_over", pod=tracked.source.pod, rank=tracked.source.rank)
                self._lost.add(tracked.source)

    def _note_published(self) -> None:
        for mirror in self._fresh:
            mirror.published = True
        self._fresh.clear()

    def _start_over(self, tags: set[bytes]) -> None:
        """Redis is not what it was when we wrote some models last: it began empty, or an older copy took over."""
        self._log.warning("redis_lost_writes", index=self._store.shown, models=len(tags))
        self._writer.drop(tags)
        self._make_stale(tags)
        self._unmarked.update(map(self._layout.tagged, tags))

    def _make_stale(self, tags: set[bytes] | None = None) -> None:
        for source, tracked in self._tracked.items():
            if source not in self._lost and (tags is None or self._layout.of(tracked.model).tag in tags):
                self._stale[source] = tracked

    def _leave(self, tracked: Tracked) -> None:
        """Take a forgotten source out of Redis: from one step to the next nobody sees its blocks."""
        if tracked.source not in self._tracked:
            names = self._layout.of(tracked.model)
            keys, values = self._retirement(names, self._recorded(names, tracked.source))
            field = field_of(tracked.source)
            owner = names.owner(tracked.source)
            write = Write(tracked, names.home, LEAVE, owner, keys, (field, b"", _step(), *values), frees=True)
            self._judge(self._writer.write([write]))  # refused: it is another's by now, or gone already
            self._questions.forget(tracked.model)
            self._begun.pop(tracked.source, None)
            self._shown.pop(tracked.source, None)
            self._lost.discard(tracked.source)
            self._shed.discard(tracked.source)
        self._gone.pop(tracked.source, None)

    def _failed(self, error: IndexUnavailable) -> None:
        for source, tracked in self._tracked.items():
            if source not in self._lost and not all(
                self._mirrors[slot].published for slot in tracked.ledger.slots.values()
            ):
                self._stale[source] = tracked
        self._counters["write_failures_total"] += 1
        self._log.warning("redis_write_failed", error=str(error), waiting_bytes=self._writer.due_bytes)
        self._writer.fail()
        if isinstance(error.__cause__, OutOfMemoryError) and not self._writer.is_full:
            with suppress(IndexUnavailable):
                self._writer.note_full()
        self._retry_at = time.monotonic() + self._backoff
        self._backoff = min(2 * self._backoff, _BACKOFF_S[1])
        self._keep_within_bounds()

    def _keep_within_bounds(self) -> None:
        if self._writer.due_bytes > self._buffer_bytes:
            self._writer.drop()
            self._make_stale()

    def _publish_due(self) -> None:
        """Put the records that changed behind what is due."""
        for tracked in list(self._unpublished.values()):
            if self._tracked.get(tracked.source) is tracked and not self._is_unwritten(tracked):
                self._publish(tracked, [])
        self._unpublished.clear()
        self._changed.clear()

    def _publish(self, tracked: Tracked, gone: list[int]) -> None:
        """Put a source's record behind what is due, and slots that it no longer has."""
        is_new = (
            tracked.source in self._changed
            or bool(gone)
            or self._shown.get(tracked.source) != _outlook(tracked, bare=tracked.model in self._bare_models)
        )
        if is_new:
            self._questions.forget(tracked.model)
        me = self._writer.me
        self._writer.add(self._publication(tracked, dict.fromkeys(gone, me), _step() if is_new else 0))
        self._unpublished.pop(tracked.source, None)
        self._changed.discard(tracked.source)

    def _publication(self, tracked: Tracked, gone: dict[int, bytes], step: int) -> Write:
        """Make the write of a source's record, which retires slots, each whose it was."""
        names = self._layout.of(tracked.model)
        keys, values = self._retirement(names, gone)
        record = encode_record(self._record(tracked))
        owner = names.owner(tracked.source)
        keys += [names.home.guard(self._mirrors[slot].number) for slot in tracked.ledger.slots.values()]
        # what readers see from then on has to be there; on one server it is, in the order in which it is written
        is_last = bool(step) and len(names.parts) > 1
        values = [field_of(tracked.source), record, step, *values]
        return Write(tracked, names.home, PUBLISH, owner, keys, values, frees=True, is_last=is_last)

    def _retirement(self, names: Names, gone: dict[int, bytes]) -> tuple[list[bytes], list[Value]]:
        """Give the keys and the last values of a script that retires slots."""
        keys = [names.directory, names.version, names.retired, *map(names.home.guard, gone)]
        return keys, [secrets.token_hex(8), *(value for pair in gone.items() for value in pair)]

    def _recorded(self, names: Names, source: Source) -> dict[int, bytes]:
        """Give the slots that Redis has of a source, each with whose it is."""
        (value,) = self._store.run([("HGET", names.directory, field_of(source))])
        records = decode_records({b"": value} if value else {})
        numbers = [slot.number for record in records for slot in record.slots]
        guards = self._store.run([("GET", names.home.guard(number)) for number in numbers])
        found = zip(numbers, guards, strict=True)
        known = {number: guard for number, guard in found if builder_of(guard) == records[0].builder}
        return known | self._begun.get(source, {})

    def _record(self, tracked: Tracked, *, says: str = "") -> SourceRecord:
        """Make a source's record; one that says why nothing is in Redis of it has no slots."""
        ledger = tracked.ledger
        outlook = _outlook(tracked, bare=tracked.model in self._bare_models)
        degraded, bare, _ = self._shown[tracked.source] = outlook
        known = () if says else ledger.slots.values()
        slots = [
            SlotRecord(
                self._mirrors[slot].number,
                slot.medium,
                slot.group,
                slot.block_size,
                len(slot.held),
                slot.seen is not None,
            )
            for slot in known
        ]
        groups = [(number, spec.block_size, spec.tail) for number, spec in ledger.groups.items()]
        return SourceRecord(
            *tracked.source,
            tracked.incarnation,
            tracked.fleet_wide,
            tracked.copies,
            tracked.reason,
            says or degraded,
            tracked.since,
            bare,
            tracked.last_seq,
            self._writer.builder,
            groups,
            slots,
        )

    def _shed_source(self, tracked: Tracked) -> None:
        """Take a source that Redis has no room for out of it, until there is: what it has of it is out of date."""
        if not self._keep_source(tracked):
            return
        names = self._layout.of(tracked.model)
        keys, values = self._retirement(names, self._recorded(names, tracked.source))
        record = encode_record(self._record(tracked, says=FULL))
        owner, field = names.owner(tracked.source), field_of(tracked.source)
        write = Write(tracked, names.home, PUBLISH, owner, keys, (field, record, _step(), *values), frees=True)
        written = self._writer.write([write])
        if written.unheld or written.refused:
            return
        self._log.warning("redis_full", pod=tracked.source.pod, rank=tracked.source.rank)
        self._begun.pop(tracked.source, None)
        self._shed.add(tracked.source)
        self._questions.forget(tracked.model)

    def _rewrite(self, tracked: Tracked) -> None:
        """Write a source anew from its ledger, under new slot numbers; the old ones are swept."""
        names = self._layout.of(tracked.model)
        self._stale[tracked.source] = tracked
        if not self._keep_source(tracked):
            return
        numbers = [self._mirrors[slot].number for slot in tracked.ledger.slots.values()]
        self._note_begun(tracked, [number for number in numbers if number >= 0])
        old = self._recorded(names, tracked.source)
        self._shed.discard(tracked.source)  # where this fails, what is written by then has to go
        for slot in tracked.ledger.slots.values():
            self._write_slot(tracked, slot)
        self._note_models()
        self._write_now([self._publication(tracked, old, _step())])
        self._begun.pop(tracked.source, None)
        self._stale.pop(tracked.source)
        self._unclaimed.discard(tracked.source)
        self._questions.forget(tracked.model)
        self._unpublished.pop(tracked.source, None)
        self._counters["rewritten_total"] += 1

    def _note_begun(self, tracked: Tracked, numbers: Iterable[int]) -> None:
        begun = self._begun.setdefault(tracked.source, {})
        for number in numbers:
            begun.setdefault(number, self._writer.me)

    def _note_models(self) -> None:
        """Say which models there are; in a cluster that may get lost while all else stays."""
        models = {self._layout.of(tracked.model).tag: tracked.model for tracked in self._tracked.values()}
        self._store.run([("HSET", self._layout.models, tag, name.encode()) for tag, name in models.items()], full=True)

    def _keep_source(self, tracked: Tracked) -> bool:
        """Make a stale source this builder's own again, unless another builder follows it now."""
        is_mine = self._claim(tracked, by_force=tracked.source in self._unclaimed)
        if not is_mine:
            self._stale.pop(tracked.source)
            self._lost.add(tracked.source)
        return is_mine

    def _claim(self, tracked: Tracked, *, by_force: bool) -> bool:
        """Make a source this builder's own; from then on what others still say of it is refused.

        Says no where it is another's, unless that may be gone. Raises `IndexUnavailable`.
        """
        owner = self._layout.of(tracked.model).owner(tracked.source)
        (before,) = self._store.run([("GET", owner)])
        if before is not None and not by_force and not self._writer.is_mine(before):
            return False
        swap = self._writer.script(SWAP)
        (done,) = self._store.run([("EVAL", swap, 1, owner, self._writer.me, before or b"")], again=False)
        if not done:
            raise IndexUnavailable(f"{self._store.shown}: two builders claim source {tracked.source} at once")
        return True

    def _write_slot(self, tracked: Tracked, slot: Slot) -> None:
        """Write the blocks of a slot under a new number."""
        number = self._new_number(tracked)
        if number < 0:
            raise IndexUnavailable(f"{self._store.shown}: all {MAX_SLOTS} slots of {tracked.model!r} are in use")
        mirror = self._mirrors[slot] = Mirror(number, published=True)
        self._note_begun(tracked, [number])
        slot.bit = 1 << number
        mirror.logged = len(slot.held)
        names = self._layout.of(tracked.model)
        self._write_now([*holds(names, tracked, mirror, list(slot.held), list(slot.held.values()))])
        self._write_now([*copies_of(names, tracked, slot, mirror, slot.copies)])

    def _write_now(self, writes: Sequence[Write]) -> None:
        """Write something at once, all of it. Raises `IndexUnavailable`."""
        for at in range(0, len(writes), _AT_A_TIME):
            written = self._writer.write(writes[at : at + _AT_A_TIME])
            if written.lost:
                self._start_over(written.lost)
            if written.unheld:
                raise IndexUnavailable(f"{self._store.shown}: there is no memory for more")
            if written.lost or written.refused:
                source = writes[0].tracked.source
                raise IndexUnavailable(f"{self._store.shown}: source {source} was taken over while it was written")

    # ---- going on after another builder

    def _resume(self, tracked: Tracked) -> None:
        """Take over what Redis has of a source: the builder that wrote it is gone."""
        names = self._layout.of(tracked.model)
        try:
            self._claim(tracked, by_force=True)
            _, value = self._store.run(
                [
                    ("HSET", self._layout.models, names.tag, tracked.model.encode()),
                    ("HGET", names.directory, field_of(tracked.source)),
                ]
            )
            records = decode_records({b"": value} if value else {})
            if not records:
                return
            (record,) = records
            self._used.setdefault(names, set()).update(slot.number for slot in record.slots)
            replays = [self._take_over(names, slot.number) for slot in record.slots]
        except IndexUnavailable as error:
            self._failed(error)
            self._stale[tracked.source] = tracked  # what is there is replaced when Redis answers
            self._unclaimed.add(tracked.source)
            return
        whole = [replayed for replayed in replays if replayed is not None]
        if len(whole) < len(replays):
            self._log.warning("redis_log_unreadable", pod=tracked.source.pod, rank=tracked.source.rank)
            tracked.reason, tracked.since = UNREADABLE, time.time()
            self._stale[tracked.source] = tracked  # begins anew under other numbers
            return
        tracked.incarnation = record.incarnation
        # what waited for a parent or for tokens is not in Redis: what the ledger said of that stands until a reset
        tracked.reason, tracked.since = record.reason or record.degraded, record.since or time.time()
        tracked.last_seq = record.last_seq
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
            mirror = self._mirrors[slot] = Mirror(known.number, published=True)
            for key in slot.held.values():
                mirror.keys[key] = mirror.keys.get(key, 0) + 1
            mirror.logged = len(replayed.mentioned)
            ledger.slots[known.medium, known.group, known.block_size] = slot

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
