"""Which implementation is used where nobody asks for one: the compiled core where it is there, else plain Python.

``KVINDEX_IMPL=native|python`` decides it. It is the one environment variable that is read at import, because the core
has to be loaded, or not, before anything else happens.
"""

import os
from typing import TYPE_CHECKING, Literal

from indexer import keys, prompt

_asked = os.environ.get("KVINDEX_IMPL", "")
if _asked not in ("", "native", "python"):
    raise ImportError(f"KVINDEX_IMPL={_asked!r}: expected 'native' or 'python'")

REMEDY = "install a wheel for this platform, or a Rust toolchain and then this package from its source"

missing = ""
"""Why the compiled core cannot be loaded, "" when it can."""
try:
    from indexer import _native
except ImportError as error:
    missing = str(error)
    if _asked == "native":
        raise ImportError(f"KVINDEX_IMPL=native, but the core cannot be loaded: {error}; {REMEDY}") from error

implementation: Literal["native", "python"] = "python" if missing or _asked == "python" else "native"
"""What ``memory://`` opens."""

unasked = bool(missing) and not _asked
"""Plain Python is used although nobody asked for it."""

if TYPE_CHECKING or implementation == "python":
    Prompt = prompt.Prompt
    block_keys = keys.block_keys
    token_ids_of_json = keys.token_ids_of_json
else:
    from indexer import native

    Prompt = _native.Prompt
    block_keys = native.block_keys
    token_ids_of_json = native.token_ids_of_json
