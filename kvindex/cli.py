"""The command line."""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from indexer import IndexerError, implementation
from kvevents import KVEventsError
from kvindex import config as configuration
from kvindex import logs
from kvindex.config import TOKEN_VARIABLE
from kvindex.errors import UserError
from scorer import ScorerError

_Token = Annotated[str, typer.Option(envvar=TOKEN_VARIABLE, help="What the service wants as a bearer token.")]

app = typer.Typer(
    name="kvindex",
    help="Knows, for every block, where the KV cache of a fleet of LLM servers lies.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:  # noqa: FBT001  (typer calls it so)
    if wanted:
        print(f"kvindex {version('kv-cache-indexer')} ({implementation})")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,  # noqa: FBT002
) -> None:
    pass


@app.command(epilog="Example: kvindex demo --pods 6 --seconds 20")
def demo(
    pods: Annotated[int, typer.Option(min=1, max=64, help="Simulated pods.")] = 4,
    requests: Annotated[int, typer.Option(min=1, help="Prompts to route.")] = 600,
    seconds: Annotated[float, typer.Option(min=0, help="About how long it takes.")] = 12.0,
    plain: Annotated[bool, typer.Option(help="Lines instead of a live view.")] = False,  # noqa: FBT002
) -> None:
    """Show it working: simulated pods, real events, scores, and the hit share against round robin."""
    from kvindex.demo import run_demo

    logs.configure("warning")
    raise typer.Exit(run_demo(pods=pods, requests=requests, seconds=seconds, plain=plain))


@app.command(epilog="Example: kvindex fleet --pods 16 --seconds 60 --check http://127.0.0.1:8080")
def fleet(
    pods: Annotated[int, typer.Option(min=1, max=1024, help="Simulated pods.")] = 16,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    base_port: Annotated[int, typer.Option(help="Pod i has this + 2i, and + 2i + 1 for replay; 0: any.")] = 5557,
    model: Annotated[str, typer.Option(help="The model they say they serve.")] = "demo/model",
    block_size: Annotated[int, typer.Option(min=1, max=1024, help="Tokens a block.")] = 16,
    num_blocks: Annotated[int, typer.Option(min=64, help="Blocks in each pod's cache.")] = 4096,
    dialect: Annotated[
        list[str], typer.Option(help="Dialects, dealt out in turn: vllm-map, vllm-array, vllm-0.9, sglang.")
    ] = ["vllm-map"],  # noqa: B006
    rate: Annotated[float, typer.Option(min=0, help="Requests/s in all; 0: full speed.")] = 0.0,
    seconds: Annotated[float, typer.Option(min=0, help="How long; 0: until interrupted.")] = 0.0,
    wait_subscribers: Annotated[int, typer.Option(min=0, help="Begin when each pod has so many.")] = 1,
    check: Annotated[
        list[str], typer.Option(help="URL of a kvindex service to compare with; may be given several times.")
    ] = [],  # noqa: B006
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between checkpoints.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    token: _Token = "",
    question: Annotated[
        Path | None, typer.Option(help="Keep a question about a prompt of late in this file, a body for /v1/score.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the endpoints as KVINDEX_PODS takes them.")] = False,  # noqa: FBT002
) -> None:
    """Run simulated pods that publish real events."""
    from kvevents.testing import DIALECTS
    from kvindex.traffic import run_fleet

    chosen = tuple(name for name in DIALECTS if name in dialect)
    unknown = sorted(set(dialect) - set(DIALECTS))
    if unknown:
        raise UserError(f"--dialect {unknown[0]}: expected one of {', '.join(DIALECTS)}")
    raise typer.Exit(
        run_fleet(
            pods=pods,
            host=host,
            base_port=base_port,
            model=model,
            block_size=block_size,
            num_blocks=num_blocks,
            dialects=chosen,
            rate=rate,
            seconds=seconds,
            wait_subscribers=wait_subscribers,
            check=check,
            every=every,
            seed=seed,
            as_json=json,
            question=question,
            token=token,
        )
    )


