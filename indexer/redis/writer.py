"""What a builder has to write: in order, in portions, within bounds, and so that it learns when Redis lost some of
it.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from redis.exceptions import OutOfMemoryError

from indexer.base import Source
from indexer.redis.layout import Part
from indexer.redis.scripts import RENEW, WHEN_FULL
from indexer.redis.store import Command, Store, unavailable
from indexer.tracking import Tracked

_PORTION = 256 * 1024
"""Bytes, about, that are written in one round trip: each has the time that an answer may take."""

_FREES_SINCE = 7
"""The version of Redis from which on scripts can be done though it is full."""

_RENEWED = 512
"""Script calls for a new epoch in one round trip."""

_COUNT_S = 86_400
"""How long a builder's count of writes outlives it."""

Value: TypeAlias = bytes | int | str


class Write(NamedTuple):
    """A script call that does nothing once another builder writes what it is about."""

    tracked: Tracked
    """Whose it is."""
    part: Part
    script: str
    guard: bytes
    """The key that says who writes."""
    keys: Sequence[bytes]
    values: Sequence[Value]
    frees: bool = False
    """It makes room, or says that there is too little: it has to be done also where Redis is full."""
    is_last: bool = False
    """It must not be done before all that is due before it, wherever that is."""

    @property
    def weight(self) -> int:
        """Its bytes, about."""
        return (
            64
            + 24 * (len(self.keys) + len(self.values))
            + sum(len(value) for value in self.values if isinstance(value, bytes))
        )


class Written(NamedTuple):
    """What became of a portion."""

    refused: list[Write]
    """What was not done: somebody else writes that now, or Redis lost who does."""
    lost: set[bytes]
    """Tags of models of which Redis lost what was written before."""
    unheld: list[Write]
    """What was not done because Redis is full."""


class Writer:
    """One builder's writes. One thread at a time.

    It counts its writes with each part of a model: a server that began empty, or an older copy that took over, has
    another count. After a failure nobody knows what was done, and what was not done may still come: so `fail` begins a
    new epoch, and all that is the builder's own has to be taken over to it with `renew` before anything else is
    written.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.builder = os.urandom(8).hex().encode()
        self._epoch = 0
        self.is_new_epoch = False
        """Something has failed; `renew` first."""
        self._counts: dict[bytes, tuple[int, Part]] = {}
        self._due: list[Write] = []
        self.due_bytes = 0
        self._can_free: bool | None = None
        """Whether Redis knows scripts that are done though it is full; None: not asked yet."""
        self.is_full = False
        """Redis has no memory for more, and what frees some has to be marked as such."""

    @property
    def me(self) -> bytes:
        """What this builder writes where it says what is its own."""
        return b"%b.%d" % (self.builder, self._epoch)

    def is_mine(self, owner: bytes | None) -> bool:
        """Whether a guard says that something is this builder's own."""
        return builder_of(owner) == self.builder

    def add(self, write: Write) -> None:
        """Put something behind what is due."""
        self._due.append(write)
        self.due_bytes += write.weight

    @property
    def is_due(self) -> bool:
        """Whether something is due."""
        return bool(self._due)

    @property
    def has_written(self) -> bool:
        """Whether there is anything that Redis could lose."""
        return bool(self._counts)

    def drop(self, tags: Iterable[bytes] | None = None) -> None:
        """Forget what is due about some models, or about all, and what was written of them."""
        gone = None if tags is None else set(tags)
        self._due = [] if gone is None else [write for write in self._due if write.part.tag not in gone]
        self.due_bytes = sum(write.weight for write in self._due)
        if gone is not None:
            self._counts = {key: known for key, known in self._counts.items() if known[1].tag not in gone}

    def write_due(self) -> Written:
        """Write a portion of what is due. Raises `IndexUnavailable`; then all of it is still due."""
        portion, size = 0, 0
        while portion < len(self._due) and size < _PORTION and not (portion and self._due[portion].is_last):
            size += self._due[portion].weight
            portion += 1
        written = self.write(self._due[:portion])
        del self._due[:portion]
        self.due_bytes -= size
        return written

    def look(self) -> Written:
        """Find out whether Redis still has what was written. Raises `IndexUnavailable`."""
        return self._write([], [part for _, part in self._counts.values()])

    def write(self, writes: Sequence[Write]) -> Written:
        """Write something now. Raises `IndexUnavailable`; parts of it may have been done, or be done later."""
        return self._write(writes, list({id(write.part): write.part for write in writes}.values()))

    def _write(self, writes: Sequence[Write], parts: Sequence[Part]) -> Written:
        commands: list[Command] = []
        counters = [part.writes(self.builder) for part in parts]
        for key in counters:
            count, _ = self._counts.get(key, (0, None))
            commands += [("GET", key), ("SET", key, count + 1, "EX", _COUNT_S)]
        commands += [self._command(write) for write in writes]
        answers = self._store.run(commands, again=False, full=True)
        full = [answer for answer in answers if isinstance(answer, OutOfMemoryError)]
        if full and not self.is_full:  # then some of it can be done with another word
            self.note_full()
            raise unavailable(self._store.shown, full[0]) from full[0]
        if not full and not all(write.frees for write in writes):
            self.is_full = False
        lost = set()
        counted = zip(counters, parts, answers[::2], answers[1::2], strict=False)
        for key, part, before, after in counted:
            count, _ = self._counts.get(key, (0, None))
            if count and int(before or 0) not in (count, count + 1):
                lost.add(part.tag)
            if not isinstance(after, OutOfMemoryError):
                self._counts[key] = (count + 1, part)
        done = list(zip(writes, answers[2 * len(counters) :], strict=True))
        return Written(
            [write for write, answer in done if not isinstance(answer, OutOfMemoryError) and not answer],
            lost,
            [write for write, answer in done if isinstance(answer, OutOfMemoryError)],
        )

    def note_full(self) -> None:
        """Hear that Redis has no memory for more. Raises `IndexUnavailable`."""
        if self._can_free is None:
            (said,) = self._store.run([("INFO", b"server")])
            version = re.search(rb"redis_version:(\d+)", said)
            self._can_free = version is not None and int(version[1]) >= _FREES_SINCE
        self.is_full = self._can_free

    def script(self, script: str) -> str:
        """Give a script as it has to be sent where it frees memory, or says that it has to be."""
        return WHEN_FULL + script if self.is_full else script

    def _command(self, write: Write) -> Command:
        script = self.script(write.script) if write.frees else write.script
        return ("EVAL", script, len(write.keys) + 1, write.guard, *write.keys, self.me, *write.values)

    def fail(self) -> None:
        """Begin a new epoch: what was written in the one before and is still on its way will be refused."""
        self._epoch += 1
        self.is_new_epoch = True

    def renew(self, guards: Sequence[tuple[Tracked, Sequence[bytes]]]) -> list[Tracked]:
        """Take guards over to the epoch, each time those of one part; give the sources that lost some.

        Raises `IndexUnavailable`.
        """
        lost: dict[Source, Tracked] = {}
        for at in range(0, len(guards), _RENEWED):
            some = guards[at : at + _RENEWED]
            commands: list[Command] = [("EVAL", self.script(RENEW), len(keys), *keys, self.me) for _, keys in some]
            answers = self._store.run(commands, again=False)
            lost |= {tracked.source: tracked for (tracked, _), answer in zip(some, answers, strict=True) if answer}
        self.is_new_epoch = False
        return list(lost.values())


def builder_of(owner: bytes | None) -> bytes | None:
    """Read what a guard says: the builder whose something is."""
    return None if owner is None else owner.rpartition(b".")[0]
