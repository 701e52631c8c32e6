"""Applications on real sockets of the loopback, for tests."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading

import uvicorn

from .conftest import until


class Served:
    """A `kvindex serve` of its own process."""

    def __init__(self, process, log):
        self.process, self.log = process, log
        self.url = self.grpc = ""

    def events(self, name):
        """The lines of its log that have a name, as far as they are whole."""
        lines = [json.loads(line) for line in self.log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        return [line for line in lines if line["event"] == name]

    @property
    def address(self):
        host, port = self.url.partition("//")[2].rsplit(":", 1)
        return host, int(port)


@contextlib.contextmanager
def service(folder, *, grpc=False, **environ):
    """Run `kvindex serve` with some keys; it is there when it is given."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("KVINDEX_", "SSL_CERT"))}
    plain |= {name if name.isupper() else f"KVINDEX_{name.upper()}": str(value) for name, value in environ.items()}
    command = [sys.executable, "-m", "kvindex", "serve", "--port", "0", *(["--grpc-port", "0"] if grpc else [])]
    log = folder / f"log-{len(list(folder.iterdir()))}"
    plain["KVINDEX_LOG_FORMAT"] = "json"
    with log.open("wb") as stderr, subprocess.Popen(command, env=plain, stderr=stderr) as process:
        served = Served(process, log)
        try:
            until(lambda: served.events("serving") or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            served.url = served.events("serving")[0]["url"]
            served.grpc = served.events("serving_grpc")[0]["address"] if grpc else ""
            yield served
        finally:
            process.kill()


@contextlib.contextmanager
def serving(*apps):
    """Serve ASGI applications; give their URLs."""
    with contextlib.ExitStack() as closing:
        servers, threads, urls = [], [], []
        for app in apps:
            listener = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            urls.append(f"http://127.0.0.1:{listener.getsockname()[1]}")
            config = uvicorn.Config(app, log_level="critical", date_header=False, server_header=False)
            config.timeout_graceful_shutdown = 2
            servers.append(uvicorn.Server(config))
            threads.append(threading.Thread(target=servers[-1].run, args=([listener],), daemon=True))
            threads[-1].start()
        try:
            until(lambda: all(server.started for server in servers))
            yield urls
        finally:
            for server in servers:
                server.should_exit = True
            for thread in threads:
                thread.join(20)
        assert not any(thread.is_alive() for thread in threads)


def refusing_port():
    """Give a port of the loopback at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