@app.command(epilog="Example: kvindex replay tests/data/golden/plain.jsonl --check")
def replay(
    files: Annotated[
        list[Path], typer.Argument(help="A capture: JSON lines, also gzipped; its files in order, or their folder.")
    ],
    check: Annotated[bool, typer.Option(help="Compare with the engine's answers in the capture.")] = False,  # noqa: FBT002
    copies: Annotated[str, typer.Option(help="count, or set for engines that announce blocks again.")] = "count",
    pod: Annotated[str | None, typer.Option(help="The pod, where topics do not say.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, where topics do not say.")] = None,
    speed: Annotated[str, typer.Option(help="full, original, or how many times as fast.")] = "full",
    publish: Annotated[bool, typer.Option(help="Publish it, for a running service.")] = False,  # noqa: FBT002
    host: Annotated[str, typer.Option(help="Address to publish at.")] = "127.0.0.1",
    base_port: Annotated[int, typer.Option(help="Pod i has this + 2i, and + 2i + 1 for replay; 0: any.")] = 5557,
    wait_subscribers: Annotated[int, typer.Option(min=0, help="Begin when each pod has so many.")] = 1,
    hold: Annotated[float, typer.Option(min=0, help="Seconds to answer replays after the end.")] = 5.0,
    json: Annotated[bool, typer.Option("--json", help="Print the endpoints as KVINDEX_PODS takes them.")] = False,  # noqa: FBT002
) -> None:
    """Play a capture into an index of its own, or with --publish as its pods did to a running service."""
    from functools import partial

    from kvindex.playing import run_play, speed_of
    from kvindex.replay import run_replay

    logs.configure("warning")
    if copies not in ("count", "set"):
        raise UserError(f"--copies {copies}: expected count or set")
    if check and publish:
        raise UserError("--check: cannot be had with --publish; ask the service instead (kvindex score)")
    factor = speed_of(speed)
    play = partial(
        run_play,
        speed=factor,
        host=host,
        base_port=base_port,
        wait_subscribers=wait_subscribers,
        hold=hold,
        model=model or "",
        as_json=json,
    )
    raise typer.Exit(
        run_replay(
            files,
            check=check,
            copies="set" if copies == "set" else "count",
            pod=pod,
            model=model,
            speed=factor,
            publish=play if publish else None,
        )
    )


@app.command(epilog="Example: kvindex record pod-0=tcp://10.0.0.7:5557 --folder captures --max-total-mb 2048")
def record(
    endpoints: Annotated[list[str], typer.Argument(help="What pods publish at; also pod=endpoint.")],
    folder: Annotated[Path, typer.Option(help="Where the captures go.")] = Path("captures"),
    topic: Annotated[str, typer.Option(help="Prefix of the topics to hear.")] = "",
    seconds: Annotated[float, typer.Option(min=0, help="How long; 0: until interrupted.")] = 0.0,
    max_file_mb: Annotated[float, typer.Option(min=0.001, help="Megabytes after which another file begins.")] = 64.0,
    max_total_mb: Annotated[float, typer.Option(min=0.001, help="Megabytes of all files; the oldest go.")] = 1024.0,
) -> None:
    """Record what pods publish, for `kvindex replay`."""
    from kvindex.record import run_record

    raise typer.Exit(
        run_record(
            endpoints,
            folder,
            topic=topic,
            seconds=seconds,
            max_file_bytes=int(max_file_mb * 1_000_000),
            max_total_bytes=int(max_total_mb * 1_000_000),
        )
    )


@app.command(epilog="Example: kvindex watch tcp://10.0.0.7:5557 tcp://10.0.0.8:5557")
def watch(
    endpoints: Annotated[list[str], typer.Argument(help="What pods publish at.")] = [],  # noqa: B006
    topic: Annotated[str, typer.Option(help="Prefix of the topics to hear.")] = "",
    seconds: Annotated[float, typer.Option(min=0, help="How long; 0: until interrupted.")] = 0.0,
    url: Annotated[str, typer.Option(help="A running service whose pods to show, in the place of endpoints.")] = "",
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at the service.")] = 1.0,
    token: _Token = "",
) -> None:
    """Show the events of some pods as they come, or the pods of a running service."""
    from kvindex.watch import run_watch
    from kvindex.watching import run_watch_service

    if bool(endpoints) == bool(url):
        raise UserError("watch: name what pods publish at (tcp://10.0.0.7:5557), or --url of a running service")
    if url:
        raise typer.Exit(run_watch_service(url, seconds=seconds, every=every, token=token))
    raise typer.Exit(run_watch(endpoints, topic=topic, seconds=seconds))


