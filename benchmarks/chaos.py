"""Faults of all kinds against a fleet that is followed: `python benchmarks/chaos.py [--seed N] [--seconds S]`.

Simulated pods store, remove and clear blocks and say so through real sockets. Half of them can say again all that they
ever said, a quarter only a few batches, a quarter nothing; half of each are behind a network that misbehaves. What is
done to them is drawn by lot from the seed: which batch of which pod, not at which moment it arrives.

- dropped: 1 % of the batches never leave, one to three in a row.
- restarted, killed: the engine begins anew at the same endpoints, with an empty cache and numbers from 0, at once or
  after a while.
- overtaken: it begins anew, and what is heard of it first has about the number that was due from the one before.
- stalled, cut: the connections of a pod (events, replay or both) stand still for a while, or are reset.

Between the phases are quiet points. Faults end, each pod says one last batch (some of them drop it: only silence can
tell), and when nothing changes any more, all that the index says of each pod is compared with what the pod holds. The
status is 1, and the seed is printed, where a pod that is called exact was wrong, or one that can say all of it again
was not exact after 30 seconds, or its last batch was not known then.

The table has what was injected, what the index and the pool say of it (looked at every 20 ms: what is over sooner is
not seen), how long pods were called degraded before they were exact again, and the blocks of which the index was wrong.
One case is told apart, as nobody could know it: a pod without replay begins anew, and the first batch heard of it has
just the number that was due from the one before. A pod is counted there only if its answers are what exactly that
gives, with the number that the index was at.
"""

import argparse
import logging
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog
import zmq
from report import aligned

from indexer import Index, Prompt, Source, SourceStatus, open_index
from kvevents import EventPool, recovery, replays
from kvevents.faults import Proxy
from kvevents.testing import DIALECTS, Framing, Publisher, RawEvent, cleared, removed, stored
from kvindex.bench.machine import machine
from kvindex.bench.report import number
from kvindex.bench.workload import MODEL

# So that what is found by waiting is found within seconds: defaults are 5, 1, 60 and 3. The third stays well above the
# second in which workers look after what is due: attempts to heal have precedence over asking who is silent, and made
# every second they would leave that no turn.
recovery.SILENCE_S = 0.5
recovery.COOL_DOWN_S = 0.2
recovery.MOST_COOL_DOWN_S = 5.0
replays.ANSWER_S = 0.4

BLOCK, ROOTS, TRUNK, BRANCHES, TWIG = 4, 10, 3, 4, 3
WHOLE, SHORT, NONE = "replay whole", "replay short", "no replay"
KINDS = (WHOLE, WHOLE, SHORT, NONE)
EVERY = {"restarted": 1000, "overtaken": 1000, "killed": 1000, "stalled": 400, "cut": 400}
"""One of how many batches has which fault."""
DROPPED, RUN = 0.01, 3
LAST_LOST = 0.3
LOOK_S, SETTLE_S, WAIT_S = 0.02, 2.5, 30.0


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """A block of some chain."""

    name: int
    parent: "Block | None"
    tokens: tuple[int, ...]

    def path(self) -> list["Block"]:
        """Give the chain from its root to this."""
        return [*(self.parent.path() if self.parent else []), self]


