"""`kvindex demo`: a small fleet, its index and a router on one machine, shown live, and checked at the end."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from indexer import Source, open_index
from kvevents import EventPool
from kvevents.testing import DIALECTS
from kvindex.engine import OutOfBlocksError, Request, SimulatedEngine
from kvindex.fleet import Fleet, Pod
from kvindex.workload import Turn, Workload
from scorer import PrefixScorer

MODEL = "demo/model"
BLOCK_SIZE = 16
BLOCKS_PER_POD = 640
_OPEN_PER_POD = 2
_SHOWN = 6
_CHECKED = 40
_CATCH_UP_S = 10.0
_REFRESH_S = 0.1
_PLAIN_GAP_S = 0.005
"""Prompts that come faster than events travel are routed blindly; engines take longer than this anyway."""


@dataclass
class _Routed:
    """One prompt and where it went."""

    turn: Turn
    scores: dict[str, float]
    pod: str
    cached: int


@dataclass(eq=False)
class _RoundRobin:
    """The same engines without an index: each prompt goes to the next pod."""

    engines: list[SimulatedEngine]
    next: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    open: deque[tuple[SimulatedEngine, Request, list[int]]] = field(default_factory=deque)

    def route(self, turn: Turn) -> None:
        """Run one prompt on the next pod."""
        engine = self.engines[self.next]
        self.next = (self.next + 1) % len(self.engines)
        while True:
            try:
                request = engine.begin(turn.prompt)
                break
            except OutOfBlocksError:
                if not self.open:
                    raise
                self._finish()
        self.prompt_tokens += len(turn.prompt)
        self.cached_tokens += request.cached_tokens
        self.open.append((engine, request, turn.output))
        if len(self.open) > _OPEN_PER_POD * len(self.engines):
            self._finish()

    @property
    def hit_share(self) -> float:
        """The share of all prompt tokens that was not computed again."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def _finish(self) -> None:
        engine, request, output = self.open.popleft()
        engine.finish(request, output)


class _Router:
    """Sends each prompt to the pod that holds most of it, among equals to the one with the least to do."""

    def __init__(self, fleet: Fleet, scorer: PrefixScorer) -> None:
        self.fleet = fleet
        self.scorer = scorer
        self.open: deque[tuple[Pod, Request, list[int]]] = deque()
        self.busy = {pod.name: 0 for pod in fleet.pods}
        self.last: deque[_Routed] = deque(maxlen=_CHECKED)

    def route(self, turn: Turn) -> None:
        """Run one prompt on the best pod."""
        scores = self.scorer.score(turn.prompt, model=MODEL)
        pod = min(
            self.fleet.pods,
            key=lambda pod: (
                -scores.get(pod.name, 0.0),
                self.busy[pod.name],
                pod.prompt_tokens - pod.cached_tokens,
            ),
        )
        while True:
            try:
                request = pod.begin(turn.prompt)
                break
            except OutOfBlocksError:
                if not self.open:
                    raise
                self.finish_oldest()
        self.open.append((pod, request, turn.output))
        self.busy[pod.name] += 1
        self.last.append(_Routed(turn, scores, pod.name, request.cached_tokens))
        if len(self.open) > _OPEN_PER_POD * len(self.fleet.pods):
            self.finish_oldest()

    def finish_oldest(self) -> None:
        """End the request that has been open for longest."""
        pod, request, output = self.open.popleft()
        pod.finish(request, output)
        self.busy[pod.name] -= 1

    @property
    def hit_share(self) -> float:
        """The share of all prompt tokens that was not computed again, over all pods."""
        total = sum(pod.prompt_tokens for pod in self.fleet.pods)
        return sum(pod.cached_tokens for pod in self.fleet.pods) / total if total else 0.0


def run_demo(*, pods: int = 4, requests: int = 400, seconds: float = 15.0, plain: bool = False) -> int:
    """Route a stream of prompts over a simulated fleet by what the index says, and check the index at the end.

    Pods publish over real ZMQ sockets on the loopback, in all dialects in turn. The traffic ends after `requests`
    prompts or `seconds`. `plain` prints lines and no live display, as happens when standard output is no terminal.
    Gives the exit status: 1 when the index and an engine disagree at the end.
    """
    console = Console(file=sys.stdout, highlight=False)
    live = not plain and console.is_terminal
    index = open_index("memory://")

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    try:
        with (
            Fleet(pods, model=MODEL, block_size=BLOCK_SIZE, num_blocks=BLOCKS_PER_POD, dialects=DIALECTS) as fleet,
            EventPool(index, workers=2, model=MODEL) as pool,
        ):
            for pod in fleet.pods:
                pool.subscribe(pod.name, pod.publisher.endpoint, replay=pod.publisher.replay, model=MODEL)
            for pod in fleet.pods:
                pod.publisher.wait_for_subscribers(1, timeout=_CATCH_UP_S)
            router = _Router(fleet, PrefixScorer(index))
            shadow = _RoundRobin(
                [SimulatedEngine(block_size=BLOCK_SIZE, num_blocks=BLOCKS_PER_POD) for _ in fleet.pods]
            )
            say(f"{pods} pods publish KV events over ZMQ; up to {requests} prompts are routed by what the index says.")
            if live:
                with Live(_view(router, shadow), console=console, refresh_per_second=10) as display:
                    _run(router, shadow, requests, seconds, lambda: display.update(_view(router, shadow)), paced=True)
            else:
                _run(router, shadow, requests, seconds, lambda: say(_line(router, shadow)), paced=False)
            while router.open:
                router.finish_oldest()
            behind = _catch_up(pool, fleet)
            wrong, compared = _differences(router)
            console.print(_pods(router, examples=True))
            ours, theirs = router.hit_share, shadow.hit_share
            say(f"tokens not computed again: {ours:.0%} routed by the index, {theirs:.0%} under round robin")
            if behind or wrong:
                say(f"check FAILED: {len(behind)} pods behind, {len(wrong)} of {compared} answers differ")
                for line in (behind + wrong)[:_SHOWN]:
                    say(f"  {line}")
                return 1
            say(
                f"check: for the last {len(router.last)} prompts x {pods} pods the index and the engines agree "
                f"({fleet.blocks_published()} blocks published)"
            )
            return 0
    except TimeoutError as error:
        say(f"the demo could not run: {error}")
        return 1
    finally:
        index.close()


