"""Captures of the real engine against its own answers."""

import gzip
import json
from pathlib import Path

import pytest

from indexer import Prompt, Source
from kvevents import EventPool, Message, decode_batch
from scorer import PrefixScorer

from .conftest import GOLDEN, read_capture

REAL_CAPTURE = Path(__file__).parents[2] / "shared/data/kv_events/vllm_0.26.0_zmq_capture_salt.jsonl.gz"


def play(path: Path, copies: str, open_new):
    capture = read_capture(path)
    index = open_new()
    with EventPool(index, workers=2, copies=copies) as pool:
        for line in capture:
            if line["kind"] == "message":
                pool.submit(Message(line["topic"].encode(), line["seq"], bytes.fromhex(line["payload"])))
        pool.drain(30)
        stats = pool.stats()
    return capture[0], [line for line in capture if line["kind"] == "query"], index, stats


def answers(meta, queries, index):
    size = meta["block_size"]
    scorer = PrefixScorer(index, size)
    for query in queries:
        matches = scorer.match(
            query["tokens"],
            model=meta["model"],
            lora_name=query.get("lora_name"),
            cache_salt=query.get("cache_salt"),
            mm_items=[tuple(item) for item in query.get("mm", [])],
        )
        match = next(m for m in matches if (m.pod, m.rank) == (meta["pod"], meta["dp_rank"]))
        yield query, match.blocks, match.reusable_tokens // size, match


def test_all_captures_are_there():
    assert len(GOLDEN) == 21


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_answers_are_the_engines_own(path, open_new):
    copies = "set" if path.stem == "report_full" else "count"
    meta, queries, index, stats = play(path, copies, open_new)
    assert queries
    assert not [name for name, count in stats.items() if name.startswith("dropped") and count]
    for query, blocks, reusable, match in answers(meta, queries, index):
        if path.stem == "hybrid_mixed_block":  # the wire does not say where some of its blocks lie
            assert blocks <= query["hit_blocks"]
            assert reusable <= query["engine_hit_blocks"]
            assert match.trust == "degraded"
        else:
            assert (blocks, reusable) == (query["hit_blocks"], query["engine_hit_blocks"])
            assert match.trust == "exact"


@pytest.mark.parametrize("path", [p for p in GOLDEN if p.stem == "duplicates"], ids=lambda path: path.stem)
def test_a_set_of_hashes_would_be_wrong_where_copies_count(path, open_new):
    meta, queries, index, _ = play(path, "set", open_new)
    assert any(blocks != query["hit_blocks"] for query, blocks, _, _ in answers(meta, queries, index))


@pytest.mark.parametrize("path", [p for p in GOLDEN if "hybrid_mixed" not in p.stem], ids=lambda path: path.stem)
def test_the_blocks_that_are_live_at_the_end_are_the_engines_own(path, open_new):
    capture = read_capture(path)
    resident = next(line["resident"] for line in capture if line["kind"] == "resident")
    _, _, index, _ = play(path, "set" if path.stem == "report_full" else "count", open_new)
    assert index.stats()["held"] == sum(len(group) for group in resident.values())


@pytest.mark.skipif(not REAL_CAPTURE.exists(), reason="the capture is not part of the project")
def test_a_real_stream_of_vllm_0_26_leaves_the_blocks_that_are_live_at_its_end(open_new):
    index = open_new()
    live, parents, tokens_of = set(), {}, {}
    with gzip.open(REAL_CAPTURE, "rt") as lines, EventPool(index, model="m") as pool:
        for line in map(json.loads, lines):
            body = bytes.fromhex(line["payload_hex"])
            pool.submit(Message(b"", line["seq"], body, pod="pod-a"))
            for event in decode_batch(body).events:
                size = getattr(event, "block_size", 0)
                previous = getattr(event, "parent_block_hash", None)
                for number, name in enumerate(event.block_hashes):
                    if size:
                        live.add(name)
                        parents[name] = previous
                        tokens_of[name] = (event, number)
                        previous = name
                    else:
                        live.discard(name)
        pool.drain(30)
        assert pool.stats()["gaps_total"] == 0
    assert index.stats()["held"] == len(live) == 1017
    for name in live:  # each live block is found where its chain of parents is live too
        chain = [name]
        while parents[chain[0]] is not None:
            chain.insert(0, parents[chain[0]])
        tokens = [t for block in chain for t in _tokens(*tokens_of[block])]
        held = next((n for n, block in enumerate(chain) if block not in live), len(chain))
        salt = tokens_of[chain[0]][0].cache_salt
        (match,) = index.match(Prompt(tokens, "m", cache_salt=salt))
        assert match.source == Source("pod-a")
        assert match.tokens == 16 * held


def _tokens(event, number):
    return event.token_ids[16 * number : 16 * (number + 1)]
