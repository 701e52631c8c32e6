"""Snapshots of a service: loaded at the start, from a peer or a file, and written while it runs."""

import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from indexer import snapshots
from kvevents import EventPool
from kvindex.client import open_client
from kvindex.config import SnapshotConfig

_AT_ONCE = 2
"""How many are streamed at a time; each holds one pod's blocks in memory."""
_TIMEOUT = httpx.Timeout(30.0, connect=3.0)
_CHUNK = 1 << 20


class Busy(Exception):
    """More are asked for than are given at a time."""


class Snapshots(Collector):
    """Loads, writes and streams the snapshots of a pool, and counts them. All of it may be called from any thread.

    Peers are asked with `token`, "" for none, and shown a `certificate`, a file and that of its key, if there is one.
    """

    def __init__(
        self,
        pool: EventPool,
        config: SnapshotConfig | None = None,
        *,
        token: str = "",
        certificate: tuple[str, str] | None = None,
    ) -> None:
        self._pool = pool
        self._token = token
        self._certificate = certificate
        self._config = config or SnapshotConfig()
        self._log = structlog.get_logger("kvindex")
        self._streams = threading.BoundedSemaphore(_AT_ONCE)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvindex-snapshots", daemon=True)
        self._counts = {"written": 0, "failed": 0, "given": 0}
        self._last = {"loaded_sources": 0.0, "written_bytes": 0.0, "written_seconds": 0.0, "written_at_seconds": 0.0}

    def load(self) -> bool:
        """Go on from what the first peer has that answers, else from the file; say whether there was any.

        One that cannot be used is logged with the reason, and the next is tried; without any the index starts empty.
        Raises `UserError` where it cannot be known which certificates of peers to trust.
        """
        if self._config.peers and self._load_from_peers():
            return True
        path = Path(self._config.path)
        if self._config.path and path.exists():
            try:
                self._take(path, str(path))
            except snapshots.SnapshotError as error:
                self._log.error("snapshot_not_used", error=str(error), remedy="the index starts empty")
            else:
                return True
        if self._config.path or self._config.peers:
            self._log.warning(
                "cold_start", reason="no snapshot could be used; blocks are known once they are announced"
            )
        return False

    def _load_from_peers(self) -> bool:
        with open_client(token=self._token, timeout=_TIMEOUT, certificate=self._certificate) as client:
            for address in (address for url in self._config.peers for address in _addresses_of(url)):
                try:
                    with tempfile.NamedTemporaryFile(prefix="kvindex-snapshot-") as file:
                        self._fetch(client, address, file.name)
                        self._take(Path(file.name), address)
                        return True
                except (httpx.HTTPError, httpx.InvalidURL, snapshots.SnapshotError, OSError) as error:
                    self._log.warning("peer_not_used", peer=address, error=str(error) or repr(error))
        return False

    def _fetch(self, client: httpx.Client, url: str, name: str) -> None:
        host = urlsplit(url).hostname
        length = 0
        with (
            Path(name).open("wb") as file,
            client.stream("GET", f"{url.rstrip('/')}/v1/snapshot") as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                answer.read()
                raise snapshots.SnapshotError(f"{url}: it answered {answer.status_code}: {answer.text[:200]}")
            for chunk in answer.iter_bytes(_CHUNK):
                length += len(chunk)
                if length > self._config.max_bytes:
                    raise snapshots.SnapshotError(
                        f"{host}: more than {self._config.max_bytes} bytes; raise snapshot.max_bytes"
                    )
                file.write(chunk)

    def _take(self, path: Path, source: str) -> None:
        start = time.perf_counter()
        number = self._pool.load(snapshots.read_snapshot(path))
        self._last["loaded_sources"] = number
        seconds = round(time.perf_counter() - start, 3)
        self._log.info("snapshot_loaded", source=source, sources=number, bytes=path.stat().st_size, seconds=seconds)

    def start(self) -> None:
        """Begin to write the file every so often, where there is to be one."""
        if self._config.path:
            self._thread.start()

    def close(self) -> None:
        """Write the file once more, and no more. May be called twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
            self.write()

    def write(self) -> None:
        """Write the file now. Where that fails the one before is still there, and the log says why."""
        start = time.perf_counter()
        try:
            length = snapshots.write_snapshot(Path(self._config.path), self._pool.snapshot())
        except snapshots.SnapshotError as error:
            self._counts["failed"] += 1
            self._log.error("snapshot_not_written", error=str(error))
            return
        self._counts["written"] += 1
        seconds = time.perf_counter() - start
        self._last |= {"written_bytes": length, "written_seconds": seconds, "written_at_seconds": time.time()}
        self._log.debug("snapshot_written", path=self._config.path, bytes=length, seconds=round(seconds, 3))

    def stream(self) -> Iterator[bytes]:
        """Give the bytes of a snapshot of this moment. Raises `Busy`, and `InvalidQuestion` as `EventPool.snapshot`."""
        parts = self._pool.snapshot()
        if not self._streams.acquire(blocking=False):
            raise Busy(f"{_AT_ONCE} snapshots are being given already; ask again in a moment")
        given = self._given(parts)
        return chain([next(given)], given)  # it has begun, so that it also ends where nobody reads it

    def _given(self, parts: Iterator[snapshots.Part]) -> Iterator[bytes]:
        try:
            yield from snapshots.frames(parts)
            self._counts["given"] += 1
        finally:
            self._streams.release()

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        for name, count in self._counts.items():
            yield CounterMetricFamily(f"kvindex_snapshots_{name}", f"Snapshots {name}", value=count)
        for name, value in self._last.items():
            yield GaugeMetricFamily(f"kvindex_snapshot_{name}", f"{name} of the last snapshot", value=value)

    def _run(self) -> None:
        while not self._stop.wait(self._config.interval_s):
            self.write()


def _addresses_of(url: str) -> list[str]:
    """Give a URL for each address of its name: behind that of a headless service are all replicas."""
    parts = urlsplit(url)
    try:
        port = parts.port
        if parts.scheme != "http" or not parts.hostname:
            return [url]  # a certificate is for the name
        found = socket.getaddrinfo(parts.hostname, port or 80, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return [url]  # to fail with the reason when it is asked
    hosts = dict.fromkeys(str(address[0]) for *_, address in found)
    named = [f"[{host}]" if ":" in host else host for host in hosts]
    return [parts._replace(netloc=f"{host}:{port or 80}").geturl() for host in named]
