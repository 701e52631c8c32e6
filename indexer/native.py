"""The index in this process, in Rust: the same answers and counters as `indexer.memory`, at the speed of memory.

What it does and how it is locked stands in `native/README.md`. Events and questions are worked on without the
interpreter lock, so workers and scorers really run beside each other.
"""

from collections.abc import Collection, Sequence

import msgspec

from indexer import _native, keys
from indexer.base import Copies, Decoder, Holding, Limits, Run, Source, SourceStatus
from indexer.errors import InvalidQuestion, LimitReached, SnapshotError
from indexer.events import Events
from indexer.keys import BlockKey, ImageItem, TokenIds, check_block_size
from indexer.prompt import Prompt
from indexer.sections import source_of


class NativeIndex:
    """An `Index` in this process. All methods may be called from any thread."""

    never_waits = True

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._index = _native.Index(self._limits, Run, Holding, SourceStatus)

    def __repr__(self) -> str:
        blocks, sources = self._index.counts()
        return f"NativeIndex({blocks} blocks, {sources} sources)"

    def register(
        self, source: Source, *, model: str, copies: Copies = "count", fleet_wide: bool = False, degraded: str = ""
    ) -> None:
        """Begin to follow a source, see `Index.register`."""
        is_new = self._index.register(source, model, copies == "count", fleet_wide)
        if is_new is None:
            raise LimitReached(
                f"source {source}: {self._limits.max_sources} sources are followed already; raise Limits.max_sources"
            )
        if is_new and degraded:
            self.degrade(source, degraded)

    @property
    def decoder(self) -> Decoder:
        """The core itself."""
        return self._index

    def apply(self, source: Source, events: Events) -> None:
        """Apply events in order, see `Index.apply`."""
        self.apply_all(source, (events,))

    def apply_all(self, source: Source, batches: Sequence[Events], *, last_seq: int | None = None) -> None:
        """Apply batch after batch, see `Index.apply_all`."""
        _require(source, found=self._index.apply(source, batches, last_seq))

    def restart(self, source: Source) -> None:
        """Forget what a source holds, see `Index.restart`."""
        _require(source, found=self._index.restart(source))

    def degrade(self, source: Source, reason: str) -> None:
        """Say why answers about a source may be wrong, see `Index.degrade`."""
        _require(source, found=self._index.degrade(source, reason))

    def recount(self, source: Source, keys: Collection[int]) -> bool:
        """Count one copy of each of these blocks, see `Index.recount`."""
        done = self._index.recount(source, list(keys))
        _require(source, found=done is not None)
        return bool(done)

    def surplus(self, source: Source, keys: Collection[int]) -> int:
        """Count the copies that `recount` would take, see `Index.surplus`."""
        return self._index.surplus(source, list(keys))

    def expire(self) -> None:
        """Drop blocks that outlived their time, see `Index.expire`."""
        self._index.expire()

    def forget(self, pod: str) -> None:
        """Stop following a pod, see `Index.forget`."""
        self._index.forget(pod)

    release = forget

    def followed(self) -> list[Source]:
        """Give all sources in the order in which they were registered, see `SnapshotIndex.followed`."""
        return self._index.followed()

    def dump(self, source: Source) -> bytes:
        """Give all that is known of a source, see `SnapshotIndex.dump`."""
        section = self._index.dump(source)
        if section is None:
            raise InvalidQuestion(f"source {source}: not registered; call register() before anything else")
        return section

    def load(self, section: bytes) -> Source:
        """Follow a source from where it was, see `SnapshotIndex.load`."""
        source = source_of(section)
        flaw = self._index.load(section, source)
        if flaw:
            raise SnapshotError(f"source {source}: {flaw}")
        return source

    def settle(self) -> None:
        """Place what waits in shared caches and is known by now, see `SnapshotIndex.settle`."""
        self._index.settle()

    def match(
        self,
        prompt: Prompt,
        *,
        pods: Collection[str] | None = None,
        block_size: int | None = None,
        holders_only: bool = False,
    ) -> list[Holding]:
        """Say what each source holds of a prompt, see `Index.match`."""
        asked = prompt if isinstance(prompt, _native.Prompt) else native_prompt(prompt)
        return self._index.match(asked, None if pods is None else list(pods), block_size, not holders_only)

    def block_size(self, model: str) -> int | None:
        """Give the usual block size of a model, see `Index.block_size`."""
        return self._index.block_size(model)

    def sources(self) -> list[SourceStatus]:
        """Describe all sources, see `Index.sources`."""
        return self._index.sources()

    def stats(self) -> dict[str, int]:
        """Give all counters and gauges, see `Index.stats`."""
        return self._index.stats()

    def close(self) -> None:
        """Forget everything."""
        self._index.close()


def native_prompt(prompt: Prompt) -> _native.Prompt:
    """Give a prompt that was made in Python to the native index."""
    return _native.Prompt(
        prompt.tokens,
        prompt.model,
        lora_name=prompt.lora_name,
        cache_salt=prompt.cache_salt,
        mm_items=prompt.images,
    )


def block_keys(
    token_ids: TokenIds,
    model: str,
    *,
    block_size: int = 16,
    lora_name: str | int | None = None,
    cache_salt: str | None = None,
    mm_items: Sequence[ImageItem] = (),
) -> list[BlockKey]:
    """Do what `indexer.keys.block_keys` does."""
    check_block_size(block_size)
    prompt = _native.Prompt(token_ids, model, lora_name=lora_name, cache_salt=cache_salt, mm_items=mm_items)
    return _native.block_keys(prompt, min(block_size, 2**32 - 1))  # no prompt is longer


def token_ids_of_json(text: bytes | memoryview | msgspec.Raw) -> bytes | memoryview:
    """Do what `indexer.keys.token_ids_of_json` does."""
    ids = _native.token_ids_of_json(text)
    return keys.token_ids_of_json(text) if ids is None else ids


def _require(source: Source, *, found: bool) -> None:
    if not found:
        raise InvalidQuestion(f"source {source}: not registered; call register() before anything else")
