"""What is a builder's own in Redis: how it claims sources, and finds out what it lost, to others or to a fault."""

from collections.abc import Collection, Sequence

import structlog

from indexer.errors import IndexUnavailable
from indexer.redis.changes import Mirrors
from indexer.redis.layout import Layout
from indexer.redis.numbers import Numbers
from indexer.redis.scripts import SWAP
from indexer.redis.standing import Standing
from indexer.redis.store import Store
from indexer.redis.writer import Write, Writer, Written
from indexer.tracking import Tracked


class Ownership:
    """The sources of one builder, as Redis knows whose they are. One thread at a time."""

    def __init__(
        self, store: Store, layout: Layout, writer: Writer, standing: Standing, numbers: Numbers, mirrors: Mirrors
    ) -> None:
        self._store = store
        self._layout = layout
        self._writer = writer
        self._standing = standing
        self._numbers = numbers
        self._mirrors = mirrors
        self._log = structlog.get_logger("indexer")

    def claim(self, tracked: Tracked, *, by_force: bool) -> bool:
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

    def begin_epoch(self) -> None:
        """Take what is ours over to a new epoch: nothing that was written in the one before can arrive any more.

        Raises `IndexUnavailable`.
        """
        guards: list[tuple[Tracked, Sequence[bytes]]] = []
        for tracked in [*self._standing.followed, *self._standing.gone.values()]:
            if self._standing.is_unwritten(tracked):
                continue
            names = self._layout.of(tracked.model)
            guards.append((tracked, [names.owner(tracked.source)]))
            if self._standing.is_followed(tracked):
                numbers = self._mirrors.numbers(tracked)
                if numbers:
                    guards += [(tracked, [part.guard(number) for number in numbers]) for part in names.parts]
        self._look_who_follows(self._writer.renew(guards))

    def judge(self, written: Written) -> None:
        """Find out what it means that some writes were not done. Raises `IndexUnavailable`."""
        if written.lost:
            self.start_over(written.lost)
        for write in written.unheld:
            if self._is_current(write):
                self._standing.call_stale(write.tracked)
        self._look_who_follows(
            list({write.tracked.source: write.tracked for write in written.refused if self._is_current(write)}.values())
        )

    def start_over(self, tags: Collection[bytes]) -> None:
        """Redis is not what it was when we wrote some models last: it began empty, or an older copy took over."""
        self._log.warning("redis_lost_writes", index=self._store.shown, models=len(tags))
        self._writer.drop(tags)
        self.call_all_stale(tags)
        for tag in tags:
            self._numbers.doubt(self._layout.tagged(tag))

    def call_all_stale(self, tags: Collection[bytes] | None = None) -> None:
        """Have all sources that are ours written anew, or all of some models."""
        for tracked in self._standing.followed:
            if tracked.source not in self._standing.lost and (
                tags is None or self._layout.of(tracked.model).tag in tags
            ):
                self._standing.call_stale(tracked)

    def _is_current(self, write: Write) -> bool:
        """Whether a write is about what its source has now: slots that it gave up may be swept already."""
        if self._standing.is_unwritten(write.tracked):
            return False
        names = self._layout.of(write.tracked.model)
        guards = [write.part.guard(number) for number in self._mirrors.numbers(write.tracked)]
        return write.guard in (names.owner(write.tracked.source), *guards)

    def _look_who_follows(self, refused: Sequence[Tracked]) -> None:
        """Find out why Redis refused what we said of some sources: others follow them now, or it lost something."""
        if not refused:
            return
        owners = self._store.run([("GET", self._layout.of(tracked.model).owner(tracked.source)) for tracked in refused])
        for tracked, owner in zip(refused, owners, strict=True):
            if not self._standing.is_followed(tracked):
                continue
            if owner is None:
                self.start_over({self._layout.of(tracked.model).tag})
            elif self._writer.is_mine(owner):
                self._standing.call_stale(tracked)
            else:
                self._log.warning("source_taken_over", pod=tracked.source.pod, rank=tracked.source.rank)
                self._standing.lost.add(tracked.source)
