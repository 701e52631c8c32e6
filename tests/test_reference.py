"""What `kvindex config` says of the schema, compared with the schema and with what `load` takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvindex import reference
from kvindex.config import Config, load, variables
from kvindex.errors import ConfigError

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
FILE = """
[index]
url = "redis://someone:pass@word@redis:6379/0"
[tokenizers]
remote_api_key = "sk-1"
folders = ["/models"]
[tokenizers.models."a/b"]
content_format = "openai"
[tracing.headers]
x-scope = "sk-2"
[[pods]]
pod = "a"
endpoint = "tcp://h:5557"
[[discovery.dns]]
name = "vllm"
"""


def run(*arguments, environ=None):
    command = [sys.executable, "-m", "kvindex", "config", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)


def test_the_page_is_what_the_schema_says():
    assert PAGE.read_text() == run("--reference").stdout, "run `make reference`"


def test_every_variable_is_on_the_page_and_no_other():
    named = set(re.findall(r"`(KVINDEX_\w+)`", PAGE.read_text())) - {"KVINDEX_CONFIG"}
    assert named == set(variables())


def test_every_key_says_what_it_is_for():
    bare = [f"{section.heading} {key.name}" for section in reference.sections() for key in section.keys if not key.text]
    assert bare == []


def test_bounds_on_the_page_are_those_that_hold():
    tried = 0
    for section in reference.sections():
        for key in section.keys:
            found = re.fullmatch(r"(?:integer|number), ([\d,.]+) to ([\d,.]+)", key.takes)
            if not found or section.repeated:
                continue
            low, high = (float(text.replace(",", "")) for text in found.groups())
            for value, fits in ((low, True), (high, True), (low - 1, False), (high + 1, False)):
                text = f"{value:g}" if "number" in key.takes else str(int(value))
                tried += 1
                if fits:
                    load(None, {key.variable: text})
                else:
                    with pytest.raises(ConfigError, match=key.name):
                        load(None, {key.variable: text})
    assert tried >= 20


def test_the_example_is_the_default(tmp_path):
    file = tmp_path / "kvindex.toml"
    file.write_text(run("--example").stdout)
    assert load(file, {}) == Config()
    # and so it is with all that is commented out, but for what has no default and the lists
    text = re.sub(r"^# (\w+ = .+)$", r"\1", file.read_text(), flags=re.MULTILINE)
    assert text.count("\n") > 100
    assert len(re.findall(r"^\w+ = ", text, re.MULTILINE)) > 40
    file.write_text(text)
    assert load(file, {}) == Config()


def test_what_is_in_effect_can_be_read_again(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(FILE.replace("someone:pass@word@", "").replace("sk-1", "").replace("sk-2", ""))
    again = tmp_path / "again.yaml"
    again.write_text(reference.effective(load(file, {"KVINDEX_HTTP_PORT": "9000"})))
    assert load(again, {}) == load(file, {"KVINDEX_HTTP_PORT": "9000"})


def test_secrets_are_not_shown(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(FILE)
    answer = run(file)
    assert answer.returncode == 0, answer.stderr
    assert not re.search("pass|word|sk-", answer.stdout), answer.stdout
    assert "redis://someone:***@redis:6379/0" in answer.stdout


def test_a_bad_file_is_one_line_and_status_2(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[http]\nport = 70000\n")
    answer = run(file)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("kvindex: http.port: ")
    assert answer.stderr.count("\n") == 1
