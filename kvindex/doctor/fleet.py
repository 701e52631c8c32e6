"""From what a service knows of itself to what is wrong with it: for `doctor --url`, and in `serve` all the time."""

from collections.abc import Iterator, Sequence

from kvindex.doctor.findings import Finding, ok
from kvindex.doctor.judgement import LATE_S, model_unknown, pod_unknown
from kvindex.stats import PodStatus, Stats

CHECKS = (
    *("pods", "connected", "trust", "model", "pod", "block_size"),
    *("topic", "replay", "decoding", "orphans", "lag"),
)
"""All checks there are, in the order in which troubles follow from each other."""

_LATE = frozenset({"queue_full", "held"})
_ORPHANS = 0.05
_FEWEST_ORPHANS = 16
"""Fewer are no trouble yet, whatever their share is."""
_LIVE_S = 30.0
"""How long ago a message may have come whose lag says anything."""
_HEALS = "give the pod a replay endpoint; without one it heals when its cache is emptied or it restarts"
_REASONS = {
    "gap": ("messages were lost, or what came before we listened", _HEALS),
    "unsure": ("messages may be missing that could not be asked for", _HEALS),
    "behind": ("messages are asked for again and again", "see `replay`; then the network, and the engine's load"),
    "unreachable": ("the pod is down, or is somewhere else", "take it out of the pods that are followed, or see to it"),
    "error": ("events could not be applied", "look for apply_error in the log, and report it"),
}
"""Cause and remedy by the first words of a reason."""
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
    findings = [*_fleet(now, past), *_names(now, models, pods)]
    wanted = block_size or now.block_size
    if wanted is not None:
        findings += _block_size(now, wanted)
    findings += [*_topic(now), *_replay(now, past), *_decoding(now, past), *_orphans(now, past), *_lag(now)]
    return findings


def _fleet(now: Stats, past: Stats) -> Iterator[Finding]:
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
    yield from _trust(now, past)


def _trust(now: Stats, past: Stats) -> Iterator[Finding]:
    degraded: dict[str, list[str]] = {}
    silent = []
    for status, word in _words(now, past):
        if word == "no events yet":
            silent.append(status.pod)
        elif word:
            degraded.setdefault(word, []).append(f"{status.pod} rank {status.rank}")
    if degraded:
        reasons = [_REASONS.get(word, (f"{word}: see `reason` in /v1/pods", "look at the log")) for word in degraded]
        said = [f"{word}: {_some(pods)}" for word, pods in degraded.items()]
        count = sum(map(len, degraded.values()))
        yield Finding(
            "trust",
            "warn",
            f"{count} of {len(now.pods)} are degraded; {'; '.join(said)}",
            "; ".join(cause for cause, _ in reasons),
            "; ".join(dict.fromkeys(remedy for _, remedy in reasons)),
        )
    elif silent:
        yield Finding(
            "trust",
            "advice",
            f"{len(silent)} of {len(now.pods)} have said nothing yet: {_some(silent)}",
            "they are idle, or run without prefix caching; what their caches hold is not known",
            "give them a replay endpoint: an idle pod that answers a replay is known. Else send one a prompt, or run "
            "`kvindex doctor` with its endpoint and --engine",
        )
    else:
        yield ok("trust", "every answer is exact")


def _words(now: Stats, past: Stats) -> Iterator[tuple[PodStatus, str]]:
    """Give every rank with why it is degraded, in the first words of the reason; "" where it is not.

    For a moment after each loss a rank is behind: that is its trouble only where it stays so. Who could not be had
    again is asked again now and then, and is not well for that.
    """
    before = {(status.pod, status.rank): _word(status) for status in past.pods}
    for status in now.pods:
        word, was = _word(status), before.get((status.pod, status.rank), "")
        if word == "behind":
            word = was if was in ("behind", "unsure") else ""
        yield status, word


def _word(status: PodStatus) -> str:
    return status.reason.partition(":")[0] if status.trust != "exact" else ""


