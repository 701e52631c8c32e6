"""The world that pages speak of, on free ports of this machine: a fleet, an engine's API, tokenizers, a Redis."""

import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from indexer import open_index, snapshots
from kvevents import EventPool
from kvindex.fleet import Fleet
from kvindex.workload import Workload

from .models import make_folder

MODEL = "Qwen/Qwen3-8B"
HOSTS = ("10.0.0.7", "10.0.0.8", "10.0.0.9")


class World:
    """A small fleet with traffic, an engine's API, a folder of tokenizers, a Redis."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.models = folder / "models"
        make_folder(self.models / MODEL, _tokenizer())
        self.snapshot = folder / "snapshot"
        snapshots.write_snapshot(self.snapshot, EventPool(open_index("memory://")).snapshot())
        self.fleet = Fleet(len(HOSTS), model=MODEL, num_blocks=2_048)
        self.prompt = list(range(64))
        for number in range(len(HOSTS)):
            self.fleet.step(number, self.prompt)
        self._stop = threading.Event()
        self._traffic = threading.Thread(target=self._run, daemon=True)
        self._traffic.start()
        self._engine = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Engine)
        self.engine = f"127.0.0.1:{self._engine.server_port}"
        threading.Thread(target=self._engine.serve_forever, daemon=True).start()

    def _run(self) -> None:
        for number, turn in enumerate(Workload(max_tokens=512)):
            if self._stop.wait(0.02):
                return
            self.fleet.step(number % len(HOSTS), turn.prompt, turn.output)

    def close(self) -> None:
        self._stop.set()
        self._traffic.join()
        self._engine.shutdown()
        self._engine.server_close()
        self.fleet.close()

    def substituted(self, text: str) -> str:
        """Put this world's addresses in the place of those of a page."""
        for host, entry in zip(HOSTS, self.fleet.endpoints(), strict=True):
            text = text.replace(f"tcp://{host}:5557", entry["endpoint"])
            text = re.sub(rf"tcp://{re.escape(host)}:(5558|5657)\b", entry["replay"], text)
            text = text.replace(f"http://{host}:8000", f"http://{self.engine}")
        text = text.replace("redis://redis:6379/0", self.redis_url).replace(
            "http://llm-d:8080", f"http://{self.engine}"
        )
        text = re.sub(r"(?<![\w./-])/models\b", str(self.models), text)
        text = text.replace("/root/.cache/huggingface/hub", str(self.models))
        return text.replace("/var/lib/kvindex", str(self.folder))


class _Engine(http.server.BaseHTTPRequestHandler):
    """Says what a vLLM would, and an indexer that knows nothing."""

    def do_GET(self) -> None:
        says = {"data": [{"id": MODEL}]}
        self._answer(json.dumps(says) if self.path == "/v1/models" else "")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/score_completions":
            self._answer("{}")
            return
        self._answer(json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}))

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Once upon a time"], trainer)
    return tokenizer
