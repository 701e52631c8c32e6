"""Applications on real sockets of the loopback, for tests."""

import contextlib
import socket
import threading

import uvicorn

from .conftest import until


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
