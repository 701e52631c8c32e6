"""The contract of an index and the values that cross it. Every implementation answers the same questions alike."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from indexer.events import Events
from indexer.prompt import Prompt

Copies: TypeAlias = Literal["count", "set"]
"""How a block that is stored again is understood: another physical copy (``count``), or the same one (``set``)."""

Tier: TypeAlias = Literal["gpu", "cpu", "disk", "shared"]

TIERS: Sequence[Tier] = ("gpu", "cpu", "disk", "shared")
"""All tiers, the most useful first."""

_TIER_OF_MEDIUM: Mapping[str, Tier] = {
    "gpu": "gpu",
    "cpu": "cpu",
    "cpu_pinned": "cpu",
    "disk": "disk",
    "external": "shared",
    "shared_storage": "shared",
    "object_store": "shared",
    "storage": "shared",
}


def tier_of(medium: str) -> Tier:
    """Give the tier of an engine's word for where a block lies; words that are not known count as ``shared``."""
    return _TIER_OF_MEDIUM.get(medium.lower(), "shared")


UNREACHABLE = "unreachable"
"""What the reason begins with why a source is degraded that nobody has heard of for long: it is not scored."""


class Source(NamedTuple):
    """One cache: a data-parallel rank of a pod."""

    pod: str
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.pod}#{self.rank}" if self.rank else self.pod


class Run(NamedTuple):
    """Some tokens of a match, one after the other, that lie on the same media."""

    tokens: int
    media: tuple[str, ...]
    """All media that hold these tokens, in the engine's words, lower-case, sorted."""


class Holding(msgspec.Struct, frozen=True, gc=False):
    """What one source holds of one prompt, without a gap from its start."""

    source: Source
    tokens: int
    """What the engine's own look-up would find, in tokens; whole blocks."""
    reusable_tokens: int
    """What the engine can reuse of it: it always computes at least the last token of a prompt."""
    runs: tuple[Run, ...]
    """The `tokens` in order, by where they lie."""
    degraded: str
    """Why this answer may be wrong, "" when it is exact. Where it begins with `UNREACHABLE`, nothing is said to be
    held."""


class SourceStatus(msgspec.Struct, frozen=True):
    """What an index knows about one source."""

    source: Source
    model: str
    incarnation: int
    """How often the source began anew: registration, restart, reset."""
    blocks: int
    """Blocks held, each counted once per tier and group."""
    tiers: dict[str, int]
    """The same by tier."""
    block_sizes: list[int]
    degraded: str
    """Why answers about the source may be wrong, "" when they are exact."""
    degraded_since: float
    """When it became so (seconds since the epoch), 0.0 when exact."""
    fleet_wide: bool
    """Any pod of the model can read these blocks (shared storage)."""
    last_seq: int | None = None
    """The number of the last message that was applied, None where nobody said it."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what events can make an index remember. What goes over them is dropped and counted."""

    max_sources: int = 16_384
    """Sources known at once."""
    max_slots_per_source: int = 64
    """Combinations of medium, group and block size of one source."""
    parked_blocks: int = 65_536
    """Blocks of one source that wait for an unknown parent, or for somebody to say their tokens."""
    remembered_blocks: int = 8_192
    """Removed blocks of one source whose tokens are still known, for events that name them without tokens."""
    block_sizes: int = 8
    """Block sizes of one model that a question is asked for: those that the most sources use, on ``gpu`` before any
    other tier, and of these the largest."""
    silent_tier_ttl_s: float = 3_600.0
    """How long a block stays on a tier other than ``gpu`` whose removals the engine has never announced."""
    max_bytes: int | None = None
    """Memory of an index in this process, about. Over it the largest source's least useful tier is forgotten, as often
    as it takes; such sources are degraded. None: no bound."""


class Decoded(Protocol):
    """What one message carries, decoded. Its `events` are what `Index.apply` takes."""

    @property
    def ts(self) -> float:
        """When the engine made it, seconds since the epoch. Not for ordering."""

    @property
    def rank(self) -> int | None:
        """The data-parallel rank, None where the publisher does not say."""

    @property
    def events(self) -> Events:
        """The events in order."""

    @property
    def discards(self) -> Mapping[str, int]:
        """Events that were dropped or ignored, by reason."""

    @property
    def clears(self) -> bool:
        """Whether one of the events empties the cache."""

    @property
    def model(self) -> str | None:
        """The model that the events name, None where they do not."""


