"""Runs chat templates in processes of their own, where they can be stopped."""

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from scorer.errors import InvalidRequest, ScorerError, TemplateFailed

_WORKER = Path(__file__).with_name("render_worker.py")


class Renderer:
    """Renders chat templates, each within `max_seconds` of processor time, `max_bytes` of memory, `max_chars` of text.

    The first use starts a process; up to `workers` of them run, each of about 15 MB. One that a template made too slow
    or too large is replaced. All methods may be called from any thread and block; `close` ends the processes.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        max_seconds: float = 5.0,
        max_bytes: int = 512 * 1024 * 1024,
        max_chars: int = 16 * 1024 * 1024,
    ) -> None:
        self._limits = (str(max_seconds), str(max_bytes), str(max_chars))
        self._max_seconds = max_seconds
        self._max_chars = max_chars
        # each place is a worker, or one that is not started; taking from the end keeps to those that are
        self._places: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._places.put(None)
        self._parts: dict[str, bool] = {}
        self._lock = threading.Lock()
        self._running: set[_Worker] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"Renderer({len(self._running)} processes)"

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """Give what a template makes of some variables, which are values that JSON has.

        Raises `TemplateFailed` when it fails or takes too much, `InvalidRequest` for other values and too much text.
        """
        text: str = self._ask({"template": template, "variables": variables})["text"]
        return text

    def wants_parts(self, template: str) -> bool:
        """Say whether a template goes through the parts of a message's content itself. Raises `TemplateFailed`."""
        known = self._parts.get(template)
        if known is None:
            known = bool(self._ask({"template": template})["parts"])
            if len(self._parts) >= 128:
                self._parts.clear()
            self._parts[template] = known
        return known

    def close(self) -> None:
        """End the processes. What is being rendered fails."""
        with self._lock:
            self._closed = True
            running = list(self._running)
            self._running.clear()
        for worker in running:
            worker.end()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            line = json.dumps(question).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"messages: expected values that JSON has: {error}") from error
        if len(line) > 6 * self._max_chars:  # six bytes a character, escaped
            raise InvalidRequest(f"messages: {len(line)} bytes, at most {6 * self._max_chars} are rendered")
        worker = self._places.get()
        try:
            if worker is None:
                worker = self._start()
            data = worker.ask(line)
            if data is None:
                status = worker.end()
                with self._lock:
                    self._running.discard(worker)
                worker = None
                raise TemplateFailed(f"chat_template: {self._why(status)}")
        finally:
            self._places.put(worker)
        answer: dict[str, Any] = json.loads(data)
        if "error" in answer:
            raise TemplateFailed(f"chat_template: {answer['error']}")
        return answer

    def _start(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise ScorerError("the renderer is closed")
            worker = _Worker(self._limits)
            self._running.add(worker)
            return worker

    def _why(self, status: int) -> str:
        if status == -27:  # SIGPROF, the timer's
            return f"took more than {self._max_seconds:g} s of processor time"
        return f"its process ended with status {status}"


class _Worker:
    """One process, for one question at a time."""

    def __init__(self, limits: tuple[str, ...]) -> None:
        # -I: neither this folder, whose `tokenizers` is another, nor the environment decides what is imported
        command = [sys.executable, "-I", str(_WORKER), *limits]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603
        except OSError as error:
            raise ScorerError(f"no process to render in: {error}") from error

    def ask(self, line: bytes) -> bytes | None:
        """Give the answer, or nothing when the process is gone."""
        into, out = self._process.stdin, self._process.stdout
        assert into is not None  # noqa: S101  (both are pipes)
        assert out is not None  # noqa: S101
        try:
            into.write(line)
            into.flush()
            data = out.readline()
        except (OSError, ValueError):
            return None
        return data if data.endswith(b"\n") else None

    def end(self) -> int:
        """End the process, if it has not, and give its status."""
        # the timer's signal may be on its way: only a process that still runs is killed
        try:
            status = self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # what was not written is for nobody now
        return status
