"""`kvindex demo`: a small fleet, its events over real sockets, and what routing by them is worth."""

import threading
import time
from collections import deque

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from indexer import open_index
from kvevents import EventPool
from kvindex.engine import SimulatedEngine
from kvindex.errors import UserError
from kvindex.fleet import Fleet, SimulatedPod, Workload
from scorer import PodMatch, PrefixScorer

_SHOWN = 6


class _Tally:
    """What happened at one pod."""

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0

    def add(self, prompt: int, cached: int) -> None:
        self.requests += 1
        self.prompt_tokens += prompt
        self.cached_tokens += cached

    @property
    def share(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def run_demo(*, pods: int = 4, requests: int = 600, seconds: float = 12.0, plain: bool = False) -> int:
    """Route `requests` prompts in about `seconds`, live in the terminal (`plain`: as lines), and end with a table.

    The exit status is 1 if what the index said at the end was not what the pods held.
    """
    console = Console()
    live_view = console.is_terminal and not plain
    if not console.is_terminal:
        console = Console(width=110)
    console.print(f"starting {pods} simulated pods, an index and a scorer; {requests} prompts follow")
    index = open_index("memory://")
    fleet = Fleet(pods, num_blocks=2500)
    shadow = [SimulatedEngine(num_blocks=2500) for _ in fleet.pods]
    ours = {pod.name: _Tally() for pod in fleet.pods}
    blind = _Tally()
    told: deque[tuple[int, list[PodMatch], str]] = deque(maxlen=_SHOWN)
    workload = Workload(7, conversations=48)
    scorer = PrefixScorer(index)
    pace = threading.Event()
    prompts: deque[list[int]] = deque(maxlen=20)
    try:
        with EventPool(index, workers=2) as pool:
            for pod in fleet.pods:
                pool.subscribe(pod.name, pod.publisher.endpoint, model=fleet.model)
            for pod in fleet.pods:
                if not pod.publisher.wait_for_subscribers(1, 10.0):
                    raise UserError(f"{pod.name} at {pod.publisher.endpoint}: the subscriber did not connect in 10 s")
            start = time.monotonic()
            with Live(console=console, auto_refresh=False, transient=True) as live:
                for number in range(requests):
                    prompt, answer = workload.next()
                    matches = scorer.match(prompt, model=fleet.model)
                    chosen = _choose(fleet.pods, matches, ours)
                    ran = chosen.run(prompt, answer)
                    ours[chosen.name].add(len(prompt), ran.cached_tokens)
                    blind.add(len(prompt), shadow[number % pods].run(prompt, answer).cached_tokens)
                    prompts.append(prompt)
                    told.append((len(prompt), matches, chosen.name))
                    if live_view:
                        live.update(_screen(fleet, ours, blind, told), refresh=True)
                    elif (number + 1) % max(1, requests // 6) == 0:
                        console.print(
                            f"{number + 1:5} prompts: hit share {_share(ours):5.1%} by score, "
                            f"{blind.share:5.1%} round robin"
                        )
                    pace.wait(max(0.0, start + (number + 1) * seconds / requests - time.monotonic()))
            pool.drain(30.0)
            events = pool.stats()["events_total"]
        wrong = [
            (pod.name, len(prompt))
            for prompt in prompts
            for pod in fleet.pods
            if _told(scorer.match(prompt, model=fleet.model), pod.name) != pod.engine.hit_blocks(prompt)
        ]
    finally:
        fleet.close()
    console.print(_screen(fleet, ours, blind, told))
    console.print(
        f"{events} events over ZMQ. Hit share: [bold]{_share(ours):.1%} routed by score[/bold], "
        f"{blind.share:.1%} round robin ({_share(ours) / max(blind.share, 1e-9):.1f} times)."
    )
    verdict = f"{len(wrong)} answers differ: {wrong[:3]}" if wrong else "all equal"
    console.print(f"Checked {len(prompts)} prompts x {pods} pods against what the pods hold: {verdict}.")
    return 1 if wrong else 0


def _choose(pods: list[SimulatedPod], matches: list[PodMatch], ours: dict[str, _Tally]) -> SimulatedPod:
    """Take the pod with the highest score; of equal ones that with the fewest requests."""
    scores = {match.pod: match.score for match in matches}
    return min(pods, key=lambda pod: (-scores.get(pod.name, 0.0), ours[pod.name].requests))


def _told(matches: list[PodMatch], pod: str) -> int:
    return next((match.blocks for match in matches if match.pod == pod), 0)


def _share(ours: dict[str, _Tally]) -> float:
    prompt = sum(tally.prompt_tokens for tally in ours.values())
    return sum(tally.cached_tokens for tally in ours.values()) / prompt if prompt else 0.0


def _screen(
    fleet: Fleet, ours: dict[str, _Tally], blind: _Tally, told: deque[tuple[int, list[PodMatch], str]]
) -> Group:
    pods = Table(title="Pods")
    for name in ("pod", "blocks held", "requests", "prompt tokens", "from cache", "hit share"):
        pods.add_column(name, justify="left" if name == "pod" else "right")
    for pod in fleet.pods:
        tally = ours[pod.name]
        cells = [f"{len(pod.engine.resident()):,}", f"{tally.requests:,}", f"{tally.prompt_tokens:,}"]
        pods.add_row(pod.name, *cells, f"{tally.cached_tokens:,}", f"{tally.share:.1%}")
    scores = Table(title="Newest prompts: blocks of the prompt each pod holds, and the choice")
    for name in ("tokens", *(pod.name for pod in fleet.pods), "sent to"):
        scores.add_column(name, justify="right")
    for tokens, matches, chosen in told:
        held = [
            f"[bold]{_told(matches, p.name)}[/bold]" if p.name == chosen else str(_told(matches, p.name))
            for p in fleet.pods
        ]
        scores.add_row(f"{tokens:,}", *held, chosen)
    bar = Panel(f"hit share  by score {_share(ours):6.1%}   round robin {blind.share:6.1%}")
    return Group(pods, scores, bar)
