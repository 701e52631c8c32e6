"""The pods that a service follows, from all that its configuration says of them."""

import contextlib
from pathlib import Path

from indexer import Index, Leases
from kvevents import EventPool, KVEventsError, discovery
from kvindex.config import Config, DiscoveryConfig
from kvindex.errors import UserError
from kvindex.sharing import SharedPods


def follow(config: Config, pool: EventPool | None, running: contextlib.ExitStack) -> discovery.Follower:
    """Follow the pods; where others build the same index too, a share of them. Without a pool they are only known.

    Raises `UserError` for a pod of the configuration that cannot be followed.
    """
    found = config.discovery
    try:
        fixed = discovery.found_in(config.pods)
        target: discovery.Target | None = None
        if pool is not None and config.index.url.startswith("memory:"):
            target = discovery.Subscriptions(pool)
        elif pool is not None:
            shared = target = SharedPods(discovery.Subscriptions(pool), Leases(config.index.url))
            running.callback(shared.close)
            shared.start()
        follower = discovery.Follower(target, sources_of(found), fixed=fixed, identity=found.identity)
        running.callback(follower.close)
        follower.start()
    except KVEventsError as error:
        raise UserError(str(error)) from error
    return follower


def sources_of(found: DiscoveryConfig) -> list[discovery.Discovery]:
    """Give all sources of pods that are configured."""
    sources: list[discovery.Discovery] = []
    if found.file:
        sources.append(discovery.FileDiscovery(Path(found.file), interval_s=found.interval))
    sources += [discovery.DnsDiscovery(one, interval_s=found.interval) for one in found.dns]
    sources += [discovery.KubernetesDiscovery(one) for one in found.kubernetes]
    sources += [discovery.SglangDiscovery(one, interval_s=found.interval) for one in found.sglang]
    return sources


def name_of(pod: str, followed: discovery.Follower) -> str:
    """Give the name under which a pod is followed that is asked for by any of its names."""
    names = followed.resolve([pod])
    return names[0] if len(names) == 1 else pod  # an address of several pods names none of them


def forget_pod(pod: str, followed: discovery.Follower, index: Index, pool: EventPool) -> bool:
    """Stop following a pod, by any of its names, and forget its blocks; say whether there was one."""
    name = name_of(pod, followed)
    if followed.drop(name):
        return True
    if all(status.source.pod != name for status in index.sources()):
        return False
    pool.unsubscribe(name)
    return True
