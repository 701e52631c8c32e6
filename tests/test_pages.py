"""The commands of the pages, as they are printed there, against pods that are really there."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from kvevents.testing import Publisher, stored

from .conftest import until
from .test_doctor import engine  # noqa: F401  (a fixture)

DOCS = Path(__file__).parents[1] / "docs"
LOCAL = "tcp://127.0.0.1:0"


def commands(page, program):
    """All commands of a page that begin with a program."""
    text = (DOCS / page).read_text()
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [line.removeprefix("$ ") for line in blocks.splitlines() if line.startswith(f"$ {program} ")]


def written(command, **places):
    """A command with the places of the page exchanged for those that there are here."""
    for name, place in places.items():
        assert name in command, (name, command)
        command = command.replace(name, place)
    first, *rest = shlex.split(command)
    return ([sys.executable, "-m", first] if first == "kvindex" else [first]) + rest


@pytest.fixture
def publisher():
    with Publisher(LOCAL, replay=LOCAL, topic=b"kv@10.0.0.7:8000@Qwen/Qwen3-8B") as publisher:
        yield publisher


def say(publisher):
    number = publisher.last_seq + 1
    publisher.publish([stored("vllm-map", [number + 1], number or None, range(16), 16)])


@pytest.fixture
def service(request):
    environ = os.environ | getattr(request, "param", {})
    command = [sys.executable, "-m", "kvindex", "serve", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        yield next(json.loads(line)["url"] for line in process.stderr if '"serving"' in line)
        process.terminate()
        process.stderr.read()


def test_the_doctor_as_it_is_printed(publisher, engine):  # noqa: F811
    (command,) = commands("doctor.md", "kvindex doctor")
    places = {"tcp://10.0.0.7:5557": publisher.endpoint, "tcp://10.0.0.7:5558": publisher.replay}
    say(publisher)
    arguments = written(command, **places, **{"http://10.0.0.7:8000": engine})
    answer = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (answer.returncode, answer.stdout.count("  ok ")) == (0, 8), answer
    assert "10.0.0.7:8000, as the router spells it" in answer.stdout


def test_record_and_replay_as_they_are_printed(publisher, tmp_path):
    (record,) = commands("doctor.md", "kvindex record")
    (replay,) = commands("doctor.md", "kvindex replay")
    process = subprocess.Popen(
        written(record, **{"tcp://10.0.0.7:5557": publisher.endpoint}),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    publisher.wait_for_subscribers(timeout=30.0)
    say(publisher)
    until(lambda: any(path.stat().st_size > 200 for path in tmp_path.glob("captures/*.part")))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, "1 messages recorded" in out, ": connected" in err) == (0, True, True)
    (path,) = (tmp_path / "captures").iterdir()
    arguments = written(replay, **{"captures/*.jsonl.gz": f"captures/{path.name}"})
    with subprocess.Popen(
        [*arguments, "--base-port", "0", "--hold", "0"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        pod, _, endpoint = process.stdout.readline().partition(": ")
        assert pod == "vllm-0"
        watch = [sys.executable, "-m", "kvindex", "watch", endpoint.split(",")[0], "--seconds", "20"]
        watching = subprocess.Popen(watch, stdout=subprocess.PIPE, text=True)
        said = process.stdout.read()
    until(lambda: "1 stored" in watching.stdout.readline())
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 0
    watching.stdout.close()
    assert "1 of 1 messages played" in said


def test_watch_as_it_is_printed(service):
    (command,) = commands("doctor.md", "kvindex watch")
    arguments = written(command, **{"http://127.0.0.1:8080": service})
    answer = subprocess.run([*arguments, "--seconds", "0.1"], capture_output=True, text=True, timeout=60, check=False)
    assert (answer.returncode, "no pod has said anything yet" in answer.stdout) == (0, True)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_registering_as_it_is_printed(service):
    put, delete = commands("discovery.md", "curl")
    place = service.removeprefix("http://")
    for command, status in ((put, "201"), (put, "204"), (delete, "204"), (delete, "404")):
        arguments = [*written(command, **{"localhost:8080": place}), "-s", "-o", os.devnull, "-w", "%{http_code}"]
        assert subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False).stdout == status


def exports():
    said = (part.partition("=") for command in commands("discovery.md", "export") for part in shlex.split(command)[1:])
    return {name: value for name, _, value in said}


@pytest.mark.parametrize("service", [exports()], indirect=True)
def test_the_environment_as_it_is_printed(service):
    assert exports().keys() == {"KVINDEX_DISCOVERY_IDENTITY", "KVINDEX_DISCOVERY_KUBERNETES"}
    answer = httpx.get(f"{service}/readyz")
    assert answer.status_code == 503  # there is no Kubernetes here
    assert answer.json()["not_answered"] == ["kubernetes (own namespace) app=vllm"]


def test_a_service_that_goes_away_and_comes_back_is_watched_on(tmp_path):
    serve = [sys.executable, "-m", "kvindex", "serve", "--port"]
    said: list[str] = []

    def begin(port):
        process = subprocess.Popen([*serve, port], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return process, next(json.loads(line)["url"] for line in process.stderr if '"serving"' in line)

    def end(process):
        process.terminate()
        process.stderr.read()
        process.wait()
        process.stderr.close()

    process, url = begin("0")
    watch = [sys.executable, "-m", "kvindex", "watch", "--url", url, "--every", "0.1"]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watching:
        reader = threading.Thread(target=lambda: said.extend(watching.stdout))
        reader.start()
        until(lambda: any("no pod" in line for line in list(said)))
        end(process)
        until(lambda: "no answer" in said[-1])
        process, _ = begin(url.rpartition(":")[2])
        until(lambda: "no pod" in said[-1])
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0
        reader.join()
    end(process)
