"""A reader of the documentation who does all that it says: runs its Python, types its commands, saves its files.

What pages call by the addresses of a fleet (`10.0.0.7`, `redis:6379`, `/models`) is a simulated one on free ports of
this machine. `tests.not_run` has what takes more than that; of those it is checked that what they name exists.
"""

import ast
import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from indexer import open_index
from kvevents import EventPool
from scorer import PrefixScorer

from .documents import Block, Command, Page, Wrong, commands_of, same_output, words_of
from .not_run import ROOT, check_kvindex, not_run
from .world import MODEL, World
from .written import check_data

COPIED = ("proto", "deploy", "examples", "benchmarks", "compose.yaml", "Dockerfile", "Makefile")
PATIENCE_S = 60.0
AGAIN_S = 20.0
STATUSES = {
    "doctor": (0, 1),  # it says of a simulated engine what it thinks of it
    "replay": (0, 1),  # nobody may come to hear what it publishes
}
HAS_TOOLS = all(map(shutil.which, ("bash", "curl")))


def _read_json(text: str) -> None:
    """Read one value, or one in each line. Raises `ValueError`."""
    try:
        json.loads(text)
    except ValueError:
        lines = text.strip().splitlines()
        if len(lines) < 2:
            raise
        for line in lines:
            json.loads(line)


class _Running(NamedTuple):
    name: str
    command: str
    process: subprocess.Popen
    output: list[str]
    log: list[str]