Undecodable: TypeAlias = tuple[str, str]
"""Why a payload frame is no batch at all: the reason, and a detail."""


class Decoder(Protocol):
    """What an index has that reads payload frames itself, so that nobody else has to look at their events."""

    def decode_batches(self, payloads: Sequence[bytes | memoryview], /) -> Sequence[Decoded | Undecodable]:
        """Decode payload frames in the form in which this index takes events."""

    def apply_payloads(
        self, source: Source, payloads: Sequence[bytes | memoryview], first_seq: int, /
    ) -> tuple[int, int, Sequence[Decoded | Undecodable]]:
        """Decode and apply payload frames of messages numbered `first_seq` and on, up to the first that is not plain.

        Plain is a batch of the source's rank in which every event can be used and none empties the cache. Gives how
        many were applied, how many events they had, and the rest as `decode_batches` does. Where the source is not
        registered, none is applied.
        """


class Index(Protocol):
    """Which source holds which blocks.

    Only event appliers call `register`, `apply`, `apply_all`, `restart`, `degrade`, `recount`, `expire`, `forget` and
    `release`; one caller at a time per source, any number for different sources. Every other method may be called from
    any thread at any time; answers are snapshots in which the holders of each block are whole.

    An index whose `match` waits for nobody, as one in this process, may say so with an attribute ``never_waits =
    True``: an event loop then asks it about short prompts itself.
    """

    def register(
        self, source: Source, *, model: str, copies: Copies = "count", fleet_wide: bool = False, degraded: str = ""
    ) -> None:
        """Begin to follow a source; nothing changes where it is followed already.

        Raises `LimitReached` when `Limits.max_sources` are followed.
        """

    @property
    def decoder(self) -> Decoder | None:
        """What reads payload frames for this index; None where it takes events as `indexer.events` has them."""

    def apply(self, source: Source, events: Events) -> None:
        """Apply the events of a registered source in order. Events that make no sense are counted, see `stats`.

        Raises `InvalidQuestion` when the source is not registered.
        """

    def apply_all(self, source: Source, batches: Sequence[Events], *, last_seq: int | None = None) -> None:
        """Do what `apply` does with one batch after the other; the more at once, the cheaper each.

        `last_seq` is the number of the message with the last of them, for those who ask how far the index is.
        """

    def restart(self, source: Source) -> None:
        """Forget everything the source holds, and how its cache is laid out: its engine began anew."""

    def degrade(self, source: Source, reason: str) -> None:
        """Say why answers about a source may be wrong; "" says that they are exact again."""

    def recount(self, source: Source, keys: Collection[int]) -> bool:
        """Count one physical copy on ``gpu`` of each of these blocks, where more were counted.

        For an engine that evidently computed the blocks anew: what it announced of them before, it has lost. Says no,
        and does nothing, where cache groups decide which blocks serve a prefix: there a short match does not say which
        block is missing.

        Raises `InvalidQuestion` when the source is not registered.
        """

    def surplus(self, source: Source, keys: Collection[int]) -> int:
        """Give how many more physical copies than one of each of these blocks are counted on ``gpu``.

        What `recount` would take. 0 where it would do nothing, and where this process does not follow the source.
        """

    def expire(self) -> None:
        """Drop blocks that outlived `Limits.silent_tier_ttl_s`."""

    def forget(self, pod: str) -> None:
        """Stop following all sources of a pod and give their memory back. Unknown pods are fine."""

    def release(self, pod: str) -> None:
        """Stop following a pod that somebody else follows from now on. Where nobody can, do what `forget` does."""

    def match(
        self,
        prompt: Prompt,
        *,
        pods: Collection[str] | None = None,
        block_size: int | None = None,
        holders_only: bool = False,
    ) -> list[Holding]:
        """Say what each source of the prompt's model holds of it.

        Those that hold nothing are included, unless `holders_only`. `pods` asks for these pods only; `block_size` for
        chains of blocks of this many tokens only.
        """

    def block_size(self, model: str) -> int | None:
        """Give the block size that most sources of a model use on their first tier, None before the first event."""

    def sources(self) -> list[SourceStatus]:
        """Describe all sources that are followed, by name."""

    def stats(self) -> dict[str, int]:
        """Give all counters and gauges. The names are stable; counters end in ``_total``."""

    def close(self) -> None:
        """Give back connections and memory. May be called twice."""
