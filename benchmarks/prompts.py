"""Dialogues tokenized with the prefix store and without, in one run: `python benchmarks/prompts.py [--data FOLDER]`.

The dialogues are real ones where the folder has them (`prompts/*.jsonl` with `messages`, and tokenizers in
`tokenizers/*/tokenizer.json`, also gzipped), rendered plainly with ChatML's markers, else made up. A turn is the
dialogue up to a message that is not the assistant's: each extends the one before. Every list of ids is compared with
the tokenizer's own before anything is timed. Then the two take turns, round by round, each round with an empty store;
the tokenizer alone is asked both with `encode` and with `encode_batch_fast`, which notes no offsets and is what the
store uses itself. Medians, lowest and highest.

Then the same dialogues as messages through `PrefixScorer.score_chat` (`benchmarks/chats.py`), with the model's own
template: from messages to the scores of 64 pods. The scores of both ways are compared first.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from chats import long_turns, measure_chats
from chats import turns as chats_of
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from kvindex.bench.machine import machine, version_of
from scorer.cuts import SPLITS
from scorer.prefix_store import PrefixStore

FILES = ["tau_bench_airline_gpt4o", "tau2_retail_agent_sessions", "swe_agent_trajectories"]
TOKENIZERS = {"Qwen3": "qwen3", "GPT-2": "gpt2", "WordPiece": "llmd_test_model"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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


def made_up(count: int) -> list[list[dict[str, Any]]]:
    draw = random.Random(7)
    words = ["flight", "the", "order", "cancel", "12:30", "I'd", "like", "to", "return", "café", '{"id": 42}']
    roles = ("user", "assistant")
    system = {"role": "system", "content": " ".join(draw.choices(words, k=1500))}
    return [
        [system, *({"role": roles[n % 2], "content": " ".join(draw.choices(words, k=80))} for n in range(20))]
        for _ in range(count)
    ]


def real(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The dialogues of each file, as objects with messages and sometimes tools."""
    paths = {name: folder / "prompts" / f"{name}.jsonl" for name in FILES}
    return {
        name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, path in paths.items()
        if path.exists()
    }


def opening(row: dict[str, Any]) -> str:
    # tools stand before the messages, as chat templates have them
    return json.dumps(row["tools"]) if row.get("tools") else ""


def load(folder: Path) -> dict[str, Tokenizer]:
    found = {}
    for name, directory in TOKENIZERS.items():
        for path in sorted((folder / "tokenizers" / directory).glob("tokenizer.json*")):
            found[name] = Tokenizer.from_str(unpacked(path).decode())
    return found


def unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def model_folder(made: Path, data: Path, tokenizer: Tokenizer) -> Path:
    """Write the folder of the model whose chat template is used: Qwen3's, or one with ChatML's."""
    (made / "m").mkdir()
    source = data / "tokenizers" / TOKENIZERS["Qwen3"]
    if source.is_dir():
        for path in source.iterdir():
            (made / "m" / path.name.removesuffix(".gz")).write_bytes(unpacked(path))
    else:
        tokenizer.save(str(made / "m" / "tokenizer.json"))
        (made / "m" / "chat_template.jinja").write_text(CHATML)
    return made


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
    parser.add_argument("--chats", action="store_true", help="only through score_chat")
    options = parser.parse_args()
    rows = real(options.data) or {"made up": [{"messages": messages} for messages in made_up(10)]}
    work = {name: [turns(row["messages"], opening(row)) for row in each] for name, each in rows.items()}
    texts = [dialogue[-1] for dialogues in work.values() for dialogue in dialogues]
    tokenizers = load(options.data) or {"trained here": trained(texts)}
    print(machine(), f"tokenizers {version_of('tokenizers')}")
    for label, tokenizer in tokenizers.items() if not options.chats else ():
        for name, dialogues in work.items():
            measure(f"{label}, {name}", [each for each in dialogues if len(each) > 1], tokenizer, options.rounds)
        every = [dialogue for dialogues in work.values() for dialogue in dialogues]
        measure(f"{label}, at {LONG:,} tokens", long_dialogue(every, tokenizer), tokenizer, options.rounds)
    label, tokenizer = next(iter(tokenizers.items()))
    with tempfile.TemporaryDirectory() as made:
        folder = model_folder(Path(made), options.data, tokenizer)
        for name, each in rows.items():
            chats = [chats_of(row["messages"], row.get("tools")) for row in each]
            measure_chats(f"{label}, {name}", [chat for chat in chats if len(chat) > 1], folder, options.rounds)
        messages = [row["messages"] for each in rows.values() for row in each]
        measure_chats(f"{label}, at {LONG:,} tokens", [long_turns(messages, folder, LONG)], folder, options.rounds)


if __name__ == "__main__":
    main()
