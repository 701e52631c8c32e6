"""A prompt as an index sees it: its tokens, and its block keys computed once and only as far as somebody asks."""

from collections.abc import Sequence

from indexer.errors import InvalidQuestion
from indexer.keys import (
    BlockKey,
    ImageItem,
    TokenIds,
    check_block_size,
    extend_chain,
    image_extras,
    root_key,
    token_buffer,
)


class Prompt:
    """The tokens of one prompt with all that decides which cached blocks fit it.

    Keys are computed when first asked for and kept, for each block size, so that a long prompt with a short match
    stays cheap. Who keeps the prompt of a conversation and adds each turn with `extend` never has its start hashed
    again. Not for use by several threads at once.

    A buffer is read in place: it stays exported as long as the prompt lives, and its values must not change.

    Raises `InvalidQuestion` when `token_ids` holds anything but token ids.
    """

    __slots__ = ("_chains", "cache_salt", "images", "length", "lora_name", "model", "tokens")

    def __init__(
        self,
        token_ids: TokenIds,
        model: str,
        *,
        lora_name: str | int | None = None,
        cache_salt: str | None = None,
        mm_items: Sequence[ImageItem] = (),
    ) -> None:
        self.tokens = token_buffer(token_ids)
        self._chains: dict[tuple[int, bool], list[BlockKey]] = {}
        self.length = len(self.tokens) // 4
        self.model = model
        # engines treat an empty name or salt as none
        self.lora_name = None if lora_name == "" else lora_name
        self.cache_salt = cache_salt or None
        self.images = tuple(mm_items)
        for item in self.images:
            _check_image(item)

    def __repr__(self) -> str:
        return f"Prompt({self.length} tokens, model={self.model!r})"

    def keys(self, block_size: int, upto: int, *, bare: bool = False) -> list[BlockKey]:
        """Give at least the first `upto` keys for blocks of `block_size` tokens, fewer where the prompt ends before.

        The list is the prompt's own and may hold more keys than asked for: do not change it. `bare` asks for the keys
        under which engines that name images without their place are filed.
        """
        bare = bare and bool(self.images)
        chain = self._chains.get((block_size, bare))
        if chain is None:
            chain = self._chains[block_size, bare] = []
        done = len(chain)
        upto = min(upto, self.length // block_size)
        if upto > done:
            parent = chain[-1] if chain else root_key(self.model, block_size, self.lora_name, self.cache_salt)
            extras = None
            if self.images:
                extras = image_extras(self.images, block_size, range(done, upto), bare=bare)
            span = self.tokens[4 * block_size * done : 4 * block_size * upto]
            chain += extend_chain(parent, span, block_size, extras)
        return chain

    def prepare(self, block_size: int) -> int:
        """Compute the keys of all whole blocks of `block_size` tokens ahead of a question; give their number.

        Raises `InvalidQuestion` for a block size below 1.
        """
        check_block_size(block_size)
        return len(self.keys(block_size, self.length))

    def extend(self, token_ids: TokenIds) -> None:
        """Add tokens at the end. Keys of blocks that were whole before are kept.

        Raises `InvalidQuestion` when `token_ids` holds anything but token ids.
        """
        self.tokens = memoryview(b"".join((self.tokens, token_buffer(token_ids))))
        self.length = len(self.tokens) // 4


def _check_image(item: ImageItem) -> None:
    match item:
        case (str(), int(first), int(length)) if first >= 0 and length >= 0:
            return
    raise InvalidQuestion(f"mm_items: expected (identifier, first token, number of tokens), got {item!r}")
