"""`kvindex serve`: events in, scores out over HTTP."""

import contextlib
import signal
import socket
from collections.abc import Iterator

import structlog
import uvicorn

from indexer import Leases, Limits, open_index
from kvevents import EventPool, KVEventsError
from kvindex.config import Config, PodConfig
from kvindex.errors import UserError
from kvindex.http import create_app
from kvindex.sharing import SharedPods
from scorer import PrefixScorer


def run_serve(config: Config) -> int:
    """Run until SIGTERM or SIGINT. Raises `UserError` when the port or an endpoint cannot be had."""
    log = structlog.get_logger("kvindex")
    follows = config.index.role != "scorer"
    if not follows and config.index.url.startswith("memory:"):
        raise UserError(
            f"index.role scorer: {config.index.url} is in this process alone; name a shared one, redis://..."
        )
    listener = _listen(config.http.host, config.http.port)
    index = open_index(config.index.url, limits=Limits(max_bytes=config.index.max_bytes))
    pool = EventPool(
        index,
        workers=config.pool.workers,
        model=config.pool.model,
        copies=config.pool.copies,
        on_gap=config.pool.on_gap,
        pod_timeout_s=config.pool.pod_timeout_s,
        silent_timeout_s=config.pool.silent_timeout_s,
    )
    with contextlib.ExitStack() as running:
        if follows:
            running.enter_context(pool)
            try:
                for bound in config.bind:
                    pool.bind(bound.endpoint, topic=bound.topic, model=bound.model)
                _follow(config, pool, running)
            except KVEventsError as error:
                raise UserError(str(error)) from error
        scorer = PrefixScorer(index, config.scorer.block_size, tier_weights=config.scorer.tier_weights)
        app = create_app(
            scorer, index, pool, max_tokens=config.http.max_tokens, max_body_bytes=config.http.max_body_bytes
        )
        host, port = listener.getsockname()[:2]
        pods = len(config.pods) if follows else 0
        log.info("serving", url=f"http://{host}:{port}", role=config.index.role, pods=pods, index=repr(index))
        server = _Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on"))
        server.run(sockets=[listener])
        log.info("stopped")
    index.close()
    return 0


def _follow(config: Config, pool: EventPool, running: contextlib.ExitStack) -> None:
    """Subscribe the pods; where others build the same index too, a share of them."""

    def subscribe(pod: PodConfig) -> None:
        pool.subscribe(pod.pod, pod.endpoint, replay=pod.replay, model=pod.model, topic=pod.topic, copies=pod.copies)

    if config.index.url.startswith("memory:"):
        for pod in config.pods:
            subscribe(pod)
    elif config.pods:
        shared = SharedPods(pool, Leases(config.index.url), config.pods, subscribe)
        shared.start()
        running.callback(shared.close)


class _Server(uvicorn.Server):
    """Uvicorn's, but after SIGTERM or SIGINT `run` returns, so that the pool and the index are closed too."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    try:
        listener = socket.create_server((host, port), backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"http.port {port} on {host}: {error}; choose another with --port or KVINDEX_HTTP_PORT"
        ) from error
    # asyncio does it only for sockets it made: without it each answer on a kept connection waits 40 ms
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
