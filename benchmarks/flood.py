"""An hour of events, faster than one core can take them: does memory stay within its bound, is every drop counted, and
how soon is the index exact again?

    python benchmarks/flood.py [--pods 16] [--seconds-of-events 3600] [--batches-a-second 6] [--queue-mib 32]

One process publishes (a publisher a pod, each keeping all its batches), this one follows with one worker, each pinned
to a core. Half of the follower's core goes to a process that only spins: else one publisher could not flood it. The
table says by how much it was flooded: what was published, over what was applied meanwhile. Exit status 1 where the
index did not become exact, or where a batch was neither applied, once, nor counted as missing.
"""

import argparse
import multiprocessing as mp
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import msgspec

from indexer import Index, Prompt, Source, open_index
from kvevents import EventPool
from kvevents.testing import Publisher

MODEL = "flood/model"
BLOCK = 16
BLOCKS = 8
"""Blocks of a batch."""
LIVE = 64
"""Batches that a pod's cache holds; what is older is removed, a batch at a time."""
ROUND = 32
"""Batches published to a pod before the next one's turn."""
WAIT_S = 120.0


def tokens_of(pod: int, batch: int) -> list[int]:
    first = (pod * 7_919 + batch * BLOCKS * BLOCK) % 1_000_000_007
    return list(range(first, first + BLOCKS * BLOCK))


def hashes_of(pod: int, batch: int) -> list[int]:
    first = (pod << 48) + batch * BLOCKS
    return list(range(first, first + BLOCKS))


def payload_of(pod: int, batch: int) -> bytes:
    events: list[object] = []
    if batch >= LIVE:
        events.append({"type": "BlockRemoved", "block_hashes": hashes_of(pod, batch - LIVE), "medium": "GPU"})
    stored = {"block_hashes": hashes_of(pod, batch), "parent_block_hash": None, "token_ids": tokens_of(pod, batch)}
    events.append({"type": "BlockStored", **stored, "block_size": BLOCK, "lora_id": None, "medium": "GPU"})
    return msgspec.msgpack.encode([0.0, events, 0])


class Ready(NamedTuple):
    endpoints: list[tuple[str, str | None]]


def publish(pipe: Connection, pods: int, batches: int, hwm: int, core: int | None) -> None:
    """Publish as told: how many batches a pod, at how many a second in all (0: as fast as can be); tell how long."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    publishers = [
        Publisher("tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0", buffer_steps=batches, hwm=hwm) for _ in range(pods)
    ]
    payloads = [[payload_of(pod, batch) for batch in range(batches)] for pod in range(pods)]
    pipe.send(Ready([(publisher.endpoint, publisher.replay) for publisher in publishers]))
    done = 0
    while (order := pipe.recv()) is not None:
        count, rate = order
        start = time.monotonic()
        for first in range(done, done + count, ROUND):
            for publisher, mine in zip(publishers, payloads, strict=True):
                for payload in mine[first : min(first + ROUND, done + count)]:
                    publisher.send(payload)
            if rate:
                late = start + (first + ROUND - done) * pods / rate - time.monotonic()
                if late > 0:
                    time.sleep(late)
        done += count
        pipe.send(time.monotonic() - start)
    for publisher in publishers:
        publisher.close()


def spin(core: int) -> None:
    """Take a share of a core."""
    os.sched_setaffinity(0, {core})
    while True:
        pass


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch(threading.Thread):
    """Notes the memory of this process twenty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[float] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            self.seen.append(resident_mib())


def wait_exact(index: Index, pods: int, last: int) -> float | None:
    """Give the seconds until every pod is called exact and is at its last batch, None where that does not happen."""
    start = time.monotonic()
    while time.monotonic() - start < WAIT_S:
        statuses = index.sources()
        if len(statuses) == pods and all(not s.degraded and s.last_seq == last for s in statuses):
            return time.monotonic() - start
        time.sleep(0.02)
    return None


