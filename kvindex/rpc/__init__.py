"""gRPC: `indexer.v1.IndexerService` as llm-d's clients call it, `kvindex.v1.ScorerService`, health and reflection."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvevents import discovery
from kvindex.access import Access
from kvindex.answers import AnswerMetrics
from kvindex.config import GrpcConfig
from kvindex.errors import UserError
from kvindex.stats import Asked
from kvindex.tls import Tls
from scorer import PrefixScorer

if TYPE_CHECKING:
    from kvindex.rpc.server import RpcServer
    from kvindex.spans import Spans


def serve_grpc(
    config: GrpcConfig,
    scorer: PrefixScorer,
    followed: discovery.Follower,
    asked: Asked,
    metrics: AnswerMetrics,
    running: ExitStack,
    *,
    access: Access | None = None,
    tls: Tls | None = None,
    spans: "Spans | None" = None,
    grace_s: float = 5.0,
) -> "RpcServer | None":
    """Serve gRPC until `running` ends; give the server, None where the configuration asks for none.

    Raises `UserError` when the port cannot be had, or the packages of the extra are not there.
    """
    if config.port is None:
        return None
    try:
        from kvindex.rpc.calls import Calls
        from kvindex.rpc.server import RpcServer, open_schema
    except ImportError as error:
        raise UserError(
            f"grpc.port {config.port}: {error}; install 'kv-cache-indexer[grpc]', or leave the key out"
        ) from error
    schema = open_schema()
    calls = Calls(schema, scorer, followed, asked, metrics, max_tokens=config.max_tokens)
    server = RpcServer(
        calls,
        schema,
        host=config.host,
        port=config.port,
        max_message_bytes=config.max_message_bytes,
        max_connections=config.max_connections,
        access=access,
        tls=tls,
        spans=spans,
        grace_s=grace_s,
    )
    running.callback(server.close)
    server.start()
    return server
