"""The gRPC services over real sockets, and a client of them.

The client writes and reads its bytes by hand, by the published field numbers: nothing of it comes from our own
description of the messages.
"""

import struct

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from indexer import open_index
from kvevents import EventPool, Message, discovery
from kvindex.answers import AnswerMetrics
from kvindex.rpc.calls import Calls
from kvindex.rpc.server import RpcServer, open_schema
from kvindex.stats import Asked
from scorer import PrefixScorer, Prompts, Tokenizers

from .conftest import payload
from .models import make_folder

MODEL = "org/m"
LLMD = "/indexer.v1.IndexerService/GetPodScores"
OURS = "/kvindex.v1.ScorerService/Score"
HEALTH = "/grpc.health.v1.Health/"
ADDRESS = "10.0.0.7:8000"
SHARED = "10.0.0.8:8000"


def varint(number):
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number, value):
    """One field: text and bytes with their length, numbers as varints, lists packed."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, list):
        value = b"".join(map(varint, value))
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def fields(data):
    """Every field of a message as (number, value); eight fixed bytes are a double."""
    found, at = [], 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = number()
        if tag & 7 == 0:
            found.append((tag >> 3, number()))
        elif tag & 7 == 1:
            found.append((tag >> 3, struct.unpack("<d", data[at : at + 8])[0]))
            at += 8
        else:
            assert tag & 7 == 2
            length = number()
            found.append((tag >> 3, data[at : at + length]))
            at += length
    return found


def llmd_request(prompt, model=MODEL, pods=()):
    """GetPodScoresRequest: prompt=1, model_name=2, pod_identifiers=3."""
    parts = [field(1, prompt)] if prompt else []
    return b"".join([*parts, *([field(2, model)] if model else []), *(field(3, pod) for pod in pods)])


def llmd_scores(data):
    """GetPodScoresResponse: scores=1; PodScore: pod=1, score=2."""
    scores = []
    for number, value in fields(data):
        assert number == 1
        one = dict(fields(value))
        assert one.keys() <= {1, 2}
        scores.append((one[1].decode(), one.get(2, 0.0)))
    return scores


def make_tokenizers(folder):
    """Words are token ids already."""
    vocabulary = {str(number): number for number in range(1_000)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="999"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    make_folder(folder / MODEL, tokenizer)
    return Tokenizers([folder], loras={"adapter": MODEL})


class Service:
    def __init__(self, folder=None, **limits):
        self.index = open_index()
        self.pool = EventPool(self.index)
        self.prompts = Prompts(make_tokenizers(folder) if folder else None)
        self.scorer = PrefixScorer(self.index, prompts=self.prompts)
        self.answers = AnswerMetrics()
        self.asked = Asked()
        addresses = {"pod-a": (ADDRESS, SHARED), "pod-b": (SHARED,)}
        pods = [discovery.Found(name=name, endpoints=(), aliases=names) for name, names in addresses.items()]
        self.followed = discovery.Follower(None, fixed=pods)
        self.followed.start()
        self.schema = open_schema()
        calls = Calls(
            self.schema,
            self.scorer,
            self.followed,
            self.asked,
            self.answers,
            max_tokens=limits.pop("max_tokens", 1_000),
        )
        options = {"host": "127.0.0.1", "port": 0, "max_message_bytes": 64 * 1024, "max_connections": 64} | limits
        self.server = RpcServer(calls, self.schema, **options)

    def __enter__(self):
        self.pool.start()
        for pod, blocks in (("pod-a", 3), ("pod-b", 1)):
            event = ["BlockStored", list(range(1, blocks + 1)), None, list(range(16 * blocks)), 16, None]
            self.pool.submit(Message(f"kv@{pod}@{MODEL}".encode(), 0, payload(event)))
        self.pool.drain()
        self.port = self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        return self

    def __exit__(self, *_):
        self.channel.close()
        self.server.close()
        self.server.close()
        self.pool.close()
        self.prompts.close()

    def call(self, method, data, timeout=20):
        return self.channel.unary_unary(method)(data, timeout=timeout)

    def refusal(self, method, data):
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, data)
        return caught.value.code(), caught.value.details()

    def metrics(self):
        registry = CollectorRegistry()
        registry.register(self.answers)
        return generate_latest(registry).decode()


def words(count):
    return " ".join(map(str, range(count)))


def ours(**more):
    """ScoreRequest by its numbers."""
    asked = {"model": MODEL, "token_ids": list(range(50))} | more
    numbers = {"model": 1, "token_ids": 2, "token_buffer": 3, "pods": 4, "lora_name": 5, "cache_salt": 6, "mm_items": 7,
               "holders_only": 8}  # fmt: skip
    data = b""
    for name, value in asked.items():
        repeated = name in ("pods", "mm_items")
        for one in value if repeated else [value]:
            data += b"" if one is None else field(numbers[name], one)
    return data
