"""The one part of the build that pyproject.toml cannot say: whether the compiled core is built.

``KVINDEX_BUILD_NATIVE=yes`` builds it or fails, ``no`` leaves it out; unset, it is built where that works.
"""

import os
import shutil

from setuptools import setup
from setuptools_rust import Binding, RustExtension

asked = os.environ.get("KVINDEX_BUILD_NATIVE", "")
if asked not in ("", "yes", "no"):
    raise SystemExit(f"KVINDEX_BUILD_NATIVE={asked!r}: expected 'yes', 'no' or nothing")

cargo = os.environ.get("CARGO") or shutil.which("cargo")
if asked == "yes" and not cargo:
    raise SystemExit("KVINDEX_BUILD_NATIVE=yes, but there is no cargo: install Rust 1.88 or newer, https://rustup.rs")

core = RustExtension(
    "indexer._native",
    "native/Cargo.toml",
    binding=Binding.PyO3,
    features=["python"],
    args=["--locked"],
    py_limited_api=True,
    optional=asked != "yes",
    debug=False,
)
native = asked != "no" and bool(cargo)
setup(
    rust_extensions=[core] if native else [],
    # one wheel for every Python from 3.11 on
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if native else {},
)
