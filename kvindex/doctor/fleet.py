"""From what a service knows of itself to what is wrong with it: for `doctor --url`, and in `serve` all the time."""

from collections.abc import Iterator, Sequence

from kvindex.doctor.findings import Finding, ok
from kvindex.doctor.judgement import LATE_S, model_unknown, pod_unknown
from kvindex.stats import Stats

CHECKS = ("pods", "connected", "trust", "model", "pod", "block_size", "replay", "decoding", "orphans", "lag")
"""All checks there are, in the order in which troubles follow from each other."""

_ORPHANS = 0.05
_SHOWN = 3


def judge_service(
    now: Stats,
    before: Stats | None = None,
    *,
    models: Sequence[str] = (),
    pods: Sequence[str] = (),
    block_size: int | None = None,
) -> list[Finding]:
    """Say how a service does. Counters are of the time since `before`, of all its life without one.

    `models` and `pods` are as the router spells them, beside those that it asked for lately.
    """
    past = before or Stats(0.0, {}, {}, [])
    findings = [*_fleet(now), *_names(now, models, pods)]
    if block_size is not None:
        findings += _block_size(now, block_size)
    findings += [*_replay(now, past), *_decoding(now, past), *_orphans(now, past), *_lag(now)]
    return findings


def _fleet(now: Stats) -> Iterator[Finding]:
    if not now.pods:
        yield Finding(
            "pods", "warn", "no pod has said anything", "none is subscribed, or none is reached", "look at `pods`"
        )
    else:
        yield ok("pods", f"{len({status.pod for status in now.pods})} pods, {len(now.pods)} ranks")
    if now.not_connected:
        yield Finding(
            "connected",
            "bad",
            f"not connected: {_some(now.not_connected)}",
            "wrong host or port, the publisher disabled, or the pod down",
            "run `kvindex doctor` with that pod's endpoint",
        )
    else:
        yield ok("connected", "every subscribed pod is")
    degraded = [status for status in now.pods if status.trust != "exact"]
    if degraded:
        said = [f"{status.pod} rank {status.rank} ({status.reason})" for status in degraded]
        yield Finding(
            "trust",
            "warn",
            f"{len(degraded)} of {len(now.pods)} are degraded: {_some(said)}",
            "see the reason of each",
            "a replay endpoint heals a gap; without one it heals when the pod's cache is emptied or the pod restarts",
        )
    else:
        yield ok("trust", "every answer is exact")


def _names(now: Stats, models: Sequence[str], pods: Sequence[str]) -> Iterator[Finding]:
    known_models = {status.model for status in now.pods if status.model}
    unknown = sorted({*models, *now.asked_models} - known_models)
    if unknown and known_models:
        yield model_unknown(unknown[0], known_models)
    elif models or now.asked_models:
        yield (
            ok("model", "every model that is asked for is served")
            if not unknown
            else Finding(
                "model",
                "warn",
                f"asked for {_some(unknown)}, but no model is known yet",
                "no pod has said anything",
                "see `pods`",
            )
        )
    known_pods = {status.pod for status in now.pods}
    strange = sorted({*pods, *now.asked_pods} - known_pods)
    if strange and known_pods:
        yield pod_unknown(strange[0], known_pods)
    elif pods or now.asked_pods:
        yield ok("pod", "every pod that is asked for is known")


def _block_size(now: Stats, block_size: int) -> Iterator[Finding]:
    sizes = sorted({size for status in now.pods for size in status.block_sizes})
    if sizes and block_size not in sizes:
        yield Finding(
            "block_size",
            "bad",
            f"expected {block_size}, events are of blocks of {', '.join(map(str, sizes))} tokens",
            "block size mismatch: a prompt cut into other blocks has other keys, and nothing matches",
            f"leave scorer.block_size out, or start the engines with --block-size {block_size}",
        )
    elif sizes:
        yield ok("block_size", ", ".join(map(str, sizes)))


def _replay(now: Stats, past: Stats) -> Iterator[Finding]:
    failed = _since(now.pool, past.pool, "replays_failed_total")
    asked = _since(now.pool, past.pool, "replays_total")
    if failed:
        yield Finding(
            "replay",
            "bad",
            f"{failed} of {asked} replays failed",
            "replay is switched off at the engine, or the port is wrong",
            'set "replay_endpoint" in --kv-events-config, and run `kvindex doctor ENDPOINT --replay REPLAY`',
        )
    elif now.without_replay:
        yield Finding(
            "replay",
            "warn",
            f"no replay endpoint for {_some(now.without_replay)}",
            "without one, what was said before we listened and what is lost stays unknown",
            'set "replay_endpoint" in --kv-events-config, and `replay` of the pod in the configuration',
        )
    else:
        yield ok("replay", "none failed")


def _decoding(now: Stats, past: Stats) -> Iterator[Finding]:
    dropped = {
        name.removeprefix("dropped_").removesuffix("_total"): count
        for name in now.pool
        if name.startswith("dropped_") and (count := _since(now.pool, past.pool, name))
    }
    if dropped:
        yield Finding(
            "decoding",
            "bad",
            f"dropped: {dropped}",
            "messages or events that cannot be read, or more than can be kept up with (queue_full, held)",
            "run `kvindex doctor` with the endpoint of the pod that the log names; for queue_full, more workers",
        )
    else:
        yield ok("decoding", "nothing was dropped")


def _orphans(now: Stats, past: Stats) -> Iterator[Finding]:
    parked = _since(now.index, past.index, "parked_total")
    stored = _since(now.index, past.index, "stored_total")
    what = f"{parked} of {stored} blocks came with a parent that is not known"
    if parked > _ORPHANS * max(stored, 1):
        yield Finding(
            "orphans",
            "warn",
            what,
            "what came before was missed, or several ranks publish at one endpoint",
            "give the pods' replay endpoints, and each rank's own endpoint",
        )
    else:
        yield ok("orphans", what)


def _lag(now: Stats) -> Iterator[Finding]:
    late = [status for status in now.pods if status.lag_s is not None and abs(status.lag_s) > LATE_S]
    if late:
        worst = max(late, key=lambda status: abs(status.lag_s or 0.0))
        yield Finding(
            "lag",
            "warn",
            f"{len(late)} pods, the worst {worst.pod}: applied {worst.lag_s:.1f} s after the engine's time",
            "the clocks differ, or engine, network or this service are behind",
            "compare the clocks first; then queue_depth of the pool, and the engine's load",
        )
    else:
        yield ok("lag", f"none over {LATE_S:.0f} s")


def _since(now: dict[str, int], past: dict[str, int], name: str) -> int:
    return max(0, now.get(name, 0) - past.get(name, 0))


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