class Reader:
    """Does what one page says, from its top to its end."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self._folder = folder
        self.ran = 0
        self._running: list[_Running] = []
        self._free = _free_ports()
        self._service = ""
        self._grpc = next(self._free)
        self._router = next(self._free)
        self._base = _base_port()
        self._environ = {k: v for k, v in os.environ.items() if not k.startswith("KVINDEX_") or k == "KVINDEX_IMPL"}
        bin_folder = Path(sys.executable).parent
        self._environ.pop("PWD", None)
        self._environ["PATH"] = f"{bin_folder}{os.pathsep}{self._environ['PATH']}"
        self._names: dict[str, Any] | None = None
        self._made: list[Any] = []
        for name in COPIED:  # and not linked: what a page writes must not land in the project
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name)
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, folder)
        (folder / ".venv").mkdir()
        (folder / ".venv/bin").symlink_to(bin_folder)
        (folder / "chat.json").write_text('[{"role": "user", "content": "Once upon a time"}]')

    def read(self, page: Page) -> None:
        """Do all that a page says. Raises `Wrong`, with the line, for what does not hold."""
        try:
            for block in page.blocks:
                try:
                    self._do(block)
                except Wrong as error:
                    raise Wrong(f"{page.path.name}:{block.line}: {error}") from None
        finally:
            wrong = self._end()
        if wrong:
            raise Wrong(f"{page.path.name}: {wrong}")

    def _do(self, block: Block) -> None:
        if block.file:
            path = self._folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # it may be a link to a file of the project
            path.write_text(self._substituted(block.text))
        match block.language:
            case "python":
                if block.file:
                    compile(block.text, block.file, "exec")
                else:
                    self._python(block)
            case "console" | "bash" | "sh":
                try:
                    commands = commands_of(block)
                except ValueError as error:
                    raise Wrong(str(error)) from None
                for command in commands:
                    self._command(command)
            case "toml" | "yaml":
                check_data(block.language, block.text, self._folder)
            case "json":
                try:
                    _read_json(block.text)
                except ValueError as error:
                    raise Wrong(f"no JSON: {error}") from None
            case "text" | "proto":
                pass
            case other:
                raise Wrong(f"a block in {other!r}: nobody knows how to check that")

    # Python

    def _python(self, block: Block) -> None:
        if self._names is None:
            self._names = self._prelude()
            self._made = list(self._names.values())  # pages may use the names for others
        text = self._world.substituted(block.text)
        printed = io.StringIO()
        try:
            code = compile(text, "page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            with contextlib.redirect_stdout(printed):
                done = eval(code, self._names)  # noqa: S307  (our own pages)
                if inspect.iscoroutine(done):
                    asyncio.run(done)
        except Exception as error:
            raise Wrong(f"{type(error).__name__}: {error}\n{block.text}") from error
        self.ran += 1
        said = re.findall(r"^ *print\(.*\)  # (.+)$", block.text, re.MULTILINE)
        lines = iter(printed.getvalue().splitlines())
        for expected in said:
            if not any(same_output(expected, line) for line in lines):
                raise Wrong(f"expected {expected!r}, printed\n{printed.getvalue()}")

    def _prelude(self) -> dict[str, Any]:
        """What a page may take for granted: a pool that follows a pod, a scorer, a prompt."""
        index = open_index("memory://")
        pool = EventPool(index)
        pool.start()
        entry = self._world.fleet.endpoints()[0]
        pool.subscribe("pod-a", entry["endpoint"], replay=entry["replay"], model=MODEL)
        _until(lambda: pool.stats()["applied_total"] > 0, "the simulated pod to be heard")
        prompt = self._world.prompt
        return {
            "index": index,
            "pool": pool,
            "scorer": PrefixScorer(index),
            "tokens": prompt,
            "token_ids": prompt * 80,
            "messages": [{"role": "user", "content": "Hello"}],
            "body": {"model": MODEL, "prompt": "Once upon a time"},
            "path": self._world.snapshot,
            "__name__": "page",
        }

    # commands

    def _substituted(self, text: str) -> str:
        text = self._world.substituted(text)
        if re.search(r"\b(127\.0\.0\.1|localhost):808[01]\b", text):
            text = re.sub(r"\b(127\.0\.0\.1|localhost):808[01]\b", self._service or self._start_service(), text)
        text = re.sub(r"\b(127\.0\.0\.1|localhost):8000\b", f"127.0.0.1:{self._router}", text)
        text = re.sub(r"\blocalhost:50051\b", f"127.0.0.1:{self._grpc}", text)
        return self._shifted(text)

    def _shifted(self, text: str) -> str:
        """Put addresses of this world in the place of a page's, without starting anything; 5557 is its own fleet."""
        text = self._world.substituted(text)

        def port(found: re.Match[str]) -> str:
            return f"tcp://127.0.0.1:{int(found[2]) + self._base - 5557}"

        if self._service:
            text = re.sub(r"\b(127\.0\.0\.1|localhost):808[01]\b", self._service, text)
        return re.sub(r"tcp://(127\.0\.0\.1|localhost):(55[5-8]\d)\b", port, text)

    def _command(self, command: Command) -> None:
        try:
            words = words_of(command.text)
        except ValueError as error:
            raise Wrong(f"{command.text}: {error}") from None
        kind = not_run(" ".join(words))
        if kind is not None:
            kind.check(words, self._folder)
            return
        name = words[1] if len(words) > 1 and words[0].endswith("kvindex") else ""
        if name:
            check_kvindex(words)
        elif words[1:3] == ["-m", "examples.router"]:
            name = "router"
        text = self._tuned(name, words, command.text)
        self.ran += 1
        if self._stays(name, words):
            self._start(name, text, command)
        elif words[0] == "curl" or name == "doctor":
            self._ask(name, text, command)
        else:
            self._run(name, text, command)

    def _ask(self, name: str, text: str, command: Command) -> None:
        """Ask again where the answer is wrong: what has just been started may have nothing to say yet."""
        deadline = time.monotonic() + AGAIN_S
        while True:
            try:
                self._run(name, text, command)
            except Wrong:
                if time.monotonic() > deadline:
                    raise
            else:
                return
            time.sleep(0.1)

    def _tuned(self, name: str, words: list[str], text: str) -> str:
        """Give a command with this world's addresses, and no longer than it has to take."""
        text = self._substituted(text.rstrip().removesuffix("&"))
        more: dict[str, list[str]] = {
            "bench": ["--quick"],
            "doctor": ["--seconds 0.5"],
            "watch": ["--seconds 0.5"],
            "record": ["--seconds 0.5"],
            "demo": ["--requests 60", "--seconds 1"],
            "fleet": [f"--base-port {self._base}"],
            "router": [f"--port {self._router}"],
            "score": [f"--url http://{self._service}"],
            "replay": ["--base-port 0"] if "--publish" in words else [],
        }
        if name == "score" and "--url" not in words and not self._service:
            more["score"] = [f"--url http://{self._start_service()}"]
        added = [option for option in more.get(name, []) if option.split()[0] not in words]
        if name == "watch" and "--seconds" not in words:
            text = text.replace(" # ", " --seconds 0.5 # ", 1)
        if added:
            head, comment, tail = text.partition("  #")
            text = f"{head} {' '.join(added)} {comment}{tail}"
        text = re.sub(r"^curl ", "curl --fail-with-body ", text)
        text = re.sub(r"--grpc-port \d+", f"--grpc-port {self._grpc}", text)
        return text.replace("....", "*")  # a name with a date in it

    def _stays(self, name: str, words: list[str]) -> bool:
        return name in ("serve", "router") or (name == "fleet" and "--seconds" not in words) or "--publish" in words

    def _run(self, name: str, text: str, command: Command) -> None:
        state = self._folder / ".state"
        state.unlink(missing_ok=True)
        script = f"{text}\n__status=$?; env -0 > '{state}'; exit $__status"
        try:
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=self._environ.get("PWD", self._folder),
                env=self._environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Wrong(f"line {command.line}: {text}\ndid not end within {PATIENCE_S:.0f} s") from None
        if done.returncode not in STATUSES.get(name, (0,)):
            raise Wrong(f"line {command.line}: {text}\nended with {done.returncode}\n{done.stdout}{done.stderr}")
        if state.exists():
            pairs = (pair.partition("=") for pair in state.read_text().split("\0") if pair)
            self._environ = {key: value for key, _, value in pairs if key not in ("_", "SHLVL", "OLDPWD")}
        said = self._shifted(command.output)
        if said.strip() and not same_output(said, done.stdout):
            raise Wrong(f"line {command.line}: {text}\nprinted\n{done.stdout}where the page says\n{said}")

    # what goes on running

    def _start_service(self) -> str:
        """Start one that follows the whole fleet, for pages that take it for granted."""
        pods = [{**entry, "pod": f"vllm-{n}"} for n, entry in enumerate(self._world.fleet.endpoints())]
        before = dict(self._environ)
        self._environ |= {
            "KVINDEX_PODS": json.dumps(pods),
            "KVINDEX_TOKENIZERS_FOLDERS": json.dumps([str(self._world.models)]),
        }
        self._start("serve", "kvindex serve", Command("kvindex serve", "", 0))
        self._environ = before
        return self._service

    def _start(self, name: str, text: str, command: Command) -> None:
        environ = dict(self._environ)
        if name == "serve" and "--port" not in text:
            environ["KVINDEX_HTTP_PORT"] = str(next(self._free))
        process = subprocess.Popen(
            ["bash", "-c", f"exec {text}"],
            cwd=self._folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running = _Running(name, text, process, [], [])
        for stream, lines in ((process.stdout, running.output), (process.stderr, running.log)):
            threading.Thread(target=lambda s=stream, ls=lines: ls.extend(iter(s.readline, "")), daemon=True).start()
        self._running.append(running)

        def said(pattern: str) -> str:
            if process.poll() is not None:
                raise Wrong(f"line {command.line}: {text}\nended with {process.returncode}\n{''.join(running.log)}")
            found = re.search(pattern, "".join(running.log + running.output))
            return found[1] if found else ""

        if name == "serve":
            address = _until(lambda: said(r'"url": ?"http://([^"]+)"'), text)
            if "--role builder" not in text or not self._service:
                self._service = address
            _until(lambda: said("^()") or _is_open(address), f"{text} to listen")
        elif name == "router":
            _until(lambda: said("^()") or _is_open(f"127.0.0.1:{self._router}"), text)
        else:
            _until(lambda: said(r"(tcp://)"), text)
        if command.output.strip():
            expected = self._shifted(command.output)
            try:
                _until(lambda: same_output(expected, "".join(list(running.output))), "what the page says")
            except Wrong:
                printed = "".join(running.output)
                raise Wrong(f"{text}\nprinted\n{printed}where the page says\n{expected}") from None

    def _end(self) -> str:
        wrong = ""
        for running in reversed(self._running):
            running.process.send_signal(signal.SIGTERM)
        for running in reversed(self._running):
            try:
                status = running.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                running.process.kill()
                status = running.process.wait()
            if status not in (*STATUSES.get(running.name, (0,)), -signal.SIGTERM):
                wrong = f"{running.command} ended with {status}\n{''.join(running.log)}"
            for stream in (running.process.stdout, running.process.stderr):
                stream.close()
        made = {id(thing): thing for thing in [*self._made, *(self._names or {}).values()]}
        for thing in reversed(made.values()):
            if callable(getattr(thing, "close", None)) and not isinstance(thing, type):
                thing.close()
        return wrong


def _is_open(address: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(tuple(address.rsplit(":", 1)), 1):
        return True
    return False


def _until(is_so: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = is_so()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Wrong(f"waited {PATIENCE_S:.0f} s for {what}")
        time.sleep(0.01)


def _free_ports():
    while True:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        yield port


def _base_port(count: int = 32) -> int:
    """Give the first of some free ports in a row; tests that run beside each other look at different ones."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 5
    for base in range(21_557 + 2_000 * worker, 23_557 + 2_000 * worker, count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(base, base + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return base
    raise Wrong("no free ports")
