"""A block pool as vLLM has it, without a model: it decides which blocks are cached, evicted and announced.

Written from vLLM's behaviour alone and independent of `indexer`, so that one can check the other.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias


class Stored(NamedTuple):
    """Blocks entered the cache."""

    hashes: list[int]
    parent: int | None
    """The block before the first one, None at a prompt's start."""
    tokens: list[int]
    lora_name: str | None = None
    cache_salt: str | None = None
    """The salt of the prompt, whether or not these blocks are its first."""


class Removed(NamedTuple):
    """One copy of a block left the cache."""

    hash: int


class Cleared(NamedTuple):
    """The cache was emptied."""


EngineEvent: TypeAlias = Stored | Removed | Cleared


class Ran(NamedTuple):
    """What one request did."""

    cached_tokens: int
    """Tokens of the prompt that were not computed again."""
    events: list[EngineEvent]
    """In order; the removals of a step come before its stores."""


class OutOfBlocksError(RuntimeError):
    """A prompt needs more blocks than are free."""


@dataclass(eq=False)
class Request:
    """A request in progress: its blocks stay in the cache until it is finished."""

    tokens: list[int]
    lora_name: str | None
    cache_salt: str | None
    cached_tokens: int
    events: list[EngineEvent] = field(default_factory=list)
    """What its prompt did to the cache."""
    blocks: list[int] = field(default_factory=list, repr=False)
    """Numbers of the physical blocks it uses."""
    stored: int = 0
    """How many of its blocks are whole and in the cache."""


@dataclass(eq=False, slots=True)
class _Block:
    name: int | None = None
    """The hash of what it holds, None while it holds nothing whole."""
    users: int = 0


