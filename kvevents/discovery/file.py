"""Pods from a file that is watched: written by a script, a ConfigMap, a tool of one's own."""

import threading
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta

from kvevents.discovery.base import Found
from kvevents.discovery.entry import PodEntry, found_in
from kvevents.errors import DiscoveryError, SubscriptionError

MAX_BYTES = 4 * 1024 * 1024
MAX_ENTRIES = 65_536
MAX_NODES = 1_000_000
_BROKEN = (UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError, msgspec.DecodeError, RecursionError, ValueError)


class FileDiscovery:
    """A list of pods in YAML, JSON or TOML, looked at every `interval_s`.

    The file is the list itself or has it under `pods`, in the form of the configuration's ``[[pods]]``. It is read
    whole each time rather than when its date says so: a ConfigMap's files are links whose dates mean little. What it
    means is worked out only where it has changed.
    """

    def __init__(self, path: Path, *, interval_s: float) -> None:
        self._path = path
        self._interval_s = interval_s
        self._known: tuple[bytes, list[Found]] | None = None
        """What was read last, and what it meant."""

    @property
    def label(self) -> str:
        """What the source is called in logs."""
        return f"file {self._path}"

    def watch(self, stop: threading.Event) -> Iterator[Sequence[Found]]:
        """Give the pods of the file each time it was looked at. Raises `DiscoveryError`, also for half a file."""
        while True:
            yield self.read()
            if stop.wait(self._interval_s):
                return

    def read(self) -> list[Found]:
        """Read the file. Raises `DiscoveryError`."""
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise DiscoveryError(f"{self.label}: larger than {MAX_BYTES} bytes")
            if self._known is not None and self._known[0] == data:
                return self._known[1]
            raw = self._parse(data.decode())
        except (*_BROKEN, OSError) as error:
            raise DiscoveryError(f"{self.label}: {' '.join(str(error).split())}") from error
        if isinstance(raw, dict):
            unknown = sorted(str(key) for key in raw if key != "pods")
            if unknown or "pods" not in raw:
                raise DiscoveryError(f"{self.label}: expected a list of pods under 'pods', got {unknown or 'nothing'}")
            raw = raw["pods"]
        if raw is None:
            # also what is there while somebody writes it; a fleet of no pods is written as []
            raise DiscoveryError(f"{self.label}: it is empty; write [] where there are no pods")
        try:
            found = found_in(msgspec.convert(raw, Annotated[list[PodEntry], Meta(max_length=MAX_ENTRIES)]))
        except (msgspec.ValidationError, SubscriptionError) as error:
            raise DiscoveryError(f"{self.label}: {error}") from error
        self._known = data, found
        return found

    def _parse(self, text: str) -> Any:  # noqa: ANN401  (whatever somebody wrote)
        match self._path.suffix:
            case ".toml":
                return tomllib.loads(text)
            case ".json":
                return msgspec.json.decode(text)
            case _:
                return yaml.load(text, _Loader)  # noqa: S506  (a safe loader)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which an alias of an alias of an alias cannot make expand without bounds."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        """How many nodes there are, with those that aliases stand for."""
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401  (PyYAML's)
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML says no types
        before = self._nodes
        self._nodes += self._sizes.get(event.anchor or "", 1) if isinstance(event, yaml.AliasEvent) else 1
        if self._nodes > MAX_NODES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_NODES} values, aliases included", event.start_mark
            )
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.NodeEvent) and event.anchor and not isinstance(event, yaml.AliasEvent):
            self._sizes[event.anchor] = self._nodes - before
        return node