def _run(
    router: _Router, shadow: _RoundRobin, requests: int, seconds: float, show: Callable[[], None], *, paced: bool
) -> None:
    """Route the prompts; `paced` spreads them so that they can be watched, else they come every few milliseconds."""
    workload = Workload(7, systems=12, conversations=24, max_tokens=1_400, system_tokens=480)
    start = time.monotonic()
    pause = threading.Event()
    gap = min(0.6 * seconds / max(1, requests), 1.0 if paced else _PLAIN_GAP_S)
    shown = start
    for number in range(requests):
        now = time.monotonic()
        if now - start >= seconds:
            break
        turn = next(workload)
        router.route(turn)
        shadow.route(turn)
        pause.wait(max(0.0, start + (number + 1) * gap - time.monotonic()))
        last = number + 1 == requests
        if last or ((now - shown >= _REFRESH_S) if paced else (number + 1) % max(1, requests // 5) == 0):
            show()
            shown = now


def _catch_up(pool: EventPool, fleet: Fleet) -> list[str]:
    """Wait until all that was published has been applied; name the pods for which that did not happen."""
    deadline = time.monotonic() + _CATCH_UP_S
    pause = threading.Event()
    while True:
        pool.drain(_CATCH_UP_S)
        applied = pool.sequences()
        behind = [
            f"{pod.name}: published up to {pod.publisher.last_seq}, applied up to {applied.get(Source(pod.name))}"
            for pod in fleet.pods
            if applied.get(Source(pod.name), -1) != pod.publisher.last_seq
        ]
        if not behind or time.monotonic() >= deadline:
            return behind
        pause.wait(0.01)


def _differences(router: _Router) -> tuple[list[str], int]:
    """Compare what the index says of the last prompts with what the engines hold."""
    wrong, compared = [], 0
    for routed in router.last:
        prompt = routed.turn.prompt
        said = {match.pod: match.blocks for match in router.scorer.match(prompt, model=MODEL)}
        for pod in router.fleet.pods:
            compared += 1
            held = pod.engine.hit_blocks(prompt)
            if said.get(pod.name, 0) != held:
                wrong.append(
                    f"{pod.name}: {len(prompt)} tokens, {held} blocks held, the index says {said.get(pod.name)}"
                )
    return wrong, compared


def _pods(router: _Router, *, examples: bool = False) -> Table:
    shown = list(router.last)[-3:] if examples else []
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("pod", no_wrap=True)
    table.add_column("dialect", no_wrap=True)
    for name in ("blocks", "requests", "hit\nshare"):
        table.add_column(name, justify="right", no_wrap=True)
    for routed in shown:
        table.add_column(f"score of\n{len(routed.turn.prompt)} tok.", justify="right", no_wrap=True)
    answers = [router.scorer.score(routed.turn.prompt, model=MODEL) for routed in shown]
    for pod in router.fleet.pods:
        scores = [f"{answer.get(pod.name, 0.0):g}" for answer in answers]
        held = str(sum(pod.engine.resident().values()))
        table.add_row(pod.name, pod.dialect, held, str(pod.requests), f"{pod.hit_share:.0%}", *scores)
    return table


def _view(router: _Router, shadow: _RoundRobin) -> Group:
    pods = router.fleet.pods
    prompts = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("prompt tokens", *(pod.name for pod in pods), "cached tokens"):
        prompts.add_column(name, justify="right")
    for routed in list(router.last)[-_SHOWN:]:
        cells = [
            Text(f"{routed.scores.get(pod.name, 0.0):g}", "bold green" if pod.name == routed.pod else "dim")
            for pod in pods
        ]
        prompts.add_row(str(len(routed.turn.prompt)), *cells, str(routed.cached))
    return Group(
        _pods(router),
        Panel(prompts, title="Scores of the last prompts, the chosen pod in green", title_align="left"),
        Text(_line(router, shadow)),
    )


def _line(router: _Router, shadow: _RoundRobin) -> str:
    done = sum(pod.requests for pod in router.fleet.pods)
    return f"{done} prompts: {router.hit_share:.0%} of tokens cached, round robin {shadow.hit_share:.0%}"
