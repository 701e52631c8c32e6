"""The fleet that is measured with: chains of blocks, the pods that hold them, what the pods send, prompts.

The same seed gives the same fleet. Token ids are uniform in 0 to 149,999. Engine hashes are random, and the same for a
chain on all pods, as vLLM has it where pods share a hash seed.
"""

import random
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import msgspec

from kvevents import Message

BLOCK, STORE, CHAIN, MODEL = 16, 32, 2_048, "bench/model"
"""Tokens of a block, blocks of one store event, blocks of the longest chain, name of the model."""

PODS, SHARE = 64, 8
"""Pods of the fleet, and how many of them hold each chain."""

VOCABULARY = 150_000

Sent = TypeVar("Sent")


class Store(NamedTuple):
    """Blocks that a pod stores at once."""

    hashes: list[int]
    parent: int | None
    tokens: list[int]


class Chain(NamedTuple):
    """Blocks that follow each other from the start of a prompt, and the pods that hold all of them."""

    tokens: "array[int]"
    hashes: list[int]
    pods: tuple[int, ...]

    def stores(self, size: int = STORE) -> Iterator[Store]:
        """Give the chain in stores of `size` blocks."""
        for first in range(0, len(self.hashes), size):
            last = first + size
            parent = self.hashes[first - 1] if first else None
            yield Store(self.hashes[first:last], parent, self.tokens[first * BLOCK : last * BLOCK].tolist())


class Fleet(NamedTuple):
    """Pods and the chains they hold."""

    pods: int
    chains: list[Chain]

    @property
    def pairs(self) -> int:
        """How many (block, pod) there are."""
        return sum(len(chain.hashes) * len(chain.pods) for chain in self.chains)


class Asked(NamedTuple):
    """A prompt and how many of its blocks each pod holds."""

    tokens: "array[int]"
    holds: dict[int, int]


def random_tokens(rng: random.Random, count: int) -> "array[int]":
    """Draw the ids of some tokens."""
    return array("I", [token % VOCABULARY for token in array("I", rng.randbytes(4 * count))])


def make_chain(rng: random.Random, blocks: int, pods: tuple[int, ...] = ()) -> Chain:
    """Draw the tokens and the engine hashes of a chain."""
    return Chain(random_tokens(rng, blocks * BLOCK), [rng.getrandbits(64) for _ in range(blocks)], pods)


def make_chains(pairs: int, *, pods: int = PODS, share: int = SHARE, seed: int = 1) -> Iterator[Chain]:
    """Make chains, each on `share` pods drawn by lot, for about `pairs` (block, pod) in all; the last is shorter."""
    rng = random.Random(seed)
    blocks = pairs // share // STORE * STORE
    for first in range(0, blocks, CHAIN):
        yield make_chain(rng, min(CHAIN, blocks - first), tuple(rng.sample(range(pods), share)))


def make_fleet(pairs: int, *, pods: int = PODS, share: int = SHARE, seed: int = 1) -> Fleet:
    """Make a fleet of the chains of `make_chains`."""
    return Fleet(pods, list(make_chains(pairs, pods=pods, share=share, seed=seed)))


def payload_of(store: Store) -> bytes:
    """Give the payload frame that vLLM sends for a store."""
    event = {
        "type": "BlockStored",
        "block_hashes": store.hashes,
        "parent_block_hash": store.parent,
        "token_ids": store.tokens,
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(store.hashes),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return msgspec.msgpack.encode([1.0, [event], 0])


def payloads_of(chain: Chain) -> list[bytes]:
    """Give what vLLM publishes for a chain."""
    return [payload_of(store) for store in chain.stores()]


def deliveries(
    fleet: Fleet, messages_of: Callable[[Chain], list[Sent]], *, at_once: int = 32
) -> list[tuple[int, list[Sent]]]:
    """Give what the pods send: up to `at_once` messages of one pod at a time, the pods taking turns."""
    sent: list[list[Sent]] = [[] for _ in range(fleet.pods)]
    for chain in fleet.chains:
        messages = messages_of(chain)
        for pod in chain.pods:
            sent[pod] += messages
    longest = max(len(messages) for messages in sent)
    pieces = (
        (pod, messages[first : first + at_once])
        for first in range(0, longest, at_once)
        for pod, messages in enumerate(sent)
    )
    return [(pod, piece) for pod, piece in pieces if piece]


def messages_of(fleet: Fleet) -> list[Message]:
    """Give what all pods publish, the pods taking turns."""
    sent = [0] * fleet.pods
    messages = []
    for pod, payloads in deliveries(fleet, payloads_of):
        for payload in payloads:
            messages.append(Message(b"", sent[pod], payload, f"pod-{pod}"))
            sent[pod] += 1
    return messages


def prompts(fleet: Fleet, blocks: int) -> list[Asked]:
    """Give the first `blocks` blocks of every chain that is so long."""
    return [
        Asked(chain.tokens[: blocks * BLOCK], dict.fromkeys(chain.pods, blocks))
        for chain in fleet.chains
        if len(chain.hashes) >= blocks
    ]


def samples(fleet: Fleet, *, count: int = 24, seed: int = 2) -> list[Asked]:
    """Give prompts that leave a chain after some blocks, mostly within a block, and one that nobody knows."""
    rng = random.Random(seed)
    asked = [Asked(random_tokens(rng, 64 * BLOCK), {})]
    for chain in rng.choices(fleet.chains, k=count):
        blocks = rng.randint(1, len(chain.hashes))
        tokens = chain.tokens[: blocks * BLOCK] + random_tokens(rng, rng.randrange(64 * BLOCK))
        asked.append(Asked(tokens, dict.fromkeys(chain.pods, blocks)))
    return asked
