"""Prompts as chats make them: conversations that share system prompts and grow turn by turn."""

import random
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

VOCABULARY = 128_000
_REMEMBERED_PROMPTS = 2_000
_RECENT_PROMPTS = 96
_REPEATS = 0.1


class Turn(NamedTuple):
    """One request of a conversation."""

    prompt: list[int]
    output: list[int]
    """What the engine will generate."""
    conversation: int


class Workload:
    """An endless stream of conversations that share system prompts, the same for the same `seed`.

    Each of the `conversations` going on at a time begins with one of the `systems` system prompts and grows turn by
    turn, up to `max_tokens`; then another takes its place. Now and then a prompt comes again, cut to whole blocks of
    16 tokens, which makes an engine store a block twice.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        systems: int = 8,
        conversations: int = 48,
        max_tokens: int = 2_048,
        system_tokens: int = 512,
    ) -> None:
        self._rng = random.Random(seed)
        longest = min(system_tokens, max_tokens // 2)
        self._systems = [self._words(self._rng.randint(longest // 4, longest)) for _ in range(systems)]
        self._max_tokens = max_tokens
        self._step = max(1, min(120, max_tokens // 8))
        self._going = [self._begin(number) for number in range(conversations)]
        self._begun = conversations
        self._old: list[list[int]] = []
        self._recent: deque[tuple[int, list[int]]] = deque(maxlen=_RECENT_PROMPTS)

    def __iter__(self) -> Iterator[Turn]:
        return self

    def __next__(self) -> Turn:
        rng = self._rng
        if self._recent and rng.random() < _REPEATS:
            number, old = rng.choice(self._recent)
            again = old[: max(16, len(old) // 16 * 16)]
            self._recent.append((number, again))
            return Turn(again, self._words(rng.randint(1, 16)), number)
        place = rng.randrange(len(self._going))
        number, history = self._going[place]
        prompt = history + self._words(rng.randint(1, self._step))
        output = self._words(rng.randint(1, self._step))
        self._remember(number, prompt)
        if len(prompt) + len(output) + 2 * self._step > self._max_tokens:
            self._going[place] = self._begin(self._begun)
            self._begun += 1
        else:
            self._going[place] = (number, prompt + output)
        return Turn(prompt, output, number)

    def sample(self, count: int) -> list[list[int]]:
        """Give prompts to ask about: recent and old ones, recent ones with another end, and some never seen."""
        rng = self._rng
        prompts = []
        for number in range(count):
            prompt = rng.choice(self._recent)[1] if self._recent else rng.choice(self._systems)
            cut = rng.randint(1, len(prompt))
            match number % 5:
                case 0 | 1:
                    prompts.append(prompt)
                case 2:
                    prompts.append(rng.choice(self._old or self._systems))
                case 3:
                    prompts.append(prompt[:cut] + self._words(len(prompt) - cut))
                case _:
                    prompts.append(rng.choice(self._systems) + self._words(rng.randint(1, 64)))
        return prompts

    def _begin(self, number: int) -> tuple[int, list[int]]:
        return number, self._rng.choice(self._systems)

    def _words(self, count: int) -> list[int]:
        return self._rng.choices(range(VOCABULARY), k=count)

    def _remember(self, number: int, prompt: list[int]) -> None:
        self._recent.append((number, prompt))
        if len(self._old) < _REMEMBERED_PROMPTS:
            self._old.append(prompt)
        else:
            self._old[self._rng.randrange(len(self._old))] = prompt
