"""The programs, run as a person runs them."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from kvindex.errors import UserError
from kvindex.replay import run_replay
from kvindex.score import run_score
from kvindex.serve import _bound, _listen

from .conftest import GOLDEN


def run(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "kvindex", *arguments], capture_output=True, text=True, timeout=90, check=False, **more
    )


@pytest.mark.parametrize(
    "command", ["bench", "demo", "fleet", "record", "replay", "watch", "doctor", "score", "serve", "config"]
)
def test_help_has_an_example(command):
    answer = run(command, "--help")
    assert answer.returncode == 0
    assert f"Example: kvindex {command}" in " ".join(answer.stdout.split())


def test_replay_checks_a_capture():
    duplicates = next(path for path in GOLDEN if path.stem == "duplicates")
    answer = run("replay", str(duplicates), "--check")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "4 of 4 queries equal the engine's own answers" in answer.stdout
    wrong = run("replay", str(duplicates), "--check", "--copies", "set")
    assert wrong.returncode == 1
    assert "the engine" in wrong.stdout


def test_a_missing_core_is_one_line_of_the_log():
    program = "import sys; sys.modules['indexer._native'] = None; from kvindex.cli import main; main()"
    environ = {key: value for key, value in os.environ.items() if key != "KVINDEX_IMPL"}
    command = [sys.executable, "-c", program, "replay", str(GOLDEN[0]), "--check"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True, env=environ)
    (line,) = answer.stderr.splitlines()
    assert json.loads(line)["category"] == "RuntimeWarning"
    assert "ten times slower" in line


def test_the_demo_ends_with_equal_answers():
    answer = run("demo", "--requests", "60", "--seconds", "1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "the index and the engines agree" in answer.stdout
    assert "round robin" in answer.stdout


def test_a_fleet_keeps_a_question_that_can_be_asked(tmp_path):
    fleet = ["fleet", "--pods", "1", "--base-port", "0", "--wait-subscribers", "0", "--rate", "200", "--seconds", "0.5"]
    file = tmp_path / "question.json"
    assert run(*fleet, "--question", str(file)).returncode == 0
    asked = json.loads(file.read_text())
    assert asked["model"] == "demo/model"
    assert asked["token_ids"]
    assert list(tmp_path.iterdir()) == [file]
    answer = run(*fleet, "--question", str(tmp_path / "none" / "question.json"))
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1), answer.stderr
    assert "--question" in answer.stderr


def test_a_fleet_beside_a_service_agrees():
    environ = {key: value for key, value in os.environ.items() if not key.startswith("KVINDEX_")}
    options = ["--pods", "3", "--base-port", "0", "--json", "--seconds", "3", "--every", "1", "--num-blocks", "600"]
    dialects = ["--dialect", "vllm-map", "--dialect", "sglang", "--check"]
    fleet = [sys.executable, "-m", "kvindex", "fleet", *options, *dialects]
    service = [sys.executable, "-m", "kvindex", "serve"]
    port = _free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*fleet, f"http://127.0.0.1:{port}"], **pipes) as pods:
        listed = pods.stdout.readline()
        assert len(json.loads(listed)) == 3
        environ |= {"KVINDEX_PODS": listed, "KVINDEX_HTTP_PORT": str(port)}
        with subprocess.Popen(service, env=environ, stderr=subprocess.PIPE, text=True) as serving:
            _, output = pods.communicate(timeout=90)
            serving.terminate()
            _, log = serving.communicate(timeout=30)
    assert pods.returncode == 0, output + log
    assert output.count("equal") >= 2, output
    assert serving.returncode == 0, log
    assert '"stopped"' in log
    assert "Traceback" not in log


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["replay", "nowhere.jsonl"], "nowhere.jsonl"),
        (["replay", __file__], "line 1"),
        (["watch", "nonsense"], "nonsense"),
        (["fleet", "--dialect", "klingon"], "klingon"),
        (["score", "--url", "http://127.0.0.1:9", "1"], "http://127.0.0.1:9"),
        (["serve", "--config", "nowhere.toml"], "nowhere.toml"),
        (["serve", "--port", "70000"], "http.port"),
    ],
)
def test_what_a_person_does_wrong_is_one_line(arguments, says, tmp_path):
    answer = run(*arguments, cwd=Path(__file__).parents[1])
    assert answer.returncode == 2
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr


META = '{"kind": "meta", "pod": "p", "model": "m", "block_size": 4}'
QUERY = '{"kind": "query", "tokens": [1], "hit_blocks": 0, "engine_hit_blocks": 0}'


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([QUERY], "no line of kind meta"),
        ([META], "no queries"),
        ([META.replace("4", '"x"'), QUERY], "line 1: meta: Expected `int`"),
        ([META, '{"kind": "query", "tokens": [1]}'], "line 2: query: Object missing required field `hit_blocks`"),
        ([META, QUERY.replace("[1]", "[-1]")], "line 2: query"),
        ([META, '{"kind": "mesage"}', QUERY], "line 2: kind 'mesage'"),
        ([META, '{"kind": "message", "topic": "t", "seq": -1, "payload": ""}', QUERY], "line 2"),
    ],
)
def test_a_capture_that_cannot_be_checked_is_refused_by_the_line(tmp_path, lines, says):
    file = tmp_path / "capture.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=re.escape(says)):
        run_replay([file], check=True)


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("content", [b"[]", b"{}", b'"x"', b'{"matches":[1]}', b"<html>"])
def test_what_is_no_score_is_refused(monkeypatch, status, content):
    monkeypatch.setattr(httpx.Client, "post", lambda *_, **__: httpx.Response(status, content=content))
    with pytest.raises(UserError, match="http://elsewhere"):
        run_score("http://elsewhere", {"model": "m", "token_ids": [1]}, raw=False)


def test_a_port_that_somebody_else_was_quicker_to_listen_at_is_one_line():
    one, other = _bound("127.0.0.1", 0), None
    try:
        other = _bound("127.0.0.1", one.getsockname()[1])
        one.listen()
        with pytest.raises(UserError, match="choose another with --port"):
            _listen(other)
    finally:
        one.close()
        if other is not None:
            other.close()
