"""A Redis of the tests' own: on a free port of loopback, without files, and it ends with them."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import redis

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")
_NUMBERS = itertools.count()


class RedisServer:
    """A server that can be killed, stopped for a while and started again in the same place."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._folder = folder
        self._options = options
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def clients(self) -> list[redis.Redis]:
        """The one client, as a cluster has several."""
        return [self.client]

    def start(self) -> None:
        own = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--loglevel", "warning"]
        self._process = subprocess.Popen(
            [BINARY, *own, "--save", "", "--appendonly", "no", *self._options], stdout=subprocess.DEVNULL
        )
        self.client = redis.Redis(port=self.port, socket_timeout=5)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.client.ping()
            except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                os.sched_yield()
            else:
                return

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(20)
        self.client.close()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)


def somewhere(server) -> str:
    """The URL of an index in a server or a cluster, with a prefix that nobody has used."""
    return f"{server.url}?prefix=t{next(_NUMBERS)}:&timeout=5"
