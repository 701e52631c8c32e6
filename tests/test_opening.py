"""Which index a URL and the environment open, and what is said where the compiled core is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from indexer import InvalidQuestion, MemoryIndex, open_index

from .conftest import NEEDS_CORE

ROOT = Path(__file__).parent.parent
WITHOUT_CORE = "import sys; sys.modules['indexer._native'] = None\n"
SHOW = """
import indexer
print(indexer.implementation, type(indexer.open_index()).__name__, indexer.Prompt.__module__)
print(indexer.open_index("memory://").block_size("m"), len(indexer.block_keys(range(32), "m")))
"""
PYTHON = ["python MemoryIndex indexer.prompt", "None 2"]
NATIVE = ["native NativeIndex indexer._native", "None 2"]


def run(code, asked=None, *options):
    environment = {name: value for name, value in os.environ.items() if name not in ("KVINDEX_IMPL", "PYTHONWARNINGS")}
    if asked is not None:
        environment["KVINDEX_IMPL"] = asked
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("python", PYTHON),
        pytest.param("native", NATIVE, marks=NEEDS_CORE),
        pytest.param("", NATIVE, marks=NEEDS_CORE),
        pytest.param(None, NATIVE, marks=NEEDS_CORE),
    ],
)
def test_the_environment_decides_what_is_opened(asked, shown):
    done = run(SHOW, asked, "-W", "error")
    assert (done.stdout.splitlines(), done.stderr) == (shown, "")


@pytest.mark.parametrize("core", ["", WITHOUT_CORE])
@pytest.mark.parametrize("asked", ["rust", "Python", "native "])
def test_another_word_in_the_environment_is_refused(asked, core):
    done = run(core + "import indexer", asked)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: KVINDEX_IMPL={asked!r}: expected 'native' or 'python'"


@NEEDS_CORE
def test_a_url_says_more_than_the_environment():
    code = "from indexer import open_index; print(type(open_index('memory://?impl={}')).__name__)"
    assert run(code.format("native"), "python", "-W", "error").stdout == "NativeIndex\n"
    assert run(code.format("python"), "native", "-W", "error").stdout == "MemoryIndex\n"


def test_a_missing_core_is_said_once_where_nobody_asked_for_python():
    done = run(WITHOUT_CORE + SHOW + "for _ in range(3): indexer.open_index()\n", None, "-W", "once")
    assert done.stdout.splitlines() == PYTHON
    assert done.stderr.count("RuntimeWarning") == 1
    assert "install" in done.stderr
    assert "KVINDEX_IMPL=python" in done.stderr


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("python", SHOW),
        (None, "import indexer; print(repr(indexer.open_index('memory://?impl=python')))"),
        (None, "import indexer, kvevents, scorer, kvindex; print(len(indexer.block_keys(range(32), 'm')))"),
    ],
)
def test_a_missing_core_is_not_said_otherwise(asked, code):
    done = run(WITHOUT_CORE + code, asked, "-W", "error")
    assert (done.returncode, done.stderr) == (0, "")


def test_asking_for_a_missing_core_is_refused_with_the_remedy():
    done = run(WITHOUT_CORE + "import indexer", "native")
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError: KVINDEX_IMPL=native, but the core cannot be loaded")
    assert "install" in said
    code = """
import indexer
try:
    indexer.open_index("memory://?impl=native")
except indexer.InvalidQuestion as error:
    print(error)
"""
    for asked in (None, "python"):
        done = run(WITHOUT_CORE + code, asked, "-W", "error")
        assert "the core cannot be loaded" in done.stdout
        assert "install" in done.stdout


@pytest.mark.parametrize(
    "url",
    ["memory://?impl=rust", "memory://?impl=native&size=3", "memory://?size=3", "memory://host",
     "memory:///path", "memori://", "", "python"],
)  # fmt: skip
def test_urls_that_name_no_index_are_refused(url):
    with pytest.raises(InvalidQuestion, match="index URL"):
        open_index(url)


def test_the_index_in_python_opens_by_its_name_too():
    assert type(open_index("memory://?impl=python")) is MemoryIndex
    assert type(open_index("memory://?impl=")) is type(open_index())
    assert repr(MemoryIndex()) == "MemoryIndex(python, 0 blocks, 0 sources)"
