"""gRPC: `indexer.v1.IndexerService` as llm-d's clients call it, `kvindex.v1.ScorerService`, health and reflection."""

from contextlib import ExitStack

from kvindex.config import GrpcConfig
from kvindex.errors import UserError
from kvindex.questions import Questions


def serve_grpc(config: GrpcConfig, questions: Questions, running: ExitStack) -> int | None:
    """Serve gRPC until `running` ends; give the port, None where the configuration asks for none.

    Raises `UserError` when the port cannot be had, or the packages of the extra are not there.
    """
    if config.port is None:
        return None
    try:
        from kvindex.rpc.server import RpcServer
    except ImportError as error:
        raise UserError(
            f"grpc.port {config.port}: {error}; install 'kv-cache-indexer[grpc]', or leave the key out"
        ) from error
    server = RpcServer(questions, host=config.host, port=config.port, max_message_bytes=config.max_message_bytes)
    running.callback(server.close)
    return server.start()
