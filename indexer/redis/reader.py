"""Questions to an index in Redis, without I/O: each gives rounds of commands and is sent their answers.

So the same questions are asked by threads and by an event loop. A reader keeps, for each model, what it read of the
directory, and the version of it: as long as the version is the one that is known, the bits mean what the reader takes
them for. A server is asked for the version and the blocks in one command, which it does in one step. In a cluster the
blocks lie on several nodes; there the version is asked for when all blocks were read.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from indexer.base import Holding, Limits, SourceStatus
from indexer.chains import Cache, readers_of, usual_block_size
from indexer.errors import IndexUnavailable
from indexer.groups import GroupSpec
from indexer.keys import BlockKey
from indexer.ledger import Slot
from indexer.matching import Plan, answer
from indexer.prompt import Prompt
from indexer.redis.layout import Layout, Names, holders_of
from indexer.redis.opening import opened_async
from indexer.redis.records import SourceRecord, decode_records, pairs_of
from indexer.redis.store import Command
from indexer.scan import Chunks

T = TypeVar("T")
Question: TypeAlias = Generator[list[Command], list[Any], T]

CHUNKS = Chunks(first=32, growth=16, largest=4096)
"""Many prompts leave what is cached early; those that do not are read in few rounds."""

_TRIES = 200


class _View(NamedTuple):
    version: bytes | None
    plan: Plan
    bare: bool
    block_size: int | None


class Questions:
    """What can be asked of an index in Redis. May be used by any number of threads."""

    def __init__(self, layout: Layout, block_sizes: int) -> None:
        self._layout = layout
        self._block_sizes = block_sizes
        self._views: dict[str, _View] = {}

    def forget(self, model: str) -> None:
        """Ask for the sources of a model anew."""
        self._views.pop(model, None)

    def match(
        self,
        prompt: Prompt,
        *,
        pods: Collection[str] | None = None,
        block_size: int | None = None,
        holders_only: bool = False,
    ) -> Question[list[Holding]]:
        """Ask what each source holds of a prompt, see `Index.match`."""
        model = prompt.model
        for _ in range(_TRIES):
            view = self._views.get(model)
            if view is None:
                view = yield from self._load(model)
            found = yield from self._look_up(
                view.plan.narrowed(pods, block_size), view, prompt, holders_only=holders_only
            )
            if found is not None:
                return found
            self._views.pop(model, None)
        raise IndexUnavailable(f"the sources of model {model!r} changed {_TRIES} times while a question was asked")

    def _look_up(
        self, plan: Plan, view: _View, prompt: Prompt, *, holders_only: bool
    ) -> Question[list[Holding] | None]:
        """Look a prompt up; None where the view is out of date."""
        names = self._layout.of(prompt.model)
        asked = answer(plan, prompt, bare=view.bare, chunks=CHUNKS, holders_only=holders_only, read=holders_of)
        is_checked = False
        try:
            keys = next(asked)
            while True:
                if len(names.parts) > 1:
                    values = yield from _look_up_parts(names, keys)
                else:
                    ((now, *values),) = yield [names.home.look_up(keys, names.version)]
                    if now != view.version:
                        return None
                    is_checked = True
                keys = asked.send(values)
        except StopIteration as done:
            found: list[Holding] = done.value
        if not is_checked:
            (now,) = yield [("GET", names.version)]
            if now != view.version:
                return None
        return found

    def _load(self, model: str) -> Question[_View]:
        names = self._layout.of(model)
        version, listed = yield [("GET", names.version), ("HGETALL", names.directory)]
        records = decode_records(pairs_of(listed))
        caches = [_cache_of(record) for record in records]
        view = _View(
            version,
            Plan.of(readers_of(caches, self._block_sizes)),
            any(record.bare_images for record in records),
            usual_block_size(caches),
        )
        if records:  # anybody may ask for any model: only those that exist are remembered
            self._views[model] = view
        return view

    def block_size(self, model: str) -> Question[int | None]:
        """Ask for the usual block size of a model, see `Index.block_size`.

        Nothing is asked where a match brought the answer already; what others changed since, the next match sees.
        """
        view = self._views.get(model)
        if view is None:
            view = yield from self._load(model)
        return view.block_size

    def sources(self) -> Question[list[SourceStatus]]:
        """Ask for all sources, see `Index.sources`."""
        (listed,) = yield [("HGETALL", self._layout.models)]
        models = pairs_of(listed)
        directories = (yield [("HGETALL", self._layout.tagged(tag).directory) for tag in models]) if models else []
        found = [
            _status_of(record, model.decode("utf-8", "replace"))
            for model, directory in zip(models.values(), directories, strict=True)
            for record in decode_records(pairs_of(directory))
        ]
        found.sort(key=lambda status: status.source)
        return found


class AsyncRedisReader:
    """Questions to an index in Redis from an event loop; it follows no sources. `url` as for `RedisIndex`."""

    def __init__(self, url: str, limits: Limits | None = None) -> None:
        self._store, layout = opened_async(url)
        self._questions = Questions(layout, (limits or Limits()).block_sizes)

    async def match(
        self,
        prompt: Prompt,
        *,
        pods: Collection[str] | None = None,
        block_size: int | None = None,
        holders_only: bool = False,
    ) -> list[Holding]:
        """Do what `Index.match` does. Raises `IndexUnavailable`."""
        question = self._questions.match(prompt, pods=pods, block_size=block_size, holders_only=holders_only)
        try:
            commands = next(question)
            while True:
                commands = question.send(await self._store.run(commands))
        except StopIteration as done:
            found: list[Holding] = done.value
            return found

    async def close(self) -> None:
        """Give all connections back. May be called twice."""
        await self._store.close()


def ask(question: Question[T], run: Callable[[list[Command]], list[Any]]) -> T:
    """Ask a question by whatever runs its commands."""
    try:
        commands = next(question)
        while True:
            commands = question.send(run(commands))
    except StopIteration as done:
        answered: T = done.value
        return answered


def _look_up_parts(names: Names, keys: Sequence[BlockKey]) -> Question[list[bytes | None]]:
    """Look blocks up, each with the part that it belongs to."""
    divided = names.divide(keys)
    answers = yield [part.look_up([keys[place] for place in places]) for part, places in divided]
    values: list[bytes | None] = [None] * len(keys)
    for (_, places), found in zip(divided, answers, strict=True):
        for place, value in zip(places, found, strict=True):
            values[place] = value
    return values


def _cache_of(record: SourceRecord) -> Cache:
    slots = []
    for known in record.slots:
        slot = Slot(known.medium, known.group, known.block_size)
        slot.bit = 1 << known.number
        slots.append(slot)
    groups = {number: GroupSpec(size, tail) for number, size, tail in record.groups}
    return Cache(record.source, slots, groups, record.fleet_wide, lambda: record.degraded)


def _status_of(record: SourceRecord, model: str) -> SourceStatus:
    tiers: dict[str, int] = {}
    for slot in _cache_of(record).slots:
        tiers.setdefault(slot.tier, 0)
    for known in record.slots:
        tiers[Slot(known.medium, known.group, known.block_size).tier] += known.blocks
    return SourceStatus(
        source=record.source,
        model=model,
        incarnation=record.incarnation,
        blocks=sum(tiers.values()),
        tiers=tiers,
        block_sizes=sorted({slot.block_size for slot in record.slots}),
        degraded=record.degraded,
        degraded_since=record.since if record.degraded else 0.0,
        fleet_wide=record.fleet_wide,
        last_seq=record.last_seq,
    )
