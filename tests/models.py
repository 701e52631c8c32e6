"""Folders with tokenizers and chat templates, as engines have them."""

import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

DATA = Path(os.environ.get("KVINDEX_SHARED", "/work/shared")) / "data"
NEEDS_DATA = pytest.mark.skipif(
    not (DATA / "tokenizers").is_dir(),
    reason="no published tokenizers and dialogues: KVINDEX_SHARED names their folder",
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|endoftext|>",
    "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
    "chat_template": CHATML,
}


def make_folder(folder: Path, tokenizer: Tokenizer, config=CONFIG, **files: str) -> Path:
    """Write a model's folder; `files` are further ones, with ``__`` for the dot in their names."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def publish(folder: Path, name: str) -> Path:
    """Write the folder of a published model, whose tokenizer is packed in the data."""
    source, target = DATA / "tokenizers" / name, folder / name
    target.mkdir(parents=True)
    for path in source.iterdir():
        data = path.read_bytes()
        packed = path.suffix == ".gz"
        (target / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(data) if packed else data)
    return target


def dialogues(name: str) -> list[dict]:
    """Give the lines of one file of dialogues."""
    return [json.loads(line) for line in (DATA / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
