"""Pods from a file that is watched: written by a script, a ConfigMap, a tool of one's own."""

import threading
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import yaml

from kvevents.discovery.base import Found
from kvevents.discovery.entry import PodEntry, found_in
from kvevents.errors import DiscoveryError, SubscriptionError

MAX_BYTES = 16 * 1024 * 1024


class FileDiscovery:
    """A list of pods in YAML, JSON or TOML, looked at every `interval_s`.

    The file is the list itself or has it under `pods`, in the form of the configuration's ``[[pods]]``. It is read
    whole each time rather than when its date says so: a ConfigMap's files are links whose dates mean little.
    """

    def __init__(self, path: Path, *, interval_s: float) -> None:
        self._path = path
        self._interval_s = interval_s

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
            text = data.decode()
            raw = tomllib.loads(text) if self._path.suffix == ".toml" else yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError) as error:
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
            return found_in(msgspec.convert(raw, list[PodEntry]))
        except (msgspec.ValidationError, SubscriptionError) as error:
            raise DiscoveryError(f"{self.label}: {error}") from error