@app.command(epilog="Example: kvindex doctor tcp://10.0.0.7:5557 --replay tcp://10.0.0.7:5558 --pod 10.0.0.7:8000")
def doctor(
    endpoints: Annotated[list[str], typer.Argument(help="What pods publish at.")] = [],  # noqa: B006
    replay: Annotated[list[str], typer.Option(help="Their replay sockets, in order.")] = [],  # noqa: B006
    pod: Annotated[list[str], typer.Option(help="What the router calls them, in order.")] = [],  # noqa: B006
    topic: Annotated[str, typer.Option(help="The filter that kvindex is configured with.")] = "",
    model: Annotated[str, typer.Option(help="The model that the router asks for.")] = "",
    block_size: Annotated[int | None, typer.Option(min=1, help="The block size that the router reckons with.")] = None,
    hash_seed: Annotated[list[str], typer.Option(help="PYTHONHASHSEED of the engines, to try.")] = ["0", "42"],  # noqa: B006
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to listen.")] = 5.0,
    url: Annotated[str, typer.Option(help="A running kvindex service to look at, too.")] = "",
    token: _Token = "",
    engine: Annotated[str, typer.Option(help="The engine's HTTP address, to tell idle from switched off.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,  # noqa: FBT002
) -> None:
    """Find out why scores are empty or wrong. Exit status: 0 all is well, 1 something is not, 2 usage."""
    from kvindex.doctor.run import run_doctor

    raise typer.Exit(
        run_doctor(
            endpoints,
            replays=replay,
            topic=topic,
            model=model,
            block_size=block_size,
            pods=pod,
            seeds=hash_seed,
            seconds=seconds,
            url=url,
            engine=engine,
            as_json=json,
            token=token,
        )
    )


@app.command(epilog="Example: kvindex bench --quick --only apply --only match")
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds, smaller; the figures are rough.")] = False,  # noqa: FBT002
    only: Annotated[
        list[str], typer.Option(help="hash, apply, match, score, memory, socket or redis; may be given several times.")
    ] = [],  # noqa: B006
    redis: Annotated[
        str, typer.Option(help="URL of a server to measure too, under keys of its own that are removed after.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,  # noqa: FBT002
) -> None:
    """Measure what this machine can do beside the project's goals. Exit status: 0 measured, 2 usage."""
    from kvindex.bench.run import run_bench

    logs.configure("warning")
    raise typer.Exit(run_bench(quick=quick, only=only, redis_url=redis, as_json=json))


@app.command(epilog="Example: kvindex score --model demo/model 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16")
def score(
    tokens: Annotated[list[int], typer.Argument(help="The token ids of the prompt; none: read JSON from stdin.")] = [],  # noqa: B006
    model: Annotated[str | None, typer.Option(help="The model.  [default: demo/model]")] = None,
    prompt: Annotated[str | None, typer.Option(help="A text, in the place of token ids.")] = None,
    messages: Annotated[
        Path | None, typer.Option(help="A JSON file with chat messages, or the body of a chat request.")
    ] = None,
    url: Annotated[str, typer.Option(help="Where kvindex serve listens.")] = "http://127.0.0.1:8080",
    token: _Token = "",
    lora_name: Annotated[str | None, typer.Option(help="The adapter.")] = None,
    cache_salt: Annotated[str | None, typer.Option(help="The salt.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as it is.")] = False,  # noqa: FBT002
) -> None:
    """Ask a running service which pods hold a prompt."""
    from kvindex.score import read_messages, run_score

    if bool(tokens) + (prompt is not None) + (messages is not None) > 1:
        raise UserError("score: give token ids, --prompt or --messages, one of them")
    asked: dict[str, Any] = {"model": "demo/model"}
    if messages is not None:
        asked |= read_messages(messages)
    elif prompt is not None:
        asked["prompt"] = prompt
    elif tokens:
        asked["token_ids"] = tokens
    else:
        try:
            asked["token_ids"] = msgspec.json.decode(sys.stdin.buffer.read(), type=list[int])
        except msgspec.DecodeError as error:
            raise UserError(f"stdin: expected a JSON list of token ids: {error}") from error
    given = {"model": model, "lora_name": lora_name, "cache_salt": cache_salt}
    asked |= {name: value for name, value in given.items() if value is not None}
    raise typer.Exit(run_score(url, asked, raw=json, token=token))


@app.command(epilog="Example: kvindex serve --index redis://redis:6379/0 --role scorer")
def serve(
    config: Annotated[Path | None, typer.Option(envvar="KVINDEX_CONFIG", help="A TOML or YAML file.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (http.host).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (http.port).")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port for gRPC (grpc.port); none: no gRPC.")] = None,
    index: Annotated[str | None, typer.Option(help="Where the index is (index.url).")] = None,
    role: Annotated[str | None, typer.Option(help="all, builder or scorer of a shared index (index.role).")] = None,
) -> None:
    """Follow pods and answer questions over HTTP and gRPC."""
    from kvindex.serve import run_serve

    environ = dict(os.environ)
    environ |= {"KVINDEX_HTTP_HOST": host} if host is not None else {}
    environ |= {"KVINDEX_HTTP_PORT": str(port)} if port is not None else {}
    environ |= {"KVINDEX_GRPC_PORT": str(grpc_port)} if grpc_port is not None else {}
    environ |= {"KVINDEX_INDEX_URL": index} if index is not None else {}
    environ |= {"KVINDEX_INDEX_ROLE": role} if role is not None else {}
    loaded = configuration.load(config, environ)
    logs.configure(loaded.log.level, loaded.log.format)
    raise typer.Exit(run_serve(loaded))


@app.command(name="config", epilog="Example: kvindex config --example > kvindex.toml")
def config_(
    file: Annotated[Path | None, typer.Argument(envvar="KVINDEX_CONFIG", help="A TOML or YAML file.")] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a file with every key and its default.")] = False,  # noqa: FBT002
    reference: Annotated[bool, typer.Option("--reference", help="Print docs/configuration.md.")] = False,  # noqa: FBT002
) -> None:
    """Check a file and the environment, and print what serve would run with, without secrets."""
    from kvindex import reference as schema

    if example or reference:
        print(schema.example() if example else schema.markdown(), end="")
    else:
        print(schema.effective(configuration.load(file, os.environ)), end="")


def main() -> None:
    """Run the program. What a person did wrong is one line and exit status 2."""
    try:
        app()
    except (UserError, IndexerError, KVEventsError, ScorerError) as error:
        print(f"kvindex: {error}", file=sys.stderr)
        sys.exit(2)
