#!/usr/bin/env bash
# Installs the project as its users do, each way in an environment of its own and with no Rust in reach:
# the wheel brings the core; the source installs all the same and says once what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ln -s "$(command -v "$python")" "$work/python3"

# Only what a machine without Rust has: no PATH entry with a cargo in it.
path=/usr/bin:/bin
if PATH=$path command -v cargo >/dev/null; then
  echo "cargo is in $path: an install without it cannot be tried here" >&2
  exit 1
fi

try() { # name, what to install, what to expect
  "$work/python3" -m venv "$work/$1"
  env -u CARGO -u KVINDEX_BUILD_NATIVE PATH="$path" "$work/$1/bin/python" -m pip install --quiet \
    --disable-pip-version-check "$2"
  (cd "$work" && env -u KVINDEX_IMPL "$work/$1/bin/python" - "$3" <<'PY')
import sys
import warnings

import indexer

expected = sys.argv[1]
assert indexer.implementation == expected, f"{indexer.implementation}, expected {expected}"
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("default")
    for _ in range(2):
        index = indexer.open_index("memory://")
assert len(said) == (expected == "python"), [str(one.message) for one in said]
tokens = list(range(16))
block = indexer.BlockStored(block_hashes=[7], token_ids=__import__("array").array("I", tokens), block_size=16)
index.register(indexer.Source("pod"), model="m")
index.apply(indexer.Source("pod"), [block])
(holding,) = index.match(indexer.Prompt(tokens, "m"))
assert holding.tokens == 16, holding
print(f"{sys.prefix}: {index!r}" + "".join(f"\n  warning: {one.message}" for one in said))
PY
  "$work/$1/bin/kvindex" --help >/dev/null
}

try wheel "$(ls dist/*.whl)" native
try source . python
