"""What a source of pods says, and what it is asked."""

import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, Protocol, TypeAlias

import msgspec
from msgspec import Meta

from indexer import Copies
from kvevents.endpoints import MAX_PORT, endpoint_of_rank, tcp
from kvevents.errors import SubscriptionError

MAX_RANKS = 1_024
Port: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_PORT)]
Ranks: TypeAlias = (
    Annotated[int, Meta(ge=1, le=MAX_RANKS)] | Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
)
"""How many ranks a pod has, or which (one node of several has ranks 8 to 15, say)."""


class Endpoint(msgspec.Struct, frozen=True):
    """Where one rank publishes, and how to follow it: what `EventPool.subscribe` takes."""

    endpoint: str
    replay: str | None = None
    model: str = ""
    topic: str = ""
    copies: Copies | None = None


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A pod, as a source of pods sees it. One that differs from what it was in anything is subscribed anew."""

    name: str
    endpoints: tuple[Endpoint, ...]
    uid: str = ""
    """Of this life of the pod, where the source knows: the same name with another one is another cache."""
    ip: str = ""
    port: int | None = None
    """Where its API is, which is what a router calls it by."""
    aliases: tuple[str, ...] = ()
    """What else it may be asked for by."""
    shared: bool = True
    """Whether other builders of the index find it too, so that it is divided among them."""

    def ends(self) -> list[str]:
        """Give where its ranks publish."""
        return [one.endpoint for one in self.endpoints]


class Discovery(Protocol):
    """A source of pods."""

    @property
    def label(self) -> str:
        """What the source is called in logs, with the thing it looks at."""

    def watch(self, stop: threading.Event) -> Iterator[Sequence[Found]]:
        """Give all pods that there are, now and whenever that may have changed, until `stop` is set.

        Raises `DiscoveryError` when the source cannot be asked: what it said last holds, and `watch` is called again.
        """


class Follow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to follow pods of which a source tells only the address."""

    port: Port = 5557
    """Where rank 0 publishes; rank n at the port plus n."""
    replay_port: Port | None = None
    """The same for replays."""
    ranks: Ranks = 1
    """How many data-parallel ranks a pod has, or which."""
    model: str = ""
    """The model that they serve, where the source of pods does not say."""
    topic: str = ""
    """Prefix of the topics to hear."""
    copies: Copies | None = None
    """As in ``[pool]``, for these pods."""
    service_port: Port = 8000
    """The port of the pods' API, for the identity ``ip:port``."""

    def __post_init__(self) -> None:
        self.endpoints("192.0.2.1")  # any will do to see whether the ports can be

    def endpoints(self, host: str, model: str = "") -> tuple[Endpoint, ...]:
        """Give the endpoints of all ranks of a pod. Raises `SubscriptionError` for ranks that cannot be."""
        replay = tcp(host, self.replay_port) if self.replay_port is not None else None
        one = Endpoint(tcp(host, self.port), replay, model or self.model, self.topic, self.copies)
        return of_ranks(one, self.ranks)


def of_ranks(first: Endpoint, ranks: int | list[int]) -> tuple[Endpoint, ...]:
    """Give the endpoints of all ranks from what those of rank 0 would be.

    Raises `SubscriptionError` for ports that there are not, and where the replay of one rank would be where another
    one publishes: that port answers in another protocol.
    """
    numbers = range(ranks) if isinstance(ranks, int) else sorted(set(ranks))
    if len(numbers) > MAX_RANKS:
        raise SubscriptionError(f"ranks: expected at most {MAX_RANKS}, got {len(numbers)}")
    found = tuple(
        Endpoint(
            endpoint_of_rank(first.endpoint, rank),
            endpoint_of_rank(first.replay, rank) if first.replay is not None else None,
            first.model,
            first.topic,
            first.copies,
        )
        for rank in numbers
    )
    replays = {one.replay for one in found if one.replay is not None}
    both = {one.endpoint for one in found} & replays
    if both:
        raise SubscriptionError(
            f"replay {min(both)!r} is also where another rank publishes; start the engines with the replay "
            f"port at least {len(found)} from the port of the events"
        )
    return found
