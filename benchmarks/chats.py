"""Dialogues through `PrefixScorer.score_chat`, with the prefix store and without: part of `benchmarks/prompts.py`."""

import contextlib
import itertools
import statistics
import time
from array import array
from pathlib import Path
from typing import Any

from indexer import BlockStored, Index, Source, open_index
from scorer import ChatBody, PrefixScorer, PrefixStats, PrefixStore, Prompts, Timings, Tokenizers

BLOCK, PODS, HOLDERS = 16, 64, 8
MODEL = "m"
STAGES = ("render", "tokenize", "keys", "match")

Turn = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
"""The messages of one request, and its tools."""


def turns(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[Turn]:
    """Give the requests of one dialogue: up to each message that is not the assistant's."""
    ends = [end for end, message in enumerate(messages, 1) if message["role"] not in {"assistant", "system"}]
    return [(messages[:end], tools) for end in ends]


def long_turns(dialogues: list[list[dict[str, Any]]], folder: Path, tokens: int) -> list[Turn]:
    """One dialogue that goes on with other dialogues' messages until it has so many tokens, then ten turns more."""
    messages: list[dict[str, Any]] = []
    with Prompts(Tokenizers([folder]), store=PrefixStore()) as prompts:
        more = itertools.cycle(itertools.chain.from_iterable(dialogues))
        found: list[Turn] = []
        while len(found) < 11:
            message = next(more)
            if messages and message["role"] == "system":
                continue
            messages.append(message)
            if message["role"] == "assistant":
                continue
            (prompt,) = prompts.read({"model": MODEL, "messages": messages})
            if prompt.length >= tokens:
                found.append((list(messages), None))
    return found


def fleet(dialogues: list[list[Turn]], folder: Path) -> Index:
    """An index of 64 pods, of which eight hold all but the newest turn of each dialogue."""
    index = open_index()
    sources = [Source(f"pod-{number}") for number in range(PODS)]
    for source in sources:
        index.register(source, model=MODEL)
    theirs = Tokenizers([folder]).get(MODEL).tokenizer
    names = itertools.count(1)
    with Prompts(Tokenizers([folder])) as prompts:
        for number, dialogue in enumerate(dialogues):
            messages, tools = dialogue[-2] if len(dialogue) > 1 else dialogue[-1]
            text = rendered(prompts, messages, tools)
            ids = theirs.encode(text, add_special_tokens=False).ids
            whole = array("I", ids[: len(ids) // BLOCK * BLOCK])
            for holder in range(HOLDERS):
                hashes = list(itertools.islice(names, len(whole) // BLOCK))
                event = BlockStored(block_hashes=hashes, parent_block_hash=None, token_ids=whole, block_size=BLOCK)
                index.apply(sources[(number + holder * 7) % PODS], [event])
    return index


def rendered(prompts: Prompts, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    # the text itself is nothing that anybody else needs
    loaded = prompts.tokenizers.get(MODEL)
    return prompts._render(ChatBody(messages, tools=tools), loaded.templates.choose(tools=tools is not None), loaded)


def measure_chats(name: str, dialogues: list[list[Turn]], folder: Path, rounds: int) -> None:
    """Requests one after the other, as one dialogue after the other sends them; first turns are not timed."""
    index = fleet(dialogues, folder)
    times: dict[str, list[float]] = {"store": [], "none": []}
    stages = {key: {stage: list[float]() for stage in STAGES} for key in times}
    share, stats, lengths = check(dialogues, index, folder)
    with contextlib.ExitStack() as closing:
        tokenizers = Tokenizers([folder])
        plain = closing.enter_context(Prompts(tokenizers))
        for _ in range(rounds):
            kept = closing.enter_context(Prompts(tokenizers, store=PrefixStore()))
            for key, prompts in (("store", kept), ("none", plain)):
                scorer = PrefixScorer(index, prompts=prompts)
                scorer.score_chat(*dialogues[0][0][:1], model=MODEL)  # the template's process is running
                spent, count = 0.0, 0
                for dialogue in dialogues:
                    messages, tools = dialogue[0]
                    scorer.score_chat(messages, model=MODEL, tools=tools)
                    for messages, tools in dialogue[1:]:
                        begin = time.perf_counter()
                        scorer.score_chat(messages, model=MODEL, tools=tools)
                        spent += time.perf_counter() - begin
                        count += 1
                times[key].append(spent / count * 1e3)
                timings = Timings()
                for messages, tools in dialogues[-1][1:]:
                    scorer.score_chat(messages, model=MODEL, tools=tools, timings=timings)
                for stage in STAGES:
                    stages[key][stage].append(getattr(timings, stage) / len(dialogues[-1][1:]) * 1e3)
    better = statistics.median(times["none"]) / statistics.median(times["store"])
    hits = stats.hits / (stats.hits + stats.misses)
    print(
        f"{name}, score_chat over {PODS} pods\n"
        f"  {len(lengths)} turns of {len(dialogues)} dialogues, mean {statistics.mean(lengths):,.0f} tokens, "
        f"longest {max(lengths):,}\n"
        f"  from the second turn on: {share:.1%} less text tokenized; hits {hits:.1%}, "
        f"held {stats.bytes_held / 1e6:.2f} MB\n"
        f"  ms a turn: store {spread(times['store'])}  without {spread(times['none'])}  {better:.1f} times faster"
    )
    for key, label in (("store", "with"), ("none", "without")):
        cells = "  ".join(f"{stage} {statistics.median(stages[key][stage]):.3f}" for stage in STAGES)
        print(f"  ms by stage, last dialogue again, {label}: {cells}")


def check(dialogues: list[list[Turn]], index: Index, folder: Path) -> tuple[float, PrefixStats, list[int]]:
    """See that both ways give the same scores, which are not empty; give the share of text that was not tokenized."""
    tokenizers = Tokenizers([folder])
    store = PrefixStore()
    with Prompts(tokenizers, store=store) as kept, Prompts(tokenizers) as plain:
        ours, theirs = PrefixScorer(index, prompts=kept), PrefixScorer(index, prompts=plain)
        tokenized = whole = 0
        lengths = []
        for dialogue in dialogues:
            for number, (messages, tools) in enumerate(dialogue):
                before = store.stats()
                scores = ours.score_chat(messages, model=MODEL, tools=tools)
                assert scores == theirs.score_chat(messages, model=MODEL, tools=tools)
                assert len(scores) >= HOLDERS
                after = store.stats()
                if number:
                    tokenized += after.characters_tokenized - before.characters_tokenized
                    whole += after.characters_tokenized - before.characters_tokenized
                    whole += after.characters_reused - before.characters_reused
                body = {"model": MODEL, "messages": messages, "tools": tools}
                lengths += [prompt.length for prompt in plain.read(body)]
        return 1 - tokenized / whole, store.stats(), lengths


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})"
