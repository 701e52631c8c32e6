"""The token ids of text that was seen before, so that only the new end of a prompt has to be tokenized.

Prompts of one dialogue extend each other, and all prompts of one application begin alike. The store cuts each text into
chunks at places where that cannot change the ids (`scorer.cuts`), keeps the ids of each chunk under a chain of hashes,
and gives back those of the longest run of chunks that it knows. A place to cut is found from the text alone, so that
equal beginnings have equal chunks.

The ids are always those of the whole text: a hash only finds a chunk, its text and the chunk before it decide. A
tokenizer whose texts cannot be cut safely is left to tokenize all of them, and that is counted.
"""

import queue
import secrets
import sys
import threading
from array import array
from collections import OrderedDict
from itertools import count, pairwise
from types import TracebackType
from typing import NamedTuple, Self

import xxhash
from tokenizers import Tokenizer

from scorer.cuts import Rule, rule_of
from scorer.errors import InvalidRequest

CHUNK = 512
"""A chunk ends at the first safe place after this many characters."""
OVERHEAD = 288
"""Bytes of an entry beside its text and ids: the object, its numbers and its place in the table (measured)."""
MODELS = 64
"""Tokenizers whose rules are kept."""


class Prefix(NamedTuple):
    """What is known of a prompt."""

    ids: "array[int]"
    """Token ids of its first `characters` characters, uint32."""
    characters: int


class PrefixStats(NamedTuple):
    """Counts since the store was made, but for those of the present: bytes, chunks and digests waiting."""

    hits: int
    """Texts of which some was known."""
    misses: int
    """Texts of which nothing was known, though their tokenizer allows cuts."""
    stood_aside: int
    """Texts tokenized whole, as their tokenizer allows no cuts."""
    characters_tokenized: int
    characters_reused: int
    bytes_held: int
    chunks: int
    chunks_evicted: int
    digests_waiting: int
    digests_dropped: int
    """Texts for the background that found its queue full."""
    digests_failed: int


class _Entry:
    """One chunk behind one certain chunk."""

    __slots__ = ("ids", "number", "parent", "text")

    def __init__(self, text: bytes, parent: int, ids: bytes, number: int) -> None:
        self.text = text
        self.parent = parent
        self.ids = ids
        self.number = number

    def size(self) -> int:
        return OVERHEAD + sys.getsizeof(self.text) + sys.getsizeof(self.ids)


class _Space(NamedTuple):
    """One tokenizer of one model: where its chains begin."""

    tokenizer: Tokenizer
    rule: Rule | str
    seed: int
    number: int


class _Path(NamedTuple):
    """A text in chunks; what is behind the last safe place belongs to none."""

    ends: list[int]
    keys: list[int]
    parts: list[bytes]


