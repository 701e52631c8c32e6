"""What a snapshot costs: time to write and to load it, bytes of file and of memory for a pair of block and source.

`python -m benchmarks.snapshot` writes 10 M pairs of 64 sources; `--impl python --pairs 500000` is the plain index.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from indexer import Source, open_index
from indexer.events import BlockStored
from indexer.snapshots import Part, SnapshotIndex, read_snapshot, write_snapshot

BATCH = 512


def filled(url: str, pairs: int, sources: int) -> SnapshotIndex:
    """An index whose sources hold random blocks, half of them each one's own."""
    index = open_index(url)
    assert isinstance(index, SnapshotIndex)
    rng = np.random.default_rng(1)
    common = [rng.integers(0, 2**32, BATCH * 4, dtype=np.uint32) for _ in range(64)]
    for number in range(sources):
        source = Source(f"pod-{number}")
        index.register(source, model="m")
        for first in range(0, pairs // sources, BATCH):
            half = first // BATCH % 2
            tokens = common[first // BATCH // 2 % 64].copy() if half else rng.integers(0, 2**32, BATCH * 4, np.uint32)
            tokens[0] = first  # a chain of its own
            names = [xxh3_64_intdigest(b"%d %d" % (number, first + n)) for n in range(BATCH)]
            event = BlockStored(block_hashes=names, token_ids=memoryview(tokens), block_size=4)  # type: ignore[arg-type]
            index.apply(source, [event])
    return index


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--sources", type=int, default=64)
    parser.add_argument("--impl", default="native", choices=["native", "python"])
    asked = parser.parse_args()
    url = f"memory://?impl={asked.impl}"
    index = filled(url, asked.pairs, asked.sources)
    before = index.stats()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot"
        most, start = peak(), time.perf_counter()
        size = write_snapshot(path, (Part(b"", [index.dump(source)]) for source in index.followed()))
        write_s, extra = time.perf_counter() - start, peak() - most
        index.close()
        other = open_index(url)
        assert isinstance(other, SnapshotIndex)
        start = time.perf_counter()
        for part in read_snapshot(path):
            for section in part.sources:
                other.load(section)
        other.settle()
        load_s = time.perf_counter() - start
    after = other.stats()
    assert (before["held"], before["blocks"]) == (after["held"], after["blocks"])
    held = before["held"]
    print(f"{held} pairs of {asked.sources} sources, {before['blocks']} blocks, {asked.impl}")
    print(f"written in {write_s:.2f} s, loaded in {load_s:.2f} s")
    print(f"{size / held:.1f} bytes a pair in the file; {extra / 2**20:.0f} MiB more memory while it was written")


if __name__ == "__main__":
    main()
