"""What a pod is called: one name in all answers, whatever a router asks for it by."""

import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, TypeAlias

from kvevents.discovery.base import Found

Identity: TypeAlias = Literal["name", "ip", "ip:port"]
_ADDRESS = re.compile(r"(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>[0-9]{1,5}))?")


def identity_of(found: Found, identity: Identity) -> str:
    """Give the name that a pod is followed under; its own where the source knows no address."""
    if identity == "name" or not found.ip:
        return found.name
    if identity == "ip" or found.port is None:
        return _ip(found.ip)
    return _with_port(found.ip, found.port)


def normalise(text: str) -> str:
    """Give one spelling to all of an address: without scheme and path, lower case, IPv6 in its short form."""
    text = text.strip()
    scheme, mark, rest = text.partition("://")
    if mark and scheme.lower() in ("http", "https", "tcp", "grpc"):
        text = rest.partition("/")[0]
    text = text.lower()
    if is_ip(text):
        return _ip(text)
    found = _ADDRESS.fullmatch(text)
    if not found:
        return text
    host = _ip(found["six"] or found["host"])
    return host if found["port"] is None else _with_port(host, int(found["port"]))


def host_of(text: str) -> str:
    """Give the host of an endpoint, an address or a URL; empty where there is none."""
    text = normalise(text)
    if is_ip(text):
        return text
    found = _ADDRESS.fullmatch(text)
    return (found["six"] or found["host"]) if found else ""


def is_ip(text: str) -> bool:
    """Say whether a text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class Aliases:
    """All that the followed pods may be asked for by."""

    def __init__(self, pods: Mapping[str, Found]) -> None:
        self._names = frozenset(pods)
        self._known: dict[str, list[str]] = {}
        for name, found in pods.items():
            spellings = {normalise(name), normalise(found.name), *map(normalise, found.aliases)}
            if found.ip:
                spellings.add(_ip(found.ip))
                if found.port is not None:
                    spellings.add(_with_port(found.ip, found.port))
            for spelling in spellings:
                self._known.setdefault(spelling, []).append(name)

    def resolve(self, asked: Iterable[str]) -> list[str]:
        """Give the pods' names for what a router calls them. What nobody is called stays as it is.

        An address that several pods share means all of them.
        """
        names: dict[str, None] = {}
        for text in asked:
            exact: Collection[str] = (text,) if text in self._names else self._known.get(normalise(text), (text,))
            names.update(dict.fromkeys(exact))
        return list(names)


def _ip(text: str) -> str:
    try:
        return ipaddress.ip_address(text).compressed
    except ValueError:
        return text


def _with_port(host: str, port: int) -> str:
    host = _ip(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
