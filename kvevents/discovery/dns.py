"""Pods from DNS: all addresses of a name, such as a headless service has."""

import ipaddress
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta

from kvevents.discovery.base import Follow, Found
from kvevents.errors import DiscoveryError

LIFETIME_S = 5.0


class DnsFollow(Follow, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A DNS name behind which are pods, and how to follow them."""

    name: Annotated[str, Meta(min_length=1, max_length=253)]
    """The name, ``vllm.inference.svc.cluster.local``."""
    server: str = ""
    """The server to ask, ``10.96.0.10`` or ``127.0.0.1:5353``; none: the system's."""


class DnsDiscovery:
    """All addresses of a name, asked for every `interval_s`.

    An answer without addresses means that there are no pods. A name that does not exist, a server that fails or does
    not answer are no answers. IPv6 is asked for where there is no IPv4: the two are the same pods.
    """

    def __init__(self, follow: DnsFollow, *, interval_s: float) -> None:
        self._follow = follow
        self._interval_s = interval_s
        self._host, self._port = _server(follow.server)

    @property
    def label(self) -> str:
        """What the source is called in logs."""
        return f"dns {self._follow.name}"

    def watch(self, stop: threading.Event) -> Iterator[Sequence[Found]]:
        """Give the pods of each answer. Raises `DiscoveryError`."""
        while True:
            yield self.read()
            if stop.wait(self._interval_s):
                return

    def read(self) -> list[Found]:
        """Ask once. Raises `DiscoveryError`."""
        port = self._follow.service_port
        addresses = self._addresses("A") or self._addresses("AAAA")
        return [
            Found(name=address, endpoints=self._follow.endpoints(address), ip=address, port=port)
            for address in sorted(addresses, key=lambda text: ipaddress.ip_address(text).packed)
        ]

    def _addresses(self, kind: str) -> set[str]:
        import dns.exception
        import dns.resolver

        try:
            resolver = dns.resolver.Resolver(configure=not self._host)
            if self._host:
                resolver.nameservers = [self._host]
                resolver.port = self._port
            answer = resolver.resolve(
                self._follow.name, kind, raise_on_no_answer=False, lifetime=LIFETIME_S, search=not self._host
            )
        except (dns.exception.DNSException, OSError, ValueError) as error:
            raise DiscoveryError(f"{self.label}: {error}") from error
        return {record.to_text() for record in answer.rrset or ()}


def _server(text: str) -> tuple[str, int]:
    if not text:
        return "", 53
    host, colon, port = text.rpartition(":")
    try:
        if colon and (host.startswith("[") or ":" not in host):
            return ipaddress.ip_address(host.strip("[]")).compressed, int(port)
        return ipaddress.ip_address(text.strip("[]")).compressed, 53
    except ValueError as error:
        raise DiscoveryError(f"server: expected an address, '10.96.0.10' or '10.96.0.10:53', got {text!r}") from error
