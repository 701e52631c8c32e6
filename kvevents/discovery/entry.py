"""A pod as a person or a program writes it down: in a configuration, a file or a request."""

from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from indexer import Copies
from kvevents.discovery.base import Endpoint, Found, Ranks, of_ranks
from kvevents.discovery.identity import host_of, is_ip
from kvevents.errors import SubscriptionError

_Text = Annotated[str, Meta(min_length=1, max_length=1_024)]
_Perhaps = Annotated[str, Meta(max_length=1_024)]


class RankEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank of several that are listed."""

    endpoint: _Text
    """What it publishes at."""
    replay: _Text | None = None
    """Where its replay socket is."""


class PodBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to follow a pod: `endpoint` of rank 0 and how many `ranks`, or all `endpoints` one by one."""

    endpoint: _Text | None = None
    """What rank 0 publishes at, ``tcp://10.0.0.7:5557``."""
    replay: _Text | None = None
    """Where its replay socket is; without it lost messages stay lost."""
    ranks: Ranks = 1
    """How many data-parallel ranks there are, or which; each publishes at the port plus its number."""
    endpoints: Annotated[list[RankEntry], Meta(max_length=1_024)] = []
    """In the place of ``endpoint``: all ranks one by one."""
    model: _Perhaps = ""
    """The model that it serves; the topic's where nothing is said."""
    topic: _Perhaps = ""
    """Prefix of the topics to hear."""
    copies: Copies | None = None
    """As in ``[pool]``, for this pod."""
    uid: _Perhaps = ""
    """Which life of the pod it is: with another one the pod begins anew."""
    address: _Perhaps = ""
    """Where its API is, ``10.0.0.7:8000``, if a router may ask for it by that."""

    def __post_init__(self) -> None:
        self.ends()

    def ends(self) -> tuple[Endpoint, ...]:
        """Give the endpoints of all ranks. Raises `SubscriptionError` where they do not make sense."""
        if (self.endpoint is None) == (not self.endpoints):
            raise SubscriptionError("endpoint: expected it, or the list 'endpoints' of all ranks, and not both")
        if self.endpoint is not None:
            first = Endpoint(self.endpoint, self.replay, self.model, self.topic, self.copies)
            return of_ranks(first, self.ranks)
        if self.replay is not None or self.ranks != 1:
            raise SubscriptionError("endpoints: each has its own 'replay', and their number is that of the ranks")
        return tuple(
            of_ranks(Endpoint(one.endpoint, one.replay, self.model, self.topic, self.copies), 1)[0]
            for one in self.endpoints
        )


class PodEntry(PodBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pod by name. Several entries of one name are several ranks of it."""

    pod: _Text
    """What the router calls it."""


def found_of(name: str, bodies: Sequence[PodBody], *, shared: bool = True) -> Found:
    """Give one pod from all that is said of it. Raises `SubscriptionError` where that does not make sense."""
    endpoints = tuple(one for body in bodies for one in body.ends())
    names = [one.endpoint for one in endpoints]
    twice = next((one for one in names if names.count(one) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise SubscriptionError(f"pod {name!r}: endpoint {twice!r} is there twice")
    hosts = [host for host in map(host_of, names) if is_ip(host)]
    known = [body.address for body in bodies if body.address] + [host_of(body.address) for body in bodies]
    aliases = tuple(dict.fromkeys(alias for alias in known + hosts if alias))
    uid = next((body.uid for body in bodies if body.uid), "")
    return Found(name=name, endpoints=endpoints, uid=uid, aliases=aliases, shared=shared)


def found_in(entries: Iterable[PodEntry]) -> list[Found]:
    """Give all pods of a list. Raises `SubscriptionError`."""
    pods: dict[str, list[PodBody]] = {}
    for entry in entries:
        pods.setdefault(entry.pod, []).append(entry)
    return [found_of(name, bodies) for name, bodies in pods.items()]
