"""Configuration: one TOML or YAML file, every key also as an environment variable, validated once at start.

`[http] port` in the file is `KVINDEX_HTTP_PORT` in the environment, which wins. Lists and maps are JSON there:
``KVINDEX_PODS='[{"pod": "pod-0", "endpoint": "tcp://10.0.0.7:5557"}]'``.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import UNSET, Meta, UnsetType

from indexer import Copies
from kvevents import OnGap, discovery
from kvindex.errors import ConfigError
from scorer import ModelSettings

TOKEN_VARIABLE = "KVINDEX_TOKEN"  # noqa: S105  (where it is, not what)
"""What programs that ask a service send; no key of the service itself."""
CERT_VARIABLE, KEY_VARIABLE = "KVINDEX_CLIENT_CERT", "KVINDEX_CLIENT_KEY"
"""The files of what they show, the same way."""
_NOT_KEYS = {"KVINDEX_CONFIG", "KVINDEX_IMPL", "KVINDEX_BUILD_NATIVE", TOKEN_VARIABLE, CERT_VARIABLE, KEY_VARIABLE}
_LISTS = {"pods", "bind"}
_JSON = {"tier_weights", "dns", "kubernetes", "sglang", "peers", "folders", "models", "aliases", "loras", "headers"}


class IndexConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the index lives."""

    url: str = "memory://"
    """``memory://``, or one that many processes share: ``redis://host:6379/0``, ``valkey://...``,
    ``unix://path``, ``redis+cluster://host:6379,host:6379``."""
    role: Literal["all", "builder", "scorer"] = "all"
    """What this process does for a shared index: follow pods, answer questions, or both. All of them serve HTTP."""
    max_bytes: Annotated[int, Meta(ge=1_048_576)] | None = None
    """Memory that an index in this process may take; none: no bound."""


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How events are applied."""

    workers: Annotated[int, Meta(ge=1, le=256)] = 4
    """Threads that apply events; each pod belongs to one."""
    model: str = ""
    """The model of pods whose subscription and topic name none."""
    copies: Copies = "count"
    """How a block that is stored again is understood: as another copy, or (``set``) as the same one announced again."""
    on_gap: OnGap = "keep"
    """What to do with the blocks of a pod of whose messages some are missing for good."""
    pod_timeout_s: Annotated[float, Meta(gt=0)] = 60.0
    """After how long without a connection a pod is not scored; after twice that its blocks are forgotten."""
    silent_timeout_s: Annotated[float, Meta(gt=0)] = 3_600.0
    """The same for pods that connect to a bound endpoint, after their last message."""


class BindConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An endpoint that pods connect to."""

    endpoint: Annotated[str, Meta(min_length=1)]
    """What to listen at: ``tcp://*:5557``. Pods have to be told to connect there."""
    topic: str = ""
    """Prefix of the topics to hear."""
    model: str = ""
    """The model of pods whose topic names none."""


class DiscoveryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where further pods come from, and what all of them are called."""

    identity: discovery.Identity = "name"
    """What answers call pods that were found by address: ``name``, ``ip`` or ``ip:port``."""
    interval: Annotated[float, Meta(ge=0.05, le=3600)] = 5.0
    """Seconds between two looks at a file, a DNS name or an SGLang server."""
    file: str = ""
    """A file with a list of pods, as ``[[pods]]`` has them."""
    dns: list[discovery.DnsFollow] = []
    """Names all of whose addresses are pods."""
    kubernetes: list[discovery.KubernetesFollow] = []
    """Labels of pods."""
    sglang: list[discovery.SglangFollow] = []
    """SGLang servers."""


class SnapshotConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an index in this process goes on from after a restart, see `docs/snapshots.md`."""

    path: str = ""
    """A file that is written every `interval_s` seconds and at the end, and read at the start."""
    interval_s: Annotated[float, Meta(ge=1)] = 60.0
    """Seconds from one file to the next: no more than what engines can replay."""
    peers: list[str] = []
    """Services that follow the same pods, as ``http://kvindex:8080``: asked at the start, before the file is read."""
    max_bytes: Annotated[int, Meta(ge=1_048_576)] = 16 * 1024**3
    """How long a peer's snapshot may be."""


class ScorerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How matches become scores."""

    block_size: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    """Ask only for blocks of so many tokens; none: of every size that events have."""
    tier_weights: dict[str, Annotated[float, Meta(ge=0, le=1_000_000)]] = {}
    """What a block is worth by tier (``gpu``, ``cpu``, ``disk``, ``shared``: 1.0, 0.8, 0.5, 0.3 where nothing is said)
    or by the engine's own word for a medium."""
    routed_ttl_s: Annotated[float, Meta(gt=0, le=3_600)] = 5.0
    """How long what was said at `/v1/routed` is reported."""
    observe_heal: bool = False
    """Whether what `/v1/observe` proves wrong is corrected, see `docs/loop.md`."""


class TokenizersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How text and chat messages become tokens, see `docs/prompts.md`."""

    folders: list[str] = []
    """Where tokenizers are: ``FOLDER/<model>/tokenizer.json``, or a Hugging Face cache."""
    models: dict[str, ModelSettings] = {}
    """What the engines were told about a model that its files do not say."""
    aliases: dict[str, str] = {}
    """Other names of models that requests may use, each with the name that the pods go by."""
    loras: dict[str, str] = {}
    """LoRA adapters that requests may name as their model, each with its model."""
    threads: Annotated[int, Meta(ge=1, le=64)] = 2
    """Questions that are rendered and tokenized at the same time."""
    max_waiting: Annotated[int, Meta(ge=1)] = 256
    """Questions that wait for that; more are refused."""
    max_chars: Annotated[int, Meta(ge=1)] = 2 * 1024 * 1024
    """Characters of one question: some texts take half a kilobyte and four microseconds for each."""
    store_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024
    """Memory for the tokens of beginnings that were seen before; 0: none are kept."""
    template_timeout_s: Annotated[float, Meta(gt=0, le=600)] = 5.0
    """Processor time that a chat template may take for one question."""
    trust_templates: bool = False
    """Whether requests may bring a chat template of their own."""
    remote_url: str = ""
    """Who is asked for models without a tokenizer here: a vLLM (``http://...``, its ``/tokenize``), or llm-d's
    tokenization service (``unix:///path``, ``grpc://host:port``), which needs the packages of the extra ``grpc``."""
    remote_api_key: str = ""
    """What a vLLM was given as ``--api-key``."""
    remote_timeout_s: Annotated[float, Meta(gt=0, le=600)] = 10.0
    """Seconds to wait for its answer."""


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP service."""

    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 in the container image."""
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8080
    """The port; 0: any, which the log names."""
    max_tokens: Annotated[int, Meta(ge=1)] = 1_000_000
    """Tokens of one question."""
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 16 * 1024 * 1024
    """Bytes of a request's body."""
    max_bytes_under_way: Annotated[int, Meta(ge=1024)] = 512 * 1024 * 1024
    """Bytes of the bodies of all requests under way; what is more is answered 503."""
    read_timeout_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0
    """For how long a request may take to come, body and all, and a TLS handshake; then its connection is closed."""
    max_connections: Annotated[int, Meta(ge=1)] = 4096
    """Connections at once, with those that are still greeting (TLS); one more is closed. Each takes an open file."""
    max_under_way: Annotated[int, Meta(ge=1)] = 1024
    """Requests under way at once; one more is answered 503. Probes do not count."""
    shutdown_delay_s: Annotated[float, Meta(ge=0, le=600)] = 0.0
    """For how long after SIGTERM everything is still answered while `/readyz` says no: as long as it takes until nobody
    is sent here any more. About 5 in Kubernetes."""
    shutdown_timeout_s: Annotated[int, Meta(ge=0, le=600)] = 10
    """For how long then, when nobody is let in any more, requests under way may go on."""


# A key of these two that is there without a value, as where a template had none to put in, must not leave the door
# open: UNSET stands for one that is not there at all.
class AccessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may ask over HTTP and gRPC, see `docs/deployment.md`. Without a token everybody may; probes always may."""

    token: str | UnsetType = UNSET
    """What has to be sent as ``Authorization: Bearer TOKEN``; also what `snapshot.peers` are asked with."""
    token_file: str | UnsetType = UNSET
    """A file with tokens, one a line, as a secret is mounted: all of them hold, so that one can be changed without a
    gap. Peers are asked with the first. What is exchanged in it holds within seconds."""


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS of HTTP and gRPC, 1.2 or newer, see `docs/deployment.md`. What is exchanged in the files, all of them PEM, is
    shown to new connections within seconds.
    """

    cert: str | UnsetType = UNSET
    """The certificate, with those between it and its authority; none: no TLS."""
    key: str | UnsetType = UNSET
    """Its key, without a password."""
    client_ca: str | UnsetType = UNSET
    """Authorities: clients must show a certificate that one of them signed."""


class GrpcConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The gRPC service, see `docs/grpc.md`. It needs the packages of the extra ``grpc``."""

    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 in the container image."""
    port: Annotated[int, Meta(ge=0, le=65_535)] | None = None
    """Where to listen; none: there is no gRPC. llm-d's own indexer has 50051."""
    max_tokens: Annotated[int, Meta(ge=1, le=100_000_000)] = 1_000_000
    """Tokens of one question."""
    max_message_bytes: Annotated[int, Meta(ge=1024, le=1_073_741_824)] = 16 * 1024 * 1024
    """Bytes of one message."""
    max_connections: Annotated[int, Meta(ge=1, le=1_000_000)] = 4096
    """Connections at once, with those that are still greeting; one more is closed. Each takes an open file."""


class TracingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Spans of questions, see `docs/operations.md`. They need the packages of the extra ``otel``."""

    endpoint: str = ""
    """An OpenTelemetry collector, OTLP over HTTP: ``http://otel-collector:4318``; none: there are no spans."""
    sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """The share of questions that are traced, of those whose caller does not say it in ``traceparent``."""
    service_name: Annotated[str, Meta(min_length=1)] = "kvindex"
    """What traces call this service."""
    headers: dict[str, str] = {}
    """What is sent to the collector besides, as what it wants to see for access."""


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Log output, on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """What is left out below."""
    format: Literal["auto", "json", "console"] = "auto"
    """JSON lines, lines for people, or what fits: lines for people on a terminal."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it."""

    index: IndexConfig = IndexConfig()
    pool: PoolConfig = PoolConfig()
    pods: list[discovery.PodEntry] = []
    bind: list[BindConfig] = []
    discovery: DiscoveryConfig = DiscoveryConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    scorer: ScorerConfig = ScorerConfig()
    tokenizers: TokenizersConfig = TokenizersConfig()
    http: HttpConfig = HttpConfig()
    grpc: GrpcConfig = GrpcConfig()
    access: AccessConfig = AccessConfig()
    tls: TlsConfig = TlsConfig()
    tracing: TracingConfig = TracingConfig()
    log: LogConfig = LogConfig()


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """Read the file, if any, and the environment.

    Raises `ConfigError` for a file that cannot be read, an unknown key or a value that cannot be used.
    """
    raw = {} if path is None else _read(path)
    for name, text in environ.items():
        if name.startswith("KVINDEX_") and name not in _NOT_KEYS:
            _overlay(raw, name, text)
    try:
        return msgspec.convert(raw, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_readable(str(error))) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        raw = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration file {path}: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"configuration file {path}: expected sections, got {type(raw).__name__}")
    return raw


def _overlay(raw: dict[str, Any], name: str, text: str) -> None:
    section, _, key = name.removeprefix("KVINDEX_").lower().partition("_")
    if section in _LISTS and not key:
        raw[section] = _json(name, text)
        return
    fields = {field.name: field for field in msgspec.structs.fields(Config)}
    kind = fields[section].type if section in fields and section not in _LISTS else None
    known = {field.name for field in msgspec.structs.fields(kind)} if kind is not None else set()
    if key not in known:
        raise ConfigError(f"{name}: no such key; known are {', '.join(variables())}")
    value = _json(name, text) if key in _JSON else text
    target = raw.setdefault(section, {})
    if not isinstance(target, dict):
        raise ConfigError(f"{section}: expected a section, got {type(target).__name__}")
    target[key] = value


def variable_of(*path: str) -> str:
    """Give the environment variable of a key."""
    return "_".join(("KVINDEX", *path)).upper()


def variables() -> list[str]:
    """Give the environment variables of all keys."""
    names = []
    for field in msgspec.structs.fields(Config):
        if field.name in _LISTS:
            names.append(variable_of(field.name))
        else:
            names += [variable_of(field.name, key.name) for key in msgspec.structs.fields(field.type)]
    return names


def _json(name: str, text: str) -> Any:  # noqa: ANN401
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{name}: expected JSON, {error}") from error


def _readable(message: str) -> str:
    what, _, where = message.partition(" - at `$")
    place = where.rstrip("`").lstrip(".") or "configuration"
    return f"{place}: {what}"
