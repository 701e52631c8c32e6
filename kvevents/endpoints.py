"""Where a publisher is: ZMQ endpoints, checked before libzmq sees them, and those of further ranks."""

import re

from kvevents.errors import SubscriptionError

MAX_PORT = 65_535
_TCP = re.compile(r"(?P<host>tcp://.*):(?P<port>[0-9]+)")


def check_endpoint(endpoint: str, *, bind: bool = False) -> None:
    """Refuse what is no endpoint, and a port that there is not: libzmq takes 70000 for 4464 and says nothing.

    Raises `SubscriptionError`.
    """
    if not endpoint.startswith(("tcp://", "ipc://", "inproc://")) or any(one.isspace() for one in endpoint):
        raise SubscriptionError(f"endpoint {endpoint!r}: expected something like 'tcp://10.0.0.7:5557'")
    found = _TCP.fullmatch(endpoint)
    lowest = 0 if bind else 1
    if found and not lowest <= int(found["port"][:20]) <= MAX_PORT:
        raise SubscriptionError(
            f"endpoint {endpoint!r}: expected a port from {lowest} to {MAX_PORT}, got {found['port'][:20]}"
        )


def endpoint_of_rank(endpoint: str, rank: int) -> str:
    """Give the endpoint of a data-parallel rank whose pod says only that of rank 0, as vLLM and SGLang derive it.

    The port goes up by the rank; ``inproc`` gets the suffix ``_dpN`` (vLLM's ``ZmqEventPublisher``). Raises
    `SubscriptionError` where there is no such endpoint.
    """
    if rank < 0:
        raise SubscriptionError(f"rank: expected at least 0, got {rank}")
    if rank == 0:
        check_endpoint(endpoint)
        return endpoint
    if endpoint.startswith("inproc://"):
        return f"{endpoint}_dp{rank}"
    found = _TCP.fullmatch(endpoint)
    if not found:
        raise SubscriptionError(
            f"endpoint {endpoint!r}: expected tcp://host:port to find rank {rank} at the port plus {rank}; "
            "name the endpoint of each rank instead"
        )
    moved = f"{found['host']}:{int(found['port'][:20]) + rank}"
    check_endpoint(moved)
    return moved


def tcp(host: str, port: int) -> str:
    """Write an endpoint; an IPv6 address gets its brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