def _names(now: Stats, models: Sequence[str], pods: Sequence[str]) -> Iterator[Finding]:
    known_models = {status.model for status in now.pods if status.model}
    unknown = sorted({*models, *now.asked_models} - known_models)
    nameless = sorted({status.pod for status in now.pods if not status.model})
    if nameless:
        yield Finding(
            "model",
            "bad",
            f"nobody says which model {_some(nameless)} serve" + "s" * (len(nameless) == 1),
            "neither the configuration nor the topic names it, and questions are for a model",
            "set `model` of the pods, or pool.model",
        )
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
    known_pods = {status.pod for status in now.pods} | {*now.followed, *now.not_connected}
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
    can_ask = {*now.followed} - {*now.without_replay} - {*now.not_connected}
    failing = sorted({status.pod for status, word in _words(now, past) if status.pod in can_ask and word == "unsure"})
    if failing:
        yield Finding(
            "replay",
            "bad",
            f"no answer, or half of one, when {_some(failing)} {'was' if len(failing) == 1 else 'were'} asked again",
            "replay is switched off at the engine, or the port of `replay` is wrong",
            'set "replay_endpoint" in --kv-events-config, and run `kvindex doctor ENDPOINT --replay REPLAY`',
        )
    elif now.without_replay:
        yield Finding(
            "replay",
            "advice",
            f"no replay endpoint for {_some(now.without_replay)}",
            "without one, what was said before we listened and what is lost stays unknown",
            'set "replay_endpoint" in --kv-events-config, and `replay` of the pod in the configuration',
        )
    else:
        yield ok("replay", "every pod that was asked again has answered")


def _topic(now: Stats) -> Iterator[Finding]:
    if now.unheard:
        pod, topic = min(now.unheard.items())
        yield Finding(
            "topic",
            "bad",
            f"the filter of {_some(sorted(now.unheard))} hears nothing: {pod} publishes {topic!r}",
            "wrong topic filter: a topic is heard where the filter is its beginning",
            'set `topic` of the pod to "", or to the beginning of that topic',
        )
    else:
        yield ok("topic", "no filter keeps a pod out")


def _decoding(now: Stats, past: Stats) -> Iterator[Finding]:
    dropped = {
        name.removeprefix("dropped_").removesuffix("_total"): count
        for name in now.pool
        if name.startswith("dropped_") and (count := _since(now.pool, past.pool, name))
    }
    what = f"dropped: {dropped}"
    if any(reason not in _LATE and not reason.startswith("event_") for reason in dropped):
        yield Finding(
            "decoding",
            "bad",
            what,
            "messages cannot be read (another kind of socket, a newer format), or nobody says whose they are",
            "run `kvindex doctor` with the endpoint of the pod that the log names, or upgrade kvindex",
        )
    elif not _LATE.isdisjoint(dropped):
        yield Finding(
            "decoding",
            "warn",
            what,
            "more comes than can be kept up with; what was dropped is asked for again",
            "pool.workers, the compiled core (kvindex --version), or several builders and a shared index",
        )
    elif dropped:
        yield Finding(
            "decoding",
            "warn",
            what,
            "single events of a kind that is not known, or with values that cannot be, are left out",
            "upgrade kvindex; if that is no help, `kvindex record` a minute of it for a report",
        )
    else:
        yield ok("decoding", "nothing was dropped")


def _orphans(now: Stats, past: Stats) -> Iterator[Finding]:
    parked = _since(now.index, past.index, "parked_total")
    stored = _since(now.index, past.index, "stored_total")
    what = f"{parked} of {stored} blocks came with a parent that is not known"
    if parked > max(_ORPHANS * stored, _FEWEST_ORPHANS):
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
    # who has been silent since then may have caught up long ago
    live = [status for status in now.pods if status.live_s is not None and status.live_s <= _LIVE_S]
    late = [status for status in live if status.lag_s is not None and abs(status.lag_s) > LATE_S]
    if late:
        worst = max(late, key=lambda status: abs(status.lag_s or 0.0))
        yield Finding(
            "lag",
            "warn",
            f"{_some([status.pod for status in late])}: applied up to {worst.lag_s:.1f} s after the engine's time",
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
