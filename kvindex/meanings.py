"""What the counters and gauges of index, pool, discovery and scorer mean, in a line each, as `/metrics` shows them."""

from collections.abc import Mapping

_MEANINGS: Mapping[str, Mapping[str, str]] = {
    "index": {
        "blocks": "Different blocks that somebody holds",
        "bytes": "Memory of the index in this process, about",
        "cleared": "Caches that were emptied",
        "copies": "Blocks stored again while a copy was there",
        "evicted": "Blocks forgotten to stay under max_bytes",
        "expired": "Blocks forgotten on tiers that never announce removals",
        "hash_conflicts": "Engine hashes that were announced for different tokens",
        "held": "Blocks held, counted for each source, tier and group",
        "lost_sources": "Sources of which nothing is in Redis, because it is full",
        "parked": "Blocks that had to wait for an unknown parent or for their tokens",
        "partial_blocks": "Hashes without a whole block of tokens",
        "recounted": "Copies taken back because an observation proved them gone",
        "removed": "Blocks that engines announced as removed",
        "removed_unknown": "Removals of blocks that nobody had announced",
        "restarts": "Sources that began anew",
        "rewritten": "Sources written anew to Redis from their ledgers",
        "sources": "Sources followed by this process",
        "stale_sources": "Sources whose state in Redis is behind their ledgers",
        "stored": "Blocks that engines announced as stored",
        "swept": "Blocks that nobody sees any more, taken out of Redis",
        "too_many_slots": "Blocks refused as their source has too many media, groups and sizes",
        "unplaced": "Hashes whose place in the prompt the engine did not say",
        "waiting": "Blocks that wait for a parent or for their tokens",
        "waiting_dropped": "Blocks that waited too long, or were too many",
        "write_failures": "Writes that Redis did not take",
        "write_waiting_bytes": "Changes that wait for Redis",
    },
    "pool": {
        "applied": "Messages applied",
        "events": "Events applied",
        "forgotten": "Times what a pod held was forgotten because it could not be reached",
        "gaps": "Times messages were missing for good",
        "missing": "Messages missing for good",
        "queue_bytes": "Payload bytes that wait to be applied",
        "queue_depth": "Messages that wait to be applied",
        "rebuilds": "Sources read anew from their engine's replay without a restart",
        "received": "Messages received",
        "receiver_errors": "Failures of the receiving thread; it goes on",
        "recovered": "Messages that were missing and came by replay",
        "replays": "Replays asked for",
        "replays_failed": "Replays without an answer or an end",
        "restarts": "Engines seen to have restarted",
        "unreachable": "Times a pod could not be reached for too long",
        "worker_errors": "Failures of a worker; it goes on, and the pod is degraded",
    },
    "discovery": {
        "added": "Pods found",
        "conflicts": "Pods that two sources name alike",
        "errors": "Failed looks at a source of pods",
        "pods": "Pods that should be followed",
        "pods_failed": "Pods that cannot be followed as they are described",
        "pods_set_aside": "Pods that were deleted by request while a source still finds them",
        "removed": "Pods that were gone",
        "replaced": "Pods that came back otherwise",
        "sources": "Sources of pods",
        "sources_unavailable": "Sources of pods that cannot be asked now",
    },
    "scorer": {
        "shadow_blocks": "Blocks remembered of pods whose events cannot be believed",
        "shadowed_sources": "Sources that are answered for by what was observed of them",
        "speculative_blocks": "Blocks of requests that are on their way to a pod",
        "speculative_dropped": "Such blocks forgotten because they were too many",
    },
}


def meaning_of(part: str, name: str) -> str:
    """Give the meaning of a counter or gauge; its name in words where none is written down."""
    return _MEANINGS.get(part, {}).get(name) or f"{name.replace('_', ' ')} of the {part}"
