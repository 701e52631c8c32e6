"""Everything that README and docs say to run is run, and everything that they name is there.

`tests/reader.py` does what a page says; here is which pages, and that it notices what is wrong.
"""

import os
import re
from pathlib import Path

import pytest

from kvindex.config import _NOT_KEYS, variables

from .conftest import NEEDS_REDIS
from .documents import Wrong, commands_of, read_page, same_output, words_of
from .not_run import ROOT, check_kvindex, not_run
from .reader import HAS_TOOLS, Reader
from .world import World

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COLLECTOR = """
receivers: {otlp: {protocols: {http: {}}}}
exporters: {debug: {}}
service: {pipelines: {traces: {receivers: [otlp], exporters: [debug]}}}
"""
NEEDS_TOOLS = pytest.mark.skipif(not HAS_TOOLS and "CI" not in os.environ, reason="there is no bash, or no curl")


def names(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def world(tmp_path_factory, request):
    redis = request.getfixturevalue("redis_server").url
    made = World(tmp_path_factory.mktemp("world"), redis)
    yield made
    made.close()


@NEEDS_TOOLS
@NEEDS_REDIS
@pytest.mark.parametrize("path", PAGES, ids=names)
def test_what_a_page_says_to_run_runs(path, world, tmp_path):
    Reader(world, tmp_path).read(read_page(path))


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def broken_links(path: Path) -> list[str]:
    page = read_page(path)
    broken = []
    for link in page.links():
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in read_page(target).anchors()):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_commands_in_the_text_exist(path, tmp_path):
    for text in read_page(path).inline():
        check_inline(text)


def check_inline(text: str) -> None:
    if text.startswith("kvindex "):
        check_kvindex(text.split())
    elif re.match(r"make [a-z]|python (-m )?[\w./-]+", text):
        words = [word.strip("[]") for word in words_of(text)]
        kind = not_run(text)
        if kind is not None:
            kind.check(words, ROOT)


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_variables_in_the_text_are_keys(path):
    known = {*variables(), *_NOT_KEYS, "KVINDEX_SHARED", "KVINDEX_FUZZ"}
    named = set(re.findall(r"\bKVINDEX_[A-Z_]*[A-Z]\b(?!_)", path.read_text()))
    assert named <= known


def test_every_page_can_be_found():
    fronts = (ROOT / "README.md", ROOT / "docs/README.md")
    links = [(front.parent / link.partition("#")[0]).resolve() for front in fronts for link in read_page(front).links()]
    assert [path.name for path in PAGES if path not in links and path != fronts[0]] == []


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("```python\n1 / 0\n```", "ZeroDivisionError"),
        ("```python\nfrom indexer import no_such_name\n```", "no_such_name"),
        ("```python\nprint(1 + 1)  # 3\n```", "expected '3'"),
        ("```python\nawait scorer.ascore(tokens)\n```", "model"),
        ("```console\n$ false\n```", "ended with 1"),
        ("```console\n$ echo a\nb\n```", "where the page says"),
        ("```console\n$ kvindex fleet --podz 4\n```", "--podz"),
        ("```console\n$ kvindex sreve\n```", "sreve"),
        ("```console\n$ kvindex config missing.toml\n```", "missing.toml"),
        ("```console\n$ make bnech\n```", "bnech"),
        ("```console\n$ docker compose logs fleet-7\n```", "fleet-7"),
        ("```console\n$ kubectl apply -f deploy/no.yaml\n```", "no.yaml"),
        ("```console\n$ python benchmarks/chaos.py --sede 1\n```", "--sede"),
        ("```console\n$ pip install 'kv-cache-indexer[gprc]'\n```", "gprc"),
        ("```console\n$ vllm serve m --kv-events-config '{\"enabled\": true}'\n```", "enabled"),
        ("```console\n$ echo 'never ends\n```", "does not end"),
        ("```toml\n[http]\nprt = 1\n```", "prt"),
        ("```yaml\nhttp: {port: 70000}\n```", "http.port"),
        ("```yaml\napiVersion: v1\nkind: Pod\nspec: {env: [{name: KVINDEX_HTTP_PRT, value: '1'}]}\n```", "PRT"),
        ("```yaml\n- {pod: a}\n```", "endpoint"),
        (f"```yaml\n{COLLECTOR.replace('[otlp]', '[oltp]')}\n```", "oltp"),
        (f"```yaml\n{COLLECTOR.replace('http', 'grpc')}\n```", "OTLP over HTTP"),
        ("```json\n{,}\n```", "no JSON"),
        ('```json\n{"a": 1}\n{,}\n```', "no JSON"),
        ("```console\n$ kvindex score --no-such https://kvindex:8080 1\n```", "--no-such"),
        ("```cobol\nSTOP RUN\n```", "cobol"),
    ],
)
@NEEDS_TOOLS
@NEEDS_REDIS
def test_what_is_wrong_is_noticed(block, says, world, tmp_path):
    (tmp_path / "scratch").mkdir()
    path = tmp_path / "page.md"
    path.write_text(f"# Page\n\n{block}\n")
    with pytest.raises(Wrong, match=re.escape(says)):
        Reader(world, tmp_path / "scratch").read(read_page(path))


@pytest.mark.parametrize(
    "text", ["kvindex serve --prot 1", "kvindex nothing", "make nothing", "python benchmarks/no.py"]
)
def test_wrong_commands_in_the_text_are_noticed(text):
    with pytest.raises(Wrong):
        check_inline(text)


def test_broken_links_are_noticed(tmp_path):
    (tmp_path / "b.md").write_text("# Two words, `three`\n\n```text\n# no heading\n```\n\n# Two words, three\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[a](b.md) [a](c.md) [a](b.md#two-words-three) [a](b.md#two-words-three-1) [a](b.md#no-heading) [a](#here)\n"
        "`[a](d.md)` [a](https://example.com/) ![p](x.svg)\n\n## Here\n\n```text\n[a](e.md)\n```\n"
    )
    assert broken_links(page) == ["c.md", "b.md#no-heading", "x.svg"]


def test_commands_are_taken_apart(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "```console\n$ a \\\n    b\nout\n$ export X='[1,\n  2]'   # don't\n"
        "$ cat <<END\nx\nEND\n$ Y=1 c 'd e' | f\n```\n"
    )
    (block,) = read_page(page).blocks
    commands = commands_of(block)
    assert [one.text.split()[0] for one in commands] == ["a", "export", "cat", "Y=1"]
    assert [one.output for one in commands] == ["out\n", "", "", ""]
    assert words_of(commands[3].text) == ["c", "d e"]
    assert words_of(commands[0].text) == ["a", "b"]


@pytest.mark.parametrize(
    ("said", "printed", "same"),
    [
        ("a ... c", "a b c", True),
        ('{"a":1}', '{"a":1}\n', True),
        ("a\n...\n", "a\nb\nc\n", True),
        ("a", "ab", False),
        ("...", "", True),
        ("a ... c", "a b", False),
        ("a.c", "abc", False),
    ],
)
def test_outputs_are_compared(said, printed, same):
    assert same_output(said, printed) is same
