"""Commands on pages that a test cannot run: what they name is there all the same."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import typer
import yaml

from kvindex.cli import app

from .documents import Wrong

ROOT = Path(__file__).parents[1]
KVINDEX = typer.main.get_command(app)


class NotRun(NamedTuple):
    """A kind of command that a test cannot run."""

    begins: str
    """A pattern."""
    why: str
    check: Callable[[list[str], Path], None]
    """Looks at its words all the same."""


def _files_exist(words: list[str], folder: Path) -> None:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word in ("-f", "--file", "--filename") and "://" not in after and not (folder / after).exists():
            raise Wrong(f"{' '.join(words)}: there is no {after}")


def _compose(words: list[str], folder: Path) -> None:
    _files_exist(words, folder)
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    if words[2:3] and words[2] in ("logs", "run", "stop", "kill", "restart", "exec", "start"):
        (named, *_) = [word for word in words[3:] if not word.startswith("-")]
        if named not in services:
            raise Wrong(f"{' '.join(words)}: there is no service {named!r}, but {', '.join(services)}")


def _target_exists(words: list[str], _: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words[1:]:
        if "=" not in word and not word.startswith("-") and word not in targets:
            raise Wrong(f"make {word}: there is no such target")


def _extras_exist(words: list[str], _: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        named = re.fullmatch(r"([\w.-]+)\[([\w,-]+)\]", word)
        if named and named[1] == project["name"]:
            unknown = set(named[2].split(",")) - set(project["optional-dependencies"])
            if unknown:
                raise Wrong(f"{word}: there is no extra {', '.join(unknown)}")


def _program_exists(words: list[str], folder: Path) -> None:
    """`python FILE --option` or `python -m MODULE --option`: it is there, and knows the options."""
    path = words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py"
    file = folder / path
    if not file.exists():
        raise Wrong(f"{' '.join(words)}: there is no {path}")
    text = file.read_text()
    for word in words[2:]:
        option = word.partition("=")[0]
        if option.startswith("--") and f'"{option}"' not in text:
            raise Wrong(f"{' '.join(words)}: {path} does not know {option}")


def _vllm(words: list[str], _: Path) -> None:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == "--kv-events-config":
            known = {
                "enable_kv_cache_events",
                "publisher",
                "endpoint",
                "replay_endpoint",
                "buffer_steps",
                "hwm",
                "topic",
            }
            unknown = set(json.loads(after)) - known
            if unknown:
                raise Wrong(f"--kv-events-config: vLLM knows no {', '.join(unknown)}")


def _ours(words: list[str], _: Path) -> None:
    if words[0].endswith("kvindex"):
        check_kvindex(words)


def _nothing(_: list[str], __: Path) -> None:
    """It names nothing of ours."""


NOT_RUN = [
    NotRun(r"docker compose", "needs containers", _compose),
    NotRun(r"docker ", "needs containers", _files_exist),
    NotRun(r"kubectl ", "needs a cluster", _files_exist),
    NotRun(r"vllm serve|python -m sglang", "needs a GPU", _vllm),
    NotRun(r"make ", "sets up, builds or measures for minutes", _target_exists),
    NotRun(r"(\S*python -m )?pip install", "changes the environment", _extras_exist),
    NotRun(r"\S*python (-m )?(benchmarks[/.]|examples[/.](load|demo|plot))", "measures for minutes", _program_exists),
    NotRun(r"(kvindex|curl) .*https://", "needs a certificate for that name", _ours),
    NotRun(r"git clone|cd kv-cache-indexer", "would fetch this repository", _nothing),
]


def check_kvindex(words: list[str]) -> None:
    """See that there is such a command of ours with such options. The values are not looked at where `...` is one."""
    name = words[1] if len(words) > 1 else "--help"
    if name.startswith("-"):
        return
    command = KVINDEX.commands.get(name)
    if command is None:
        raise Wrong(f"{' '.join(words)}: there is no command {name!r}")
    known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    for word in words[2:]:
        option = word.strip("[]").partition("=")[0]
        if option.startswith("--") and option not in {*known, "--help"}:
            raise Wrong(f"{' '.join(words)}: there is no option {option}")


def not_run(text: str) -> NotRun | None:
    """Give why a command is not run, if it is not."""
    return next((kind for kind in NOT_RUN if re.match(kind.begins, text)), None)