class SimulatedEngine:
    """The cache of one engine: blocks, reference counts, and a free queue in the order of last use.

    As in vLLM: whole blocks are found again by a hash chained over the prompt; at least the last token of a prompt is
    always computed, so that a prompt of whole blocks that runs again stores its last block a second time; blocks of a
    finished request are freed last one first and stay findable until their memory is needed; nothing is de-duplicated.
    `seed` starts the hash chain: engines with other seeds call the same blocks by other names.

    Not for use by several threads at once.
    """

    def __init__(self, *, block_size: int = 16, num_blocks: int = 1024, seed: int = 0) -> None:
        if block_size < 1 or num_blocks < 1:
            raise ValueError(f"expected at least 1, got block_size={block_size}, num_blocks={num_blocks}")
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._root = hashlib.sha256(struct.pack("<q", seed)).digest()
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: dict[int, OrderedDict[int, None]] = {}
        self._open: set[Request] = set()

    def __repr__(self) -> str:
        return f"SimulatedEngine({self.num_blocks - len(self._free)} of {self.num_blocks} blocks in use)"

    def run(
        self,
        token_ids: Sequence[int],
        output_tokens: Sequence[int] = (),
        *,
        lora_name: str | None = None,
        cache_salt: str | None = None,
    ) -> Ran:
        """Run a request from start to end.

        Raises `OutOfBlocksError` when the prompt does not fit.
        """
        request = self.begin(token_ids, lora_name=lora_name, cache_salt=cache_salt)
        return Ran(request.cached_tokens, request.events + self.finish(request, output_tokens))

    def begin(
        self, token_ids: Sequence[int], *, lora_name: str | None = None, cache_salt: str | None = None
    ) -> Request:
        """Compute a prompt and keep its blocks in use until `finish`.

        Raises `OutOfBlocksError` when too few blocks are free; the cache is then as it was.
        """
        tokens = list(token_ids)
        if not tokens:
            raise ValueError("token_ids: expected at least one token")
        names = self.hashes(tokens, lora_name=lora_name, cache_salt=cache_salt)
        held: list[int] = []
        for name in names[: (len(tokens) - 1) // self.block_size]:
            copies = self._cached.get(name)
            if copies is None:
                break
            held.append(next(iter(copies)))
        wanted = -(-len(tokens) // self.block_size) - len(held)
        free = len(self._free) - sum(number in self._free for number in held)
        if wanted > free:
            raise OutOfBlocksError(f"the prompt needs {wanted} more blocks, {free} of {self.num_blocks} are free")
        for number in held:
            self._use(number)
        request = Request(tokens, lora_name, cache_salt, len(held) * self.block_size, blocks=held, stored=len(held))
        self._allocate(request, wanted)
        self._store(request, names)
        self._open.add(request)
        return request

    def finish(self, request: Request, output_tokens: Sequence[int] = ()) -> list[EngineEvent]:
        """Add what was generated, as far as blocks are free, and release the blocks; give the events of this.

        The last generated token never reaches the cache: no step has computed it.
        """
        if request not in self._open:
            raise ValueError("the request is not open")
        before = len(request.events)
        room = (len(request.blocks) + len(self._free)) * self.block_size
        request.tokens += list(output_tokens[:-1])
        del request.tokens[room:]
        self._allocate(request, -(-len(request.tokens) // self.block_size) - len(request.blocks))
        names = self.hashes(request.tokens, lora_name=request.lora_name, cache_salt=request.cache_salt)
        self._store(request, names)
        for number in reversed(request.blocks):
            block = self._blocks[number]
            block.users -= 1
            if not block.users:
                self._free[number] = None
        self._open.remove(request)
        events = request.events[before:]
        del request.events[before:]
        return events

    def reset(self) -> list[EngineEvent]:
        """Empty the cache; refused while requests are open, which gives no events."""
        if self._open:
            return []
        for block in self._blocks:
            block.name = None
        self._cached.clear()
        return [Cleared()]

    def hit_blocks(
        self, token_ids: Sequence[int], *, lora_name: str | None = None, cache_salt: str | None = None
    ) -> int:
        """Give the number of leading blocks of a prompt that the cache holds, the last one included."""
        names = self.hashes(token_ids, lora_name=lora_name, cache_salt=cache_salt)
        return next((number for number, name in enumerate(names) if name not in self._cached), len(names))

    def resident(self) -> dict[int, int]:
        """Give the number of copies of every block in the cache."""
        return {name: len(numbers) for name, numbers in self._cached.items()}

    def hashes(
        self, token_ids: Sequence[int], *, lora_name: str | None = None, cache_salt: str | None = None
    ) -> list[int]:
        """Give the engine's own names of the whole blocks of a prompt: the last 8 bytes of chained SHA-256 digests."""
        size = self.block_size
        adapter = (lora_name or "").encode()
        digest = self._root
        if cache_salt:
            digest = hashlib.sha256(digest + cache_salt.encode()).digest()
        names = []
        for end in range(size, len(token_ids) + 1, size):
            packed = struct.pack(f"<{size}I", *token_ids[end - size : end])
            digest = hashlib.sha256(digest + packed + adapter).digest()
            names.append(int.from_bytes(digest[-8:], "big"))
        return names

    def _use(self, number: int) -> None:
        self._blocks[number].users += 1
        self._free.pop(number, None)

    def _allocate(self, request: Request, count: int) -> None:
        for _ in range(count):
            number, _ = self._free.popitem(last=False)
            block = self._blocks[number]
            if block.name is not None:
                copies = self._cached[block.name]
                del copies[number]
                if not copies:
                    del self._cached[block.name]
                request.events.append(Removed(block.name))
                block.name = None
            block.users = 1
            request.blocks.append(number)

    def _store(self, request: Request, names: list[int]) -> None:
        first = request.stored
        if first >= len(names):
            return
        for number, name in zip(request.blocks[first:], names[first:], strict=False):
            self._blocks[number].name = name
            self._cached.setdefault(name, OrderedDict())[number] = None
        request.stored = len(names)
        request.events.append(
            Stored(
                hashes=names[first:],
                parent=names[first - 1] if first else None,
                tokens=request.tokens[first * self.block_size : len(names) * self.block_size],
                lora_name=request.lora_name,
                cache_salt=request.cache_salt,
            )
        )
