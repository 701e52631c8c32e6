"""The arrows between the packages: `kvevents → indexer ← scorer`, `kvindex` above all three and imported by none."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "indexer": set(),
    "kvevents": {"indexer"},
    "scorer": {"indexer"},
    "kvindex": {"indexer", "kvevents", "scorer"},
}
# modules that others may import although they are no root: the supported test kit
ALSO_PUBLIC = {"kvevents.faults", "kvevents.testing"}


def imported_modules(source: str, package: str) -> list[tuple[int, str, list[str]]]:
    """Every import in a file as (line, absolute module, names taken from it), those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # a relative import stays in its package: only the top matters here
            module = package if node.level else (node.module or "")
            found.append((node.lineno, module, [alias.name for alias in node.names]))
    return found


def wrong_arrows(source: str, package: str) -> list[str]:
    problems = []
    for line, module, names in imported_modules(source, package):
        top = module.partition(".")[0]
        if top == package or top not in MAY_IMPORT:
            continue
        if top not in MAY_IMPORT[package]:
            problems.append(f"line {line}: {package} must not import {top}")
        elif module != top and module not in ALSO_PUBLIC:
            problems.append(f"line {line}: import {top} through its root, not {module}")
        else:
            submodules = [name for name in names if is_module(top, name) and not exports(top, name)]
            problems += [f"line {line}: {name} is a module inside {top}, not one of its names" for name in submodules]
    return problems


def is_module(package: str, name: str) -> bool:
    place = ROOT / package / name
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def exports(package: str, name: str) -> bool:
    return name in getattr(importlib.import_module(package), "__all__", ())


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_arrow_points_the_right_way(package):
    files = modules_of(package)
    assert files, f"no modules found in {package}"
    problems = [
        f"{file.relative_to(ROOT)} {problem}"
        for file in files
        for problem in wrong_arrows(file.read_text(encoding="utf-8"), package)
    ]
    assert not problems, "\n".join(problems)


def test_parts_of_the_index_in_redis_know_only_those_that_its_docstring_names_before_them():
    package = importlib.import_module("indexer.redis")
    named = re.findall("`(.+?)`", package.__doc__)
    files = {file.stem: file for file in modules_of("indexer/redis") if file.stem != "__init__"}
    assert sorted(named) == sorted(files)
    for place, name in enumerate(named):
        imports = imported_modules(files[name].read_text(encoding="utf-8"), "indexer.redis")
        known = {module.removeprefix("indexer.redis.") for _, module, _ in imports if "indexer.redis." in module}
        known |= {taken for _, module, names in imports if module == "indexer.redis" for taken in names}
        assert known <= set(named[:place]), name


@pytest.mark.parametrize("package", ["indexer", "kvevents", "scorer"])
def test_a_package_shows_few_names_and_all_of_them_exist(package):
    root = importlib.import_module(package)
    names = root.__all__
    assert 0 < len(names) <= 36
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(root, name)] == []


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("indexer", "from kvevents import Message"),
        ("indexer", "import scorer"),
        ("indexer", "def f():\n    import kvindex.cli"),
        ("kvevents", "from scorer import PrefixScorer"),
        ("kvevents", "import kvindex"),
        ("scorer", "import kvevents"),
        ("scorer", "from indexer.base import Source"),
        ("scorer", "from indexer import ledger"),
        ("kvindex", "from indexer import redis"),
        ("kvevents", "import indexer.memory"),
        ("kvindex", "from kvevents.pool import EventPool"),
    ],
)
def test_a_wrong_arrow_is_seen(package, line):
    assert wrong_arrows(line, package)


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("indexer", "from indexer.base import Source"),
        ("indexer", "from . import base"),
        ("kvevents", "from indexer import Source"),
        ("scorer", "import indexer"),
        ("kvindex", "from scorer import PrefixScorer"),
        ("kvindex", "import json"),
    ],
)
def test_a_right_arrow_is_left_alone(package, line):
    assert not wrong_arrows(line, package)