class World:
    """All blocks that there are: trees, and the chains to their leaves."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._blocks = 0
        self.chains: list[list[Block]] = []
        for _ in range(ROOTS):
            trunk = self._grow(None, TRUNK)
            self.chains += [self._grow(trunk, TWIG).path() for _ in range(BRANCHES)]

    def root(self) -> Block:
        """Give a new block that begins a chain and is all of it."""
        block = self._grow(None, 1)
        self.chains.append([block])
        return block

    def _grow(self, parent: Block | None, blocks: int) -> Block:
        for _ in range(blocks):
            self._blocks += 1
            tokens = (self._blocks, *(self._rng.randrange(100_000) for _ in range(BLOCK - 1)))
            parent = Block(self._blocks, parent, tokens)
        assert parent is not None
        return parent


@dataclass(frozen=True, slots=True)
class Batch:
    """What a batch did to a cache: cleared it, else removed blocks, then stored others."""

    stores: Sequence[Block] = ()
    removes: Sequence[Block] = ()
    clears: bool = False

    def change(self, held: Counter[Block]) -> None:
        if self.clears:
            held.clear()
        for block in self.removes:
            held[block] = max(0, held[block] - 1)
        held.update(self.stores)


class Engine:
    """A pod: its cache, its publisher, and the network before that."""

    def __init__(self, place: int, context: "zmq.Context[zmq.Socket[bytes]]", world: World, rng: random.Random) -> None:
        self.pod, self.kind = f"pod-{place}", KINDS[place % len(KINDS)]
        self._world, self._rng, self._context = world, rng, context
        self._dialect = rng.choice(DIALECTS)
        self._framing: Framing = "new" if rng.random() < 0.5 else "old"
        self._steps = rng.choice((2, 4, 8)) if self.kind == SHORT else 1_000_000
        self._named_anew = self.kind != NONE and rng.random() < 0.5
        """Each life gives its blocks other names."""
        self._base = 0
        self.lives: list[list[Batch]] = [[]]
        """All batches by life, the last life being this one."""
        self.applied: list[int] = []
        """The number that the index was at when a life ended."""
        self.held: Counter[Block] = Counter()
        self.publisher: Publisher | None = None
        self._endpoint = "tcp://127.0.0.1:0"
        self._replay = None if self.kind == NONE else self._endpoint
        self._open()
        is_behind = (place // len(KINDS)) % 2 == 0
        places = [at for at in (self._endpoint, self._replay) if at]
        self.ways = [Proxy("127.0.0.1", int(at.rpartition(":")[2])) for at in places if is_behind]
        reach = [f"tcp://127.0.0.1:{way.port}" for way in self.ways] or places
        self.endpoint, self.replay = reach[0], reach[1] if len(reach) > 1 else None

    def _open(self) -> None:
        self.publisher = Publisher(
            self._endpoint,
            replay=self._replay,
            buffer_steps=self._steps,
            framing=self._framing,
            context=self._context,
        )
        self._endpoint, self._replay = self.publisher.endpoint, self.publisher.replay

    def kill(self) -> None:
        if self.publisher is not None:
            self.publisher.close()
            self.publisher = None

    def start(self, applied: int) -> None:
        """Begin anew, killed before or not, when the index is at a number."""
        self.held.clear()
        self.applied.append(applied)
        self.lives.append([])
        self._base = self._rng.getrandbits(60) if self._named_anew else 0
        if self.publisher is None:
            self._open()
        else:
            self.publisher.restart()

    def close(self) -> None:
        self.kill()
        for way in self.ways:
            way.close()

    def step(self, *, lost: bool = False) -> None:
        """Do what an engine does for a request or two."""
        chance, holds = self._rng.random(), list(self.held)
        chain = self._rng.choice(self._world.chains[: ROOTS * BRANCHES])
        missing = [block for block in chain[: self._rng.randint(1, len(chain))] if block not in self.held]
        if chance < 0.005:
            self._say(Batch(clears=True), lost=lost)
        elif holds and (chance < 0.4 or not missing):
            self._say(Batch(removes=self._rng.sample(holds, min(len(holds), self._rng.randint(1, 4)))), lost=lost)
        elif missing:
            self._say(Batch(stores=missing), lost=lost)

    def last(self, *, lost: bool) -> Block:
        """Say a batch of a block that nobody else has."""
        block = self._world.root()
        self._say(Batch(stores=[block]), lost=lost)
        return block

    def _say(self, batch: Batch, *, lost: bool) -> None:
        batch.change(self.held)
        self.held = +self.held
        self.lives[-1].append(batch)
        events: list[RawEvent] = [cleared(self._dialect)] if batch.clears else []
        if batch.removes:
            events.append(removed(self._dialect, [self._name(block) for block in batch.removes]))
        runs: list[list[Block]] = []
        for block in batch.stores:
            if runs and block.parent is runs[-1][-1]:
                runs[-1].append(block)
            else:
                runs.append([block])
        for run in runs:
            parent = self._name(run[0].parent) if run[0].parent else None
            tokens = [token for block in run for token in block.tokens]
            events.append(stored(self._dialect, [self._name(block) for block in run], parent, tokens, BLOCK))
        assert self.publisher is not None
        self.publisher.publish(events, lost=lost)

    def _name(self, block: Block) -> int:
        return self._base + block.name


@dataclass
class Outcome:
    """What happened, so far."""

    injected: Counter[str] = field(default_factory=Counter)
    detected: int = 0
    healed: int = 0
    degraded_s: list[float] = field(default_factory=list)
    """How long each pod was called degraded, each time it was exact again."""
    exact_s: list[float] = field(default_factory=list)
    """How long after the last batch each pod was exact, at each quiet point."""
    exact: list[Counter[str]] = field(default_factory=list)
    """Exact pods of each kind, at each quiet point."""
    wrong: int = 0
    wrong_degraded: int = 0
    unknowable: int = 0
    compared: int = 0
    failures: list[str] = field(default_factory=list)


class Chaos:
    """One run."""

    def __init__(self, index: Index, pool: EventPool, engines: list[Engine], world: World, rng: random.Random) -> None:
        self._index, self._pool, self._engines = index, pool, engines
        self._world, self._rng = world, rng
        self._ends: list[tuple[int, Engine, str]] = []
        """Of faults that last: at which batch, whose, which."""
        self._run: dict[Engine, int] = {}
        """How many batches of a pod are still to be dropped."""
        self._since: dict[str, float] = {}
        self._was_exact: set[str] = set()
        self._looked_at = 0.0
        self.outcome = Outcome()

    def phase(self, batches: int, rate: float) -> None:
        """Let all go on, with faults."""
        began = time.monotonic()
        for step in range(batches):
            time.sleep(max(0.0, began + step / rate - time.monotonic()))
            for due in [end for end in self._ends if end[0] <= step]:
                self._ends.remove(due)
                self._end(due[1], due[2])
            for kind, every in EVERY.items():
                if self._rng.random() < 1 / every:
                    self._break(kind, step, rate)
            engine = self._rng.choice(self._engines)
            begins = self._rng.random() < 2 * DROPPED / (1 + RUN)
            run = self._rng.randint(1, RUN)
            if engine.publisher is not None:
                left = self._run.pop(engine, run if begins else 0)
                if left > 1:
                    self._run[engine] = left - 1
                self.outcome.injected["batches"] += 1
                self.outcome.injected["dropped"] += left > 0
                engine.step(lost=left > 0)
            if time.monotonic() - self._looked_at > LOOK_S:
                self._look()

    def _break(self, kind: str, step: int, rate: float) -> None:
        of_network = kind in ("stalled", "cut")
        engine = self._rng.choice([engine for engine in self._engines if engine.ways or not of_network])
        until = step + int(rate * self._rng.uniform(0.05, 0.4 if kind == "killed" else 1.5))
        if engine.publisher is None or any(end[1:] == (engine, kind) for end in self._ends):
            return
        self.outcome.injected[kind] += 1
        ways = self._rng.sample(engine.ways, self._rng.randint(1, len(engine.ways))) if of_network else []
        match kind:
            case "restarted":
                engine.start(self._applied(engine))
            case "overtaken":
                batches = len(engine.lives[-1]) + self._rng.randint(-1, 1)
                engine.start(self._applied(engine))
                while len(engine.lives[-1]) < batches:
                    engine.step(lost=True)
            case "killed":
                engine.kill()
            case "cut":
                for way in ways:
                    way.cut()
            case "stalled":
                for way in ways:
                    way.stall()
        if kind in ("killed", "stalled"):
            self._ends.append((until, engine, kind))

    def _end(self, engine: Engine, kind: str) -> None:
        if kind == "killed":
            engine.start(self._applied(engine))
        else:
            for way in engine.ways:
                way.resume()

    def _applied(self, engine: Engine) -> int:
        return self._pool.sequences().get(Source(engine.pod), -1)

    def _look(self) -> dict[str, SourceStatus]:
        """Note what the index says of its sources now."""
        now = self._looked_at = time.monotonic()
        known = {status.source.pod: status for status in self._index.sources()}
        exact = {pod for pod, status in known.items() if not status.degraded}
        for pod in self._was_exact - exact:
            self.outcome.detected += 1
            self._since[pod] = now
        for pod in (exact - self._was_exact) & self._since.keys():
            self.outcome.healed += 1
            self.outcome.degraded_s.append(now - self._since.pop(pod))
        self._was_exact = exact
        return known

    def quiet(self) -> None:
        """End all faults, wait for what can be known, and compare."""
        self._run.clear()
        for _, engine, kind in self._ends:
            self._end(engine, kind)
        self._ends.clear()
        time.sleep(0.3)  # for publishers to notice who was cut
        for engine in self._engines:
            assert engine.publisher is not None
            engine.publisher.wait_for_subscribers(timeout=WAIT_S)
        lasts = {}
        for engine in self._engines:
            lost = self._rng.random() < LAST_LOST and engine.kind != NONE
            self.outcome.injected["last dropped"] += lost
            lasts[engine] = engine.last(lost=lost)
        self._settle(lasts)
        self._compare()

    def _settle(self, lasts: dict[Engine, Block]) -> None:
        began = changed_at = time.monotonic()
        unheard, before = dict(lasts), dict[str, str]()
        exact_at: dict[str, float] = {}
        while time.monotonic() - began < WAIT_S:
            known = self._look()
            now = time.monotonic()
            for engine, block in list(unheard.items()):
                if self._matched([block]).get(engine.pod):
                    del unheard[engine]
                    changed_at = now
            states = {pod: status.degraded for pod, status in known.items()}
            if states != before:
                changed_at, before = now, states
            heard = {engine.pod for engine in self._engines if engine not in unheard}
            exact_at = {pod: exact_at.get(pod, now) for pod in heard if states.get(pod) == ""}
            whole = all(engine.pod in exact_at for engine in self._engines if engine.kind == WHOLE)
            short = all(engine.pod in exact_at for engine in self._engines if engine.kind == SHORT)
            # without replay nothing changes that was heard; with little of it, it may yet
            if whole and not unheard and (short or now - changed_at > SETTLE_S):
                break
            time.sleep(LOOK_S)
        else:
            for engine in self._engines:
                if engine in unheard or (engine.kind == WHOLE and engine.pod not in exact_at):
                    what = "its last batch is not known" if engine in unheard else "not exact"
                    why = before.get(engine.pod, "unknown")
                    self.outcome.failures.append(f"{engine.pod} ({engine.kind}): {what} after {WAIT_S} s: {why!r}")
        self.outcome.exact_s += [at - began for at in exact_at.values()]

    def _compare(self) -> None:
        """Compare all that the index says with what the pods hold; no pod says anything meanwhile."""
        while True:
            known = self._look()
            answers = [(chain, self._matched(chain)) for chain in self._world.chains]
            if {pod: status.degraded for pod, status in self._look().items()} == {
                pod: status.degraded for pod, status in known.items()
            }:
                break
        exact: Counter[str] = Counter()
        for engine in self._engines:
            status = known.get(engine.pod)
            said = {block for chain, answer in answers for block in chain[: answer.get(engine.pod, 0)]}
            true = _reached(self._world, engine.held)
            blocks = status.blocks if status else 0
            wrong = max(len(said ^ true), abs(blocks - len(engine.held)))
            self.outcome.compared += len(answers)
            if status is None or status.degraded:
                self.outcome.wrong_degraded += wrong
                continue
            exact[engine.kind] += 1
            if wrong and _is_unknowable(engine, said, self._world):
                self.outcome.unknowable += wrong
            elif wrong:
                self.outcome.wrong += wrong
                self.outcome.failures.append(
                    f"{engine.pod} ({engine.kind}, life {len(engine.lives)}, batch {len(engine.lives[-1]) - 1}): called"
                    f" exact, but of {len(true)} blocks {len(true - said)} were missing, {len(said - true)} too many;"
                    f" it holds {len(engine.held)}, the index {blocks}"
                )
        self.outcome.exact.append(exact)

    def _matched(self, chain: list[Block]) -> dict[str, int]:
        tokens = [token for block in chain for token in block.tokens]
        return {held.source.pod: held.tokens // BLOCK for held in self._index.match(Prompt(tokens, MODEL))}


def _reached(world: World, held: Counter[Block]) -> set[Block]:
    """Give the blocks that prompts find: those before which none is missing."""
    found: set[Block] = set()
    for chain in world.chains:
        for block in chain:
            if not held[block]:
                break
            found.add(block)
    return found


def _is_unknowable(engine: Engine, said: set[Block], world: World) -> bool:
    """Say whether the answers are of one life up to some batch, and of a later one from the next number on."""
    if engine.kind != NONE:
        return False
    for place, (life, applied) in enumerate(zip(engine.lives, engine.applied, strict=False)):
        held: Counter[Block] = Counter()
        for last, batch in enumerate(life):
            batch.change(held)
            if last < applied:
                continue
            for later in engine.lives[place + 1 :]:
                mixed = Counter(held)
                for one in later[last + 1 :]:
                    one.change(mixed)
                if len(later) > last + 1 and _reached(world, mixed) == said:
                    return True
    return False


def spread(times: list[float]) -> list[str]:
    return [f"{1000 * time:,.0f} ms" for time in (statistics.median(times), max(times))] if times else ["none", "none"]


def table(outcome: Outcome, stats: dict[str, int], engines: list[Engine]) -> str:
    fleet = Counter(engine.kind for engine in engines)
    injected = outcome.injected
    lines = [["pods", ", ".join(f"{count} {kind}" for kind, count in fleet.items())]]
    lines += [["batches", number(injected["batches"])]]
    lines += [[f"injected: {kind}", str(injected[kind])] for kind in ("dropped", "last dropped", *EVERY)]
    lines += [["gaps that stayed", str(stats["gaps_total"])], ["restarts seen", str(stats["restarts_total"])]]
    lines += [["replays asked", str(stats["replays_total"])], ["replays failed", str(stats["replays_failed_total"])]]
    lines += [["called degraded", str(outcome.detected)], ["exact again", str(outcome.healed)]]
    for what, times in (("exact again after", outcome.degraded_s), ("exact after the last batch", outcome.exact_s)):
        lines += [[f"{what}, {which}", time] for which, time in zip(("p50", "max"), spread(times), strict=True)]
    for place, exact in enumerate(outcome.exact, 1):
        counts = ", ".join(f"{exact[kind]} of {count} {kind}" for kind, count in fleet.items())
        lines.append([f"exact at quiet point {place}", counts])
    lines += [["answers compared", str(outcome.compared)]]
    lines += [["blocks wrong among exact", str(outcome.wrong)]]
    lines += [["blocks wrong among exact, unknowable", str(outcome.unknowable)]]
    lines += [["blocks wrong among degraded", str(outcome.wrong_degraded)]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[1] = max(len(value) for _, value in lines if " of " not in value and "replay" not in value)
    return "\n".join("  ".join(map(aligned, line, widths)).rstrip() for line in lines)


def run(seed: int, seconds: float, phases: int, pods: int, url: str, rate: float) -> tuple[Outcome, str]:
    """Do all of it; give what happened, and a table of it."""
    rng = random.Random(seed)
    world = World(rng)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    index, engines = open_index(url), list[Engine]()
    try:
        for place in range(pods):
            engines.append(Engine(place, context, world, rng))
        with EventPool(index) as pool:
            for engine in engines:
                for _ in range(rng.choice((0, 0, 5, 50))):  # some say something before anybody listens
                    engine.step()
                pool.subscribe(engine.pod, engine.endpoint, replay=engine.replay, model=MODEL)
            chaos = Chaos(index, pool, engines, world, rng)
            for _ in range(phases):
                chaos.phase(int(rate * seconds / phases), rate)
                chaos.quiet()
            printed = table(chaos.outcome, pool.stats(), engines)
            for engine in engines:
                pool.unsubscribe(engine.pod)
    finally:
        for engine in engines:
            engine.close()
        context.term()
        index.close()
    return chaos.outcome, printed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of faults, in all phases together")
    parser.add_argument("--phases", type=int, default=4, help="each ends with a quiet point")
    parser.add_argument("--pods", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1000.0, help="batches a second, of all pods together")
    parser.add_argument("--url", default="memory://", help="of the index")
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    outcome, printed = run(args.seed, args.seconds, args.phases, args.pods, args.url, args.rate)
    print(
        f"{machine()}, Python {platform.python_version()}; seed {args.seed}, {args.url}, {args.seconds:g} s of faults"
    )
    print(printed)
    for failure in outcome.failures:
        print(f"seed {args.seed}: {failure}", file=sys.stderr)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