class PrefixStore:
    """Token ids of known beginnings of text, the least recently used forgotten first. Safe to use from many threads.

    `max_bytes` bounds what is held, `chunk` is the least number of characters that are kept together (smaller: less is
    tokenized again, more bytes for each character), `max_digests` and `max_digest_characters` bound what waits for the
    background thread. A tokenizer must not be changed after its first use here, but for truncation, padding and
    `encode_special_tokens`, which are looked at each time.
    """

    def __init__(
        self,
        max_bytes: int = 256 << 20,
        *,
        chunk: int = CHUNK,
        max_digests: int = 256,
        max_digest_characters: int = 32 << 20,
    ) -> None:
        for name, value in (
            ("max_bytes", max_bytes),
            ("chunk", chunk),
            ("max_digests", max_digests),
            ("max_digest_characters", max_digest_characters),
        ):
            if value < 1:
                raise InvalidRequest(f"{name}: {value} given, expected at least 1")
        self.max_bytes = max_bytes
        self.chunk = chunk
        self.max_digest_characters = max_digest_characters
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._spaces: OrderedDict[tuple[str, int], _Space] = OrderedDict()
        self._numbers = count()
        self._lock = threading.Lock()
        self._rules_lock = threading.Lock()
        self._bytes = self._evicted = 0
        self._hits = self._misses = self._aside = self._tokenized = self._reused = 0
        self._queue: queue.Queue[tuple[str, str, Tokenizer] | None] = queue.Queue(max_digests + 1)
        self._max_digests = max_digests
        self._waiting = self._waiting_characters = self._dropped = self._failed = 0
        self._idle = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encode(self, text: str, *, model: str, tokenizer: Tokenizer, add_special_tokens: bool) -> "array[int]":
        """The ids (uint32) that `tokenizer.encode(text, add_special_tokens=...)` gives; the text is known afterwards.

        Raises `InvalidRequest` for text that is no Unicode (a lone surrogate).
        """
        space = self._space(model, tokenizer)
        rule = space.rule
        if isinstance(rule, str) or _altered(tokenizer):
            check_text(text)
            ids = array("I", tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
            with self._lock:
                self._aside += 1
                self._tokenized += len(text)
            return ids
        path = self._path(text, space, rule)
        known = self._known(path, space)
        start = path.ends[len(known) - 1] if known else 0
        made = _tokenize(text, [start, *path.ends[len(known) :], len(text)], tokenizer)
        with self._lock:
            self._tokenized += len(text) - start
            self._reused += start
            if known:
                self._hits += 1
            else:
                self._misses += 1
            self._keep(path, known, made, space)
        found = array("I", rule.head if add_special_tokens else ())
        found.frombytes(b"".join([*(entry.ids for entry in known), *made]))
        if add_special_tokens:
            found.extend(rule.tail)
        return found

    def find_longest_prefix(
        self, prompt: str, model: str, *, tokenizer: Tokenizer, add_special_tokens: bool = False
    ) -> Prefix:
        """What is known of a prompt, without tokenizing any of it. Nothing is counted.

        With `add_special_tokens` the ids begin with those that the tokenizer puts before a text, if any of it is known.
        """
        space = self._space(model, tokenizer)
        if isinstance(space.rule, str) or _altered(tokenizer):
            return Prefix(array("I"), 0)
        path = self._path(prompt, space, space.rule)
        known = self._known(path, space)
        if not known:
            return Prefix(array("I"), 0)
        ids = array("I", space.rule.head if add_special_tokens else ())
        ids.frombytes(b"".join([entry.ids for entry in known]))
        return Prefix(ids, path.ends[len(known) - 1])

    def digest(self, prompt: str, model: str, *, tokenizer: Tokenizer) -> bool:
        """Make a prompt known in the background. False, and counted, if too much is waiting or the store is closed."""
        with self._lock:
            if (
                self._closed
                or self._waiting >= self._max_digests
                or self._waiting_characters + len(prompt) > self.max_digest_characters
            ):
                self._dropped += 1
                return False
            self._waiting += 1
            self._waiting_characters += len(prompt)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="prefix-store", daemon=True)
                self._thread.start()
            self._queue.put_nowait((prompt, model, tokenizer))
        return True

    def drain(self, timeout: float) -> None:
        """Return when all digests are done; `TimeoutError` after so many seconds."""
        with self._idle:
            if not self._idle.wait_for(lambda: self._waiting == 0, timeout):
                raise TimeoutError(f"{self._waiting} texts still wait to be digested after {timeout} s")

    def close(self) -> None:
        """Digest what waits, then end the background thread. What is known can still be asked for."""
        with self._lock:
            first = not self._closed
            self._closed = True
            thread = self._thread
            if first and thread is not None:
                self._queue.put_nowait(None)
        if thread is not None:
            thread.join()

    def clear(self) -> None:
        """Forget all text."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def stats(self) -> PrefixStats:
        """Counts and sizes, all of one moment."""
        with self._lock:
            return PrefixStats(
                hits=self._hits,
                misses=self._misses,
                stood_aside=self._aside,
                characters_tokenized=self._tokenized,
                characters_reused=self._reused,
                bytes_held=self._bytes,
                chunks=len(self._entries),
                chunks_evicted=self._evicted,
                digests_waiting=self._waiting,
                digests_dropped=self._dropped,
                digests_failed=self._failed,
            )

    def stands_aside(self, model: str, tokenizer: Tokenizer) -> str | None:
        """Why texts of this tokenizer are tokenized whole; None where they are not."""
        if _altered(tokenizer):
            return "it truncates, pads or takes special tokens for text"
        rule = self._space(model, tokenizer).rule
        return rule if isinstance(rule, str) else None

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            prompt, model, tokenizer = task
            failed = False
            try:
                space = self._space(model, tokenizer)
                # of a tokenizer whose texts are not cut there is nothing to keep
                if isinstance(space.rule, Rule) and not _altered(tokenizer):
                    self.encode(prompt, model=model, tokenizer=tokenizer, add_special_tokens=False)
            except Exception:  # noqa: BLE001 - one bad text must not end the thread; a tokenizer may raise anything
                failed = True
            with self._idle:
                self._failed += failed
                self._waiting -= 1
                self._waiting_characters -= len(prompt)
                self._idle.notify_all()

    def _space(self, model: str, tokenizer: Tokenizer) -> _Space:
        # the space keeps its tokenizer alive, so that no other can have its id
        key = (model, id(tokenizer))
        space = self._spaces.get(key)
        if space is not None:
            return space
        with self._rules_lock:
            space = self._spaces.get(key)
            if space is None:
                # a seed that nobody knows: no text can be made whose chunks have the keys of others
                space = _Space(tokenizer, rule_of(tokenizer), secrets.randbits(64), next(self._numbers))
                if len(self._spaces) >= MODELS:
                    # what it held is never asked for again and ages out
                    self._spaces.popitem(last=False)
                self._spaces[key] = space
        return space

    def _path(self, text: str, space: _Space, rule: Rule) -> _Path:
        path = _Path([], [], [])
        search, size, key, start = rule.cut.search, self.chunk, space.seed, 0
        try:
            while found := search(text, start + size):
                end = found.start()
                part = text[start:end].encode()
                key = xxhash.xxh3_64_intdigest(part, key)
                path.ends.append(end)
                path.keys.append(key)
                path.parts.append(part)
                start = end
            text[start:].encode()
        except UnicodeEncodeError:
            check_text(text)
            raise
        return path

    def _known(self, path: _Path, space: _Space) -> list[_Entry]:
        known = []
        parent = space.number
        with self._lock:
            for key, part in zip(path.keys, path.parts, strict=True):
                entry = self._entries.get(key)
                if entry is None or entry.parent != parent or entry.text != part:
                    break
                known.append(entry)
                parent = entry.number
        return known

    def _keep(self, path: _Path, known: list[_Entry], made: list[bytes], space: _Space) -> None:
        """Add what is new (`made`, whose last has no end of its own) behind what was known; the lock is held."""
        entries = self._entries
        for before, key in zip(known, path.keys, strict=False):
            if entries.get(key) is not before:
                # forgotten meanwhile: what follows it could not be found
                return
        parent = known[-1].number if known else space.number
        first = len(known)
        reached = first
        for key, part, ids in zip(path.keys[first:], path.parts[first:], made, strict=False):
            entry = entries.get(key)
            if entry is None:
                entry = entries[key] = _Entry(part, parent, ids, next(self._numbers))
                self._bytes += entry.size()
            elif entry.parent != parent or entry.text != part:
                break
            parent = entry.number
            reached += 1
        # from the last to the first: a chunk is always forgotten before the one that it hangs on
        for key in reversed(path.keys[:reached]):
            entries.move_to_end(key)
        while self._bytes > self.max_bytes:
            self._bytes -= entries.popitem(last=False)[1].size()
            self._evicted += 1


def _altered(tokenizer: Tokenizer) -> bool:
    """Whether it is set to something that is not the same for a text and its parts."""
    return bool(tokenizer.encode_special_tokens) or tokenizer.truncation is not None or tokenizer.padding is not None


def check_text(text: str) -> None:
    """Raise `InvalidRequest` for text that is no Unicode (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"prompt: character {error.start} is {text[error.start]!r}, half of a pair, expected Unicode text"
        ) from None


def _tokenize(text: str, ends: list[int], tokenizer: Tokenizer) -> list[bytes]:
    """The ids of each part between two ends, as bytes of uint32."""
    parts = [text[start:end] for start, end in pairwise(ends)]
    made = tokenizer.encode_batch_fast(parts, add_special_tokens=False)
    return [array("I", each.ids).tobytes() for each in made]
