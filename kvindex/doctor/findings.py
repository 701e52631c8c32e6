"""What a check says."""

from typing import Literal, TypeAlias

import msgspec

from kvevents import discovery

Level: TypeAlias = Literal["ok", "advice", "warn", "bad"]
"""`warn` and `bad` are troubles; `advice` is what could be better where nothing is wrong."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    check: str
    """Its name, one of few: for scripts and metrics."""
    level: Level
    what: str
    """What was seen."""
    cause: str = ""
    """Why that is, as far as it can be told; "" where all is well."""
    remedy: str = ""
    """What to do about it."""


def is_trouble(finding: Finding) -> bool:
    """Say whether something is wrong, and not only as it could be better."""
    return finding.level in ("warn", "bad")


def ok(check: str, what: str) -> Finding:
    """Say that all is well."""
    return Finding(check, "ok", what)


def one_of_same_name(name: str, others: "list[str] | set[str]") -> str | None:
    """Give another spelling of a model's name: the last part of a path, in any case."""
    short = name.rstrip("/").rpartition("/")[2].lower()
    return next((other for other in sorted(others) if other.rstrip("/").rpartition("/")[2].lower() == short), None)


def misspelt_pod(asked: str, known: "list[str] | set[str]") -> str | None:
    """Give the name that is known of the same host with another port or none, ``10.0.0.7`` for ``10.0.0.7:8000``."""
    host = discovery.host_of(asked)
    same = (name for name in sorted(known) if name != asked and discovery.host_of(name) == host)
    return next(same, None) if host else None
