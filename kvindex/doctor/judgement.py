"""From what was seen of a publisher to what is wrong with it. No sockets here."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvevents import HashFindings, recognise_hashes
from kvindex.doctor.findings import Finding, misspelt_pod, ok, one_of_same_name
from kvindex.doctor.observation import Observation

LATE_S = 1.0
"""Lag from which on an answer is about the past."""
_CLOCK_S = 0.25
"""How much earlier than it was sent a message may come, for clocks that differ."""
_ORPHANS = 0.05


class Expected(NamedTuple):
    """How the router and the configuration spell things; "" and None where nobody said."""

    pod: str = ""
    model: str = ""
    block_size: int | None = None
    topic: str = ""
    seeds: Sequence[str] = ()


class EngineSeen(NamedTuple):
    """What the engine says of itself over HTTP."""

    url: str
    is_reached: bool
    models: list[str]
    """The names it serves under."""
    prefix_caching: bool | None
    block_size: int | None


def judge(seen: Observation, expected: Expected, engine: EngineSeen | None = None) -> list[Finding]:
    """Say of everything that can be judged how it is, the root of a trouble before what follows from it."""
    findings = [*_connection(seen, engine), *_replay(seen)]
    if seen.messages or (seen.replay is not None and seen.replay.count):
        for part in (_decoding, _dialect, _order, _orphans, _time):
            findings += part(seen)
        for check in (_topic, _pod):
            findings += check(seen, expected)
        findings += _model(seen, expected, engine)
        findings += _block_size(seen, expected, engine)
        findings += _hashes(recognise_hashes(seen.roots, expected.seeds) if expected.seeds else HashFindings())
    return findings


def _connection(seen: Observation, engine: EngineSeen | None) -> Iterator[Finding]:
    is_up = engine is not None and engine.is_reached
    if seen.messages:
        yield ok("frames", f"{seen.messages} messages in {seen.seconds:.0f} s")
    elif not seen.links["agreed"] and (seen.links["mismatched"] or seen.links["reached"]):
        yield Finding(
            "connection",
            "bad",
            f"{seen.endpoint}: something listens there, but no publisher of events",
            "wrong port: the replay socket or the engine's HTTP port, perhaps",
            "take the port of `endpoint` in --kv-events-config (5557 by default, plus the data-parallel rank)",
        )
    elif not seen.links["agreed"]:
        yield Finding(
            "connection",
            "bad",
            f"{seen.endpoint}: nobody listens there",
            "the publisher is disabled, or the port is wrong: the engine itself answers"
            if is_up
            else "wrong host or port, the publisher disabled, or the pod down",
            'start the engine with --kv-events-config \'{"enable_kv_cache_events": true, "publisher": "zmq"}\', and '
            "take the port from `endpoint` in it (5557 by default, plus the data-parallel rank)",
        )
    elif seen.replay is not None and seen.replay.count:
        yield ok("frames", f"none in {seen.seconds:.0f} s: the engine is idle; it spoke before, its replay says")
    else:
        yield _silence(seen, engine)


def _silence(seen: Observation, engine: EngineSeen | None) -> Finding:
    what = f"connected, but nothing came in {seen.seconds:.0f} s"
    if engine is not None and engine.prefix_caching is False:
        return Finding(
            "frames",
            "bad",
            what,
            "the engine runs without prefix caching, and so without events",
            "start it with --enable-prefix-caching (and without --no-enable-prefix-caching)",
        )
    if engine is not None and engine.prefix_caching:
        return Finding(
            "frames",
            "warn",
            what,
            "the engine is idle, or every prompt is shorter than a block; prefix caching is on",
            "send it a prompt of some hundred tokens and look again",
        )
    return Finding(
        "frames",
        "warn",
        what,
        "the engine is idle, runs without prefix caching, or its publisher is null",
        "give --engine http://pod:8000 to tell these apart, or send a prompt and look again for longer (--seconds)",
    )


def _replay(seen: Observation) -> Iterator[Finding]:
    replay = seen.replay
    if replay is None:
        yield Finding(
            "replay",
            "advice",
            "no replay endpoint was given",
            "without one, what was said before we listened and what is lost stays unknown",
            'set "replay_endpoint": "tcp://*:5558" in --kv-events-config, and give it with --replay and to kvindex',
        )
    elif not replay.is_reached:
        yield Finding(
            "replay",
            "bad",
            f"{replay.endpoint}: nobody listens there",
            "replay is switched off (vLLM's default), or the port is wrong",
            'set "replay_endpoint": "tcp://*:5558" in --kv-events-config; rank r of the pod has that port plus r',
        )
    elif not replay.count and not replay.is_complete:
        yield Finding(
            "replay",
            "bad",
            f"{replay.endpoint}: connected, but no answer",
            "wrong port: no replay socket is behind it, or the engine's publisher hangs",
            "take the port of `replay_endpoint` in --kv-events-config",
        )
    elif not replay.is_complete:
        yield Finding(
            "replay",
            "warn",
            f"{replay.endpoint}: {replay.count} messages, but not its end",
            "the engine's send queue is shorter than its replay buffer, or the network is slow",
            "make `buffer_steps` in --kv-events-config smaller, or use a newer engine (vLLM 0.33 sends all)",
        )
    elif replay.first:
        yield Finding(
            "replay",
            "advice",
            f"{replay.count} messages deep, from {replay.first} to {replay.last}",
            "what came before has left its buffer: a builder that starts now does not know it",
            "make `buffer_steps` larger, or keep snapshots, where that matters",
        )
    else:
        yield ok("replay", f"{replay.count} messages deep, from the engine's start")


def _decoding(seen: Observation) -> Iterator[Finding]:
    broken = seen.bad_frames + seen.undecodable.total()
    if broken:
        reasons = dict(seen.undecodable) | ({"frames": seen.bad_frames} if seen.bad_frames else {})
        yield Finding(
            "decoding",
            "bad",
            f"{broken} messages cannot be read: {reasons}",
            "something other than KV events is published there, or a format newer than this program",
            "check that the endpoint is the one for KV events (SGLang's `load` socket is not), or upgrade kvindex",
        )
    if seen.discards:
        yield Finding(
            "decoding",
            "warn",
            f"events were left out: {dict(seen.discards)}",
            "an event of a kind that is not known, or with values that cannot be",
            "upgrade kvindex; if that is no help, `kvindex record` a minute of it for a report",
        )
    if not broken and not seen.discards:
        yield ok("decoding", "all that came can be read")


def _dialect(seen: Observation) -> Iterator[Finding]:
    if seen.unknown_fields:
        yield Finding(
            "dialect",
            "warn",
            f"fields that are not known: {', '.join(sorted(seen.unknown_fields))}",
            "the engine is newer than this program; they are ignored",
            "upgrade kvindex, or read the engine's notes on whether these fields change which blocks are equal",
        )
    if seen.shapes["short array"]:
        yield Finding(
            "dialect",
            "warn",
            "an old array dialect, vLLM up to 0.13: stores name no adapter, before 0.10 no tier either",
            "an old engine",
            "it is read; upgrade it where adapters are loaded by name or blocks are offloaded",
        )
    elif seen.shapes["array"]:
        yield ok("dialect", "an old array dialect (vLLM up to 0.23, older SGLang); all of it is read")
    elif seen.shapes["map"]:
        yield ok("dialect", "maps (vLLM from 0.24, SGLang)")


def _order(seen: Observation) -> Iterator[Finding]:
    replay = seen.replay
    # a replay without its end may have more to come
    went_back = replay is not None and replay.is_complete and _is_behind(replay.last, seen)
    came_again = seen.links["lost"] and seen.links["agreed"] > 1
    if seen.restarts or went_back or came_again:
        yield Finding(
            "order",
            "warn",
            "the publisher began anew while we looked"
            + (": its numbers went back" if seen.restarts or went_back else ": its connection ended and came again"),
            "the pod restarted: its cache is empty",
            "nothing, if it was meant to; kvindex forgets its blocks by itself. Else look at the pod's log",
        )
    if seen.missing:
        yield Finding(
            "order",
            "warn",
            f"{seen.missing} messages are missing",
            "the engine's queue (hwm) or the network dropped them",
            "give kvindex the replay endpoint, so that it fetches them; make `hwm` in --kv-events-config larger",
        )
    if seen.messages and not (seen.restarts or went_back or came_again or seen.missing):
        yield ok("order", f"numbers {seen.first_seq} to {seen.last_seq} without a gap")


def _is_behind(last: int | None, seen: Observation) -> bool:
    return last is not None and seen.last_seq is not None and last < seen.last_seq


def _orphans(seen: Observation) -> Iterator[Finding]:
    if not seen.parents:
        return
    share = seen.orphans / len(seen.parents)
    replay = seen.replay
    is_all_known = (
        replay is not None
        and replay.is_complete
        and replay.first == 0
        and replay.studied == replay.count
        and not seen.is_full
    )
    what = f"{seen.orphans} of {len(seen.parents)} stores follow a block that nobody announced"
    if share <= _ORPHANS:
        yield ok("orphans", what)
    elif is_all_known:
        yield Finding(
            "orphans",
            "bad",
            what,
            "the replay is whole, so the engine names parents it never stored, or several publish at one endpoint",
            "check that one endpoint is one rank; `kvindex record` a minute of it for a report",
        )
    else:
        yield Finding(
            "orphans",
            "advice",
            what,
            "they were announced before we listened",
            "with a replay endpoint they are known, unless they are older than its buffer",
        )


def _time(seen: Observation) -> Iterator[Finding]:
    lag = seen.lag
    if lag is None:
        return
    if lag < -_CLOCK_S:
        yield Finding(
            "lag",
            "warn",
            f"messages come {-lag:.1f} s before the engine made them",
            "the clocks of this machine and of the pod differ",
            "let both follow the same time server; nothing is ordered by these times, but lag is not to be trusted",
        )
    elif lag > LATE_S:
        yield Finding(
            "lag",
            "warn",
            f"messages are {lag:.1f} s old when they come",
            "the clocks of this machine and of the pod differ, or engine or network are behind",
            "compare the clocks first; then the engine's load and the network between",
        )
    else:
        yield ok("lag", f"{max(lag, 0.0) * 1000:.0f} ms")


def _topic(seen: Observation, expected: Expected) -> Iterator[Finding]:
    if not expected.topic or not seen.topics:
        return
    heard = sorted(topic for topic in seen.topics if topic.startswith(expected.topic))
    if heard:
        yield ok("topic", f"{expected.topic!r} lets {', '.join(map(repr, heard[:3]))} through")
    else:
        yield Finding(
            "topic",
            "bad",
            f"the filter {expected.topic!r} hears nothing: topics are {', '.join(map(repr, sorted(seen.topics)[:3]))}",
            "wrong topic filter: a topic is heard where the filter is its beginning",
            'set `topic` of the pod to "" in the configuration of kvindex, or the engine\'s "topic" to fit',
        )


def _pod(seen: Observation, expected: Expected) -> Iterator[Finding]:
    known = seen.pods
    if not known:
        if seen.topics and not expected.pod:
            yield ok("pod", "topics name no pod: it is called what the subscription calls it")
        return
    if not expected.pod:
        yield ok("pod", f"topics name {', '.join(sorted(known)[:3])}; give --pod to compare with the router's word")
    elif expected.pod in known:
        yield ok("pod", f"{expected.pod}, as the router spells it")
    else:
        yield pod_unknown(expected.pod, known)


def pod_unknown(asked: str, known: set[str]) -> Finding:
    """Say why a pod that the router asks for is none that is known."""
    like = misspelt_pod(asked, known)
    return Finding(
        "pod",
        "bad",
        f"the router says {asked!r}, the events say {', '.join(map(repr, sorted(known)[:3]))}",
        f"{like!r} for {asked!r}: the same host, with another port or none" if like else "two names for one pod",
        f"subscribe it as {asked!r} in the configuration of kvindex (`pod`), which goes before the topic, or give its "
        f"`address` there; or set the engine's topic to kv@{asked}@<model>",
    )


def _model(seen: Observation, expected: Expected, engine: EngineSeen | None) -> Iterator[Finding]:
    known, served = seen.models, set(engine.models if engine is not None else ())
    if not expected.model or not (known or served):
        return
    said = known or served
    if expected.model in said:
        yield ok("model", f"{expected.model}, as it is asked for")
    else:
        yield model_unknown(expected.model, said, is_alias=expected.model in served)


def model_unknown(asked: str, known: set[str], *, is_alias: bool = False) -> Finding:
    """Say why a model that is asked for is none that is known."""
    names = ", ".join(map(repr, sorted(known)[:3])) or "none"
    like = one_of_same_name(asked, known)
    spelt = repr(like) if like else names
    return Finding(
        "model",
        "bad",
        f"asked for {asked!r}, events are of {names}",
        f"a model alias: {asked!r} is {spelt} under another name (--served-model-name)"
        if like or is_alias
        else "another model, or an alias of it (--served-model-name)",
        f"ask for {spelt}, or subscribe the pod with model = {asked!r}, which goes before the topic",
    )


def _block_size(seen: Observation, expected: Expected, engine: EngineSeen | None) -> Iterator[Finding]:
    sizes = sorted(seen.block_sizes)
    if not sizes:
        return
    wanted = expected.block_size or (engine.block_size if engine is not None else None)
    if wanted is None or wanted in sizes:
        yield ok("block_size", ", ".join(map(str, sizes)))
    else:
        yield Finding(
            "block_size",
            "bad",
            f"expected {wanted}, events are of blocks of {', '.join(map(str, sizes))} tokens",
            "block size mismatch: a prompt cut into other blocks has other keys, and nothing matches",
            "leave scorer.block_size of kvindex out, then it is taken from the events; or start the engine with "
            f"--block-size {wanted}",
        )


def _hashes(found: HashFindings) -> Iterator[Finding]:
    scheme = f"{found.algorithm}, seed {found.seed!r}"
    if found.matched and found.matched == found.checked:
        yield ok("hashes", f"{found.matched} prompts hashed again as the engine does it: {scheme}")
    elif found.matched:
        yield Finding(
            "hashes",
            "warn",
            f"{found.checked - found.matched} of {found.checked} prompts have other hashes than {scheme} gives",
            "extra keys that are not on the wire (an adapter's path, look-ahead), or several engines at one endpoint",
            "check that one endpoint is one rank; answers of kvindex do not depend on these hashes",
        )
    elif found.algorithm:
        yield Finding(
            "hashes",
            "bad",
            f"hashes are of {found.block_size} tokens a block, events say {found.said_block_size} ({scheme})",
            "block size mismatch inside the engine: cache groups or a connector with blocks of their own",
            "`kvindex record` a minute of it for a report, and do not trust scores for this pod",
        )
    elif found.checked:
        yield ok("hashes", "made by a scheme or seed that is not known, which is no error (--hash-seed to try one)")
