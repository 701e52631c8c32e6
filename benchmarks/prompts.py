"""Dialogues tokenized with the prefix store and without, in one run: `python benchmarks/prompts.py [--data FOLDER]`.

The dialogues are real ones where the folder has them (`prompts/*.jsonl` with `messages`, and tokenizers in
`tokenizers/*/tokenizer.json`, also gzipped), rendered plainly with ChatML's markers, else made up. A turn is the
dialogue
up to a message that is not the assistant's: each extends the one before. Every list of ids is compared with the
tokenizer's own before anything is timed. Then the two take turns, round by round, each round with an empty store; the
tokenizer alone is asked both with `encode` and with `encode_batch_fast`, which notes no offsets and is what the store
uses
itself. Medians, lowest and highest.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import time
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from report import machine, version_of
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from scorer.cuts import SPLITS
from scorer.prefix_store import PrefixStore

FILES = ["tau_bench_airline_gpt4o", "tau2_retail_agent_sessions", "swe_agent_trajectories"]
TOKENIZERS = {"Qwen3": "qwen3", "GPT-2": "gpt2", "WordPiece": "llmd_test_model"}
LONG = 30_000
"""Tokens of the long dialogue."""


def rendered(message: dict[str, Any]) -> str:
    calls = json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else json.dumps(content)
    return f"<|im_start|>{message['role']}\n{text}{calls}<|im_end|>\n"


def turns(messages: Iterable[dict[str, Any]], opening: str = "") -> list[str]:
    found, text = [], opening
    for message in messages:
        text += rendered(message)
        if message["role"] not in {"assistant", "system"}:
            found.append(text + "<|im_start|>assistant\n")
    return found


def made_up(count: int) -> list[list[str]]:
    draw = random.Random(7)
    words = [
        "flight",
        "the",
        "order",
        "cancel",
        "user_id",
        "12:30",
        "I'd",
        "like",
        "to",
        "return",
        "café",
        '{"id":',
        "42}",
    ]
    roles = ("user", "assistant")
    system = {"role": "system", "content": " ".join(draw.choices(words, k=1500))}
    return [
        turns([system, *({"role": roles[n % 2], "content": " ".join(draw.choices(words, k=80))} for n in range(20))])
        for _ in range(count)
    ]


def real(folder: Path) -> dict[str, list[list[str]]]:
    found = {}
    for name in FILES:
        path = folder / "prompts" / f"{name}.jsonl"
        if path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            # tools stand before the messages, as chat templates have them
            found[name] = [turns(row["messages"], json.dumps(row["tools"]) if row.get("tools") else "") for row in rows]
    return found


def load(folder: Path) -> dict[str, Tokenizer]:
    found = {}
    for name, directory in TOKENIZERS.items():
        for path in sorted((folder / "tokenizers" / directory).glob("tokenizer.json*")):
            data = path.read_bytes()
            found[name] = Tokenizer.from_str((gzip.decompress(data) if path.suffix == ".gz" else data).decode())
    return found


def trained(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    pattern = next(each for each in sorted(SPLITS) if each.startswith("(?i"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def timed(work: Callable[[str], object], texts: list[str]) -> float:
    begin = time.perf_counter()
    for text in texts:
        work(text)
    return (time.perf_counter() - begin) / len(texts) * 1e3


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})"


def measure(name: str, dialogues: list[list[str]], tokenizer: Tokenizer, rounds: int) -> None:
    """Texts one after the other, as one dialogue after the other sends them; the first turns are not timed."""

    def encode(store: PrefixStore, text: str) -> "array[int]":
        return store.encode(text, model="m", tokenizer=tokenizer, add_special_tokens=True)

    store = PrefixStore()
    first = tokenized = later = 0
    for dialogue in dialogues:
        for number, text in enumerate(dialogue):
            before = store.stats().characters_tokenized
            assert list(encode(store, text)) == tokenizer.encode(text).ids
            if number:
                tokenized += store.stats().characters_tokenized - before
                later += len(text)
            else:
                first += len(text)
    stats = store.stats()
    times: dict[str, list[float]] = {"store": [], "encode": [], "fast": []}
    texts = [text for dialogue in dialogues for text in dialogue[1:]]
    for _ in range(rounds):
        store = PrefixStore()
        spent = 0.0
        for dialogue in dialogues:
            encode(store, dialogue[0])
            spent += timed(lambda text, store=store: encode(store, text), dialogue[1:]) * len(dialogue[1:])
        times["store"].append(spent / len(texts))
        times["encode"].append(timed(lambda text: tokenizer.encode(text).ids, texts))
        times["fast"].append(timed(lambda text: tokenizer.encode_batch_fast([text])[0].ids, texts))
    better = [statistics.median(times[other]) / statistics.median(times["store"]) for other in ("encode", "fast")]
    print(
        f"{name}\n"
        f"  turns {len(texts) + len(dialogues)} of {len(dialogues)} dialogues, "
        f"mean {later // len(texts):,} characters, hits {stats.hits / (stats.hits + stats.misses):.1%}, "
        f"held {stats.bytes_held / 1e6:.2f} MB\n"
        f"  from the second turn on: {1 - tokenized / later:.1%} less text tokenized\n"
        f"  ms a turn: store {spread(times['store'])}  encode {spread(times['encode'])}  "
        f"encode_batch_fast {spread(times['fast'])}  {better[0]:.1f} and {better[1]:.1f} times faster"
    )


def long_dialogue(dialogues: list[list[str]], tokenizer: Tokenizer) -> list[list[str]]:
    """One dialogue that goes on from other dialogues' texts until it has 30,000 tokens, then ten more turns."""
    pieces = [piece for dialogue in dialogues for piece in dialogue[-1].split("<|im_start|>") if piece]
    text = opening = ""
    while len(tokenizer.encode_batch_fast([opening])[0].ids) < LONG:
        opening += "".join("<|im_start|>" + piece for piece in pieces[:40])
    text, found = opening, [opening]
    for piece in pieces[-10:]:
        text += "<|im_start|>" + piece
        found.append(text)
    return [found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KVINDEX_SHARED", "../shared")) / "data")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    work = real(options.data) or {"made up": made_up(10)}
    texts = [dialogue[-1] for dialogues in work.values() for dialogue in dialogues]
    tokenizers = load(options.data) or {"trained here": trained(texts)}
    print(machine(), f"tokenizers {version_of('tokenizers')}")
    for label, tokenizer in tokenizers.items():
        for name, dialogues in work.items():
            measure(f"{label}, {name}", [each for each in dialogues if len(each) > 1], tokenizer, options.rounds)
        every = [dialogue for dialogues in work.values() for dialogue in dialogues]
        measure(f"{label}, at {LONG:,} tokens", long_dialogue(every, tokenizer), tokenizer, options.rounds)


if __name__ == "__main__":
    main()