def wrong_answers(index: Index, pods: int, last: int) -> int:
    """Ask for the newest batches of each pod, which it holds, and for older ones, which it does not."""
    wrong = 0
    for pod in range(pods):
        for batch in [*range(last - LIVE - 3, last)]:
            held = {h.source: h.tokens for h in index.match(Prompt(tokens_of(pod, batch), MODEL))}
            wrong += held[Source(f"pod-{pod}")] != (BLOCKS * BLOCK if batch >= last - LIVE else 0)
    return wrong


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pods", type=int, default=16)
    options.add_argument("--seconds-of-events", type=int, default=3_600)
    options.add_argument("--batches-a-second", type=float, default=12.0, help="of one pod, before it is accelerated")
    options.add_argument("--queue-mib", type=int, default=8)
    options.add_argument("--hwm", type=int, default=1_000, help="batches that a publisher lets wait before it drops")
    options.add_argument("--spinners", type=int, default=1, help="processes that the follower shares its core with")
    options.add_argument("--url", default="memory://")
    asked = options.parse_args()
    batches = int(asked.seconds_of_events * asked.batches_a_second)
    cores = sorted(os.sched_getaffinity(0))
    pinned = len(cores) > 1
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(
        target=publish, args=(theirs, asked.pods, batches, asked.hwm, cores[1] if pinned else None), daemon=True
    )
    process.start()
    print(
        f"making {batches * asked.pods:,} batches ({asked.seconds_of_events} s of {asked.pods} pods)", file=sys.stderr
    )
    ready = ours.recv()
    if pinned:
        os.sched_setaffinity(0, {cores[0]})
        for _ in range(asked.spinners):
            mp.get_context("spawn").Process(target=spin, args=(cores[0],), daemon=True).start()
    index = open_index(asked.url)
    pool = EventPool(index, workers=1, queue_bytes=asked.queue_mib * 2**20, model=MODEL)
    with pool:
        for pod, (endpoint, replay) in enumerate(ready.endpoints):
            pool.subscribe(f"pod-{pod}", endpoint, replay=replay, model=MODEL)
        while len([up for up in pool.connected().values() if up]) < asked.pods:
            time.sleep(0.01)
        time.sleep(1.0)  # until the first replays have said that there is nothing yet
        first = batches // 20
        print("warming up", file=sys.stderr)
        ours.send((first, 2_000))
        ours.recv()
        assert wait_exact(index, asked.pods, first - 1) is not None
        before = pool.stats()
        memory_before = resident_mib()
        watch = Watch()
        watch.start()
        print("publishing as fast as can be", file=sys.stderr)
        ours.send((batches - first, 0))
        lasted = ours.recv()
        taken = pool.stats()["applied_total"] - before["applied_total"]
        print("the flood is over; waiting until all pods are exact", file=sys.stderr)
        exact_after = wait_exact(index, asked.pods, batches - 1)
        watch.over.set()
        watch.join()
        stats = pool.stats()
        wrong = wrong_answers(index, asked.pods, batches)
        ours.send(None)
    flood = (batches - first) * asked.pods
    half = watch.seen[len(watch.seen) // 2 :]
    rows = [
        ("batches, blocks", f"{batches * asked.pods:,}, {batches * asked.pods * BLOCKS:,}"),
        ("published in the flood", f"{flood:,} in {lasted:.1f} s, {flood / lasted:,.0f} a second"),
        ("applied meanwhile", f"{taken:,}; flooded {flood / max(taken, 1):.1f} times"),
        (
            "dropped and counted: queue, held back",
            f"{stats['dropped_queue_full_total']:,}, {stats['dropped_held_total']:,}",
        ),
        ("replays asked for, failed", f"{stats['replays_total']:,}, {stats['replays_failed_total']:,}"),
        ("lost on their way and had again", f"{stats['recovered_total']:,}"),
        ("applied in all", f"{stats['applied_total']:,}"),
        ("gaps that stayed", f"{stats['gaps_total'] - before['gaps_total']:,}"),
        ("all pods exact after the flood", "never" if exact_after is None else f"{exact_after:.1f} s"),
        ("wrong answers", f"{wrong} of {asked.pods * (LIVE + 3)}"),
        (
            "memory before, most, most in the 2nd half",
            f"{memory_before:.0f}, {max(watch.seen):.0f}, {max(half):.0f} MiB",
        ),
        ("queue's bound", f"{asked.queue_mib} MiB"),
    ]
    for name, value in rows:
        print(f"| {name} | {value} |")
    index.close()
    is_complete = stats["gaps_total"] or stats["applied_total"] == batches * asked.pods
    return 1 if exact_after is None or wrong or not is_complete else 0


if __name__ == "__main__":
    sys.exit(main())
