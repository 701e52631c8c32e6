"""`kvindex serve`: events in, scores out over HTTP and, where it is asked for, gRPC."""

import contextlib
import gc
import socket

import structlog
import uvicorn
from msgspec import UNSET

from indexer import Limits, open_index
from kvevents import EventPool, KVEventsError
from kvindex.access import Access, read_tokens
from kvindex.answers import AnswerMetrics
from kvindex.checks import Checks
from kvindex.config import Config
from kvindex.errors import UserError
from kvindex.gate import Gate
from kvindex.http import create_app
from kvindex.leaving import Server
from kvindex.pods import follow
from kvindex.renewal import Renew, Renewal
from kvindex.rpc import serve_grpc
from kvindex.snapshots import Snapshots
from kvindex.tls import open_tls
from kvindex.tokenizing import open_prompts
from kvindex.tracing import open_tracing
from scorer import PrefixScorer

_BACKLOG = 2_048


def run_serve(config: Config) -> int:
    """Run until SIGTERM or SIGINT. Raises `UserError` when the port or an endpoint cannot be had."""
    log = structlog.get_logger("kvindex")
    follows = config.index.role != "scorer"
    if not follows and config.index.url.startswith("memory:"):
        raise UserError(
            f"index.role scorer: {config.index.url} is in this process alone; name a shared one, redis://..."
        )
    if not config.index.url.startswith("memory:") and (config.snapshot.path or config.snapshot.peers):
        raise UserError(
            f"snapshot: {config.index.url} outlives this process; leave out snapshot.path and snapshot.peers"
        )
    tokens = read_tokens(config.access)
    access = Access(tokens)
    tls = open_tls(config.tls)
    parts: dict[str, Renew] = {}
    if config.access.token_file is not UNSET:
        parts["access"] = lambda: access.renew(read_tokens(config.access))
    if tls is not None:
        parts["tls"] = tls.renew
    renewal = Renewal(parts)
    make_room(config.http.max_connections + (config.grpc.max_connections if config.grpc.port is not None else 0))
    listener = _bound(config.http.host, config.http.port)
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
    snapshots = Snapshots(
        pool, config.snapshot, token=tokens[0] if tokens else "", certificate=tls.files if tls is not None else None
    )
    with contextlib.ExitStack() as running:
        spans = open_tracing(config.tracing, running)
        if follows and config.index.url.startswith("memory:"):
            snapshots.load()
            running.callback(snapshots.close)  # after the pool: it has applied all that came by then
        if follows:
            running.enter_context(pool)
            try:
                for bound in config.bind:
                    pool.bind(bound.endpoint, topic=bound.topic, model=bound.model)
            except KVEventsError as error:
                raise UserError(str(error)) from error
        follower = follow(config, pool if follows else None, running)
        scorer = PrefixScorer(
            index,
            config.scorer.block_size,
            tier_weights=config.scorer.tier_weights,
            routed_ttl_s=config.scorer.routed_ttl_s,
            heal=pool.recount if config.scorer.observe_heal else None,
            prompts=open_prompts(config.tokenizers, running),
        )
        snapshots.start()
        # a scorer follows nobody, so that nothing is to be said of how it follows
        checks = Checks(index, pool, follower if follows else None, block_size=config.scorer.block_size)
        running.callback(checks.close)
        checks.start()
        answers = AnswerMetrics()
        gate = Gate(
            access,
            max_under_way=config.http.max_under_way,
            max_bytes_under_way=config.http.max_bytes_under_way,
        )
        app = create_app(
            scorer,
            index,
            pool,
            follower,
            max_tokens=config.http.max_tokens,
            max_body_bytes=config.http.max_body_bytes,
            checks=checks,
            snapshots=snapshots,
            answers=answers,
            collectors=[access, gate, renewal, *(one for one in (tls, spans) if one is not None)],
        )
        rpc = serve_grpc(
            config.grpc,
            scorer,
            follower,
            checks.asked,
            answers,
            running,
            access=access,
            tls=tls,
            spans=spans,
            grace_s=config.http.shutdown_timeout_s,
        )
        if rpc is not None:
            log.info("serving_grpc", address=rpc.address, tls=tls is not None)
        host, port = listener.getsockname()[:2]
        pods = len(follower.pods()) if follows else 0
        url = f"{'http' if tls is None else 'https'}://{host}:{port}"
        inside = app if spans is None else spans.before(app)  # behind the gate: a stranger makes no spans
        settings = uvicorn.Config(
            gate.before(inside),
            log_level="error",  # its warnings are about what clients send
            access_log=False,
            lifespan="on",
            ws="none",
        )
        server = Server(
            settings,
            gate,
            rpc,
            delay_s=config.http.shutdown_delay_s,
            timeout_s=config.http.shutdown_timeout_s,
            read_timeout_s=config.http.read_timeout_s,
            max_connections=config.http.max_connections,
            tls=tls,
        )
        renewal.start()
        running.callback(renewal.close)
        _spare_the_collector()
        with server.capture_signals():
            _listen(listener)  # who reads the next line may ask at once, and end it
            log.info("serving", url=url, role=config.index.role, pods=pods, index=repr(index))
            server.run(sockets=[listener])
        log.info("stopped")
    index.close()
    return 0


def _spare_the_collector() -> None:
    """Have the garbage collector look less often, and at nothing that is there for good.

    Answers leave next to no cycles behind, and looking for them took a fifteenth of the time of a small one.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def make_room(connections: int) -> None:
    """Take as many open files as the system grants: a followed endpoint needs three, and 1,024 is a usual default.

    It is said where so many connections could take more than half of them.
    """
    try:
        import resource
    except ImportError:  # no such thing on Windows
        return
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and 2 * connections > limit:
        structlog.get_logger("kvindex").warning(
            "few_open_files",
            limit=limit,
            connections=connections,
            remedy="raise the limit (ulimit -Hn), or lower http.max_connections and grpc.max_connections: strangers "
            "could take what pods need",
        )


def _bound(host: str, port: int) -> socket.socket:
    """Take the port, without listening yet: who asks before the index is loaded is refused and need not wait."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise _taken(host, port, error) from error
    # asyncio does it only for sockets it made: without it each answer on a kept connection waits 40 ms
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _listen(listener: socket.socket) -> None:
    try:
        listener.listen(_BACKLOG)
    except OSError as error:  # another process may have been quicker with the same port
        host, port = listener.getsockname()[:2]
        raise _taken(host, port, error) from error


def _taken(host: str, port: int, error: Exception) -> UserError:
    return UserError(f"http.port {port} on {host}: {error}; choose another with --port or KVINDEX_HTTP_PORT")
