"""Recording, and playing what was recorded."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from kvevents import Heard, LinkChange, Listener, Recorder, RecordingError, SubscriptionError, ask_replay
from kvevents.testing import Publisher, stored
from kvindex.errors import UserError
from kvindex.reach import Reach
from kvindex.record import pods_of, run_record
from kvindex.replay import run_replay

LOCAL = "tcp://127.0.0.1:0"


def heard(seq, payload=b"\x93\x01\x90\x00", topic=b"kv@pod-a@m"):
    return Heard("tcp://there", [topic, seq.to_bytes(8, "big"), payload], 1000.0 + seq)


def lines_of(path):
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_what_is_written_is_what_was_heard(tmp_path):
    with Recorder(tmp_path, pods={"tcp://there": "pod-x"}) as recorder:
        recorder.write(heard(7, b"\x00\xff"))
        recorder.write(heard(8, topic=b"\xff\xfe"))
        recorder.write(Heard("tcp://there", [b"", b"short", b""], 0.0))
        assert [path.suffix for path in recorder.files] == [".part"]
    (path,) = recorder.files
    meta, first, second = lines_of(path)
    assert path.name.endswith(".jsonl.gz")
    assert (meta["kind"], recorder.recorded, recorder.skipped) == ("meta", 2, 1)
    assert first == {
        "kind": "message",
        "topic": "kv@pod-a@m",
        "seq": 7,
        "arrival": 1007.0,
        "endpoint": "tcp://there",
        "pod": "pod-x",
        "payload": "00ff",
    }
    assert (second["topic_hex"], "topic" in second) == ("fffe", False)


def test_files_rotate_and_all_together_stay_within_their_bound(tmp_path):
    with Recorder(tmp_path, max_file_bytes=100_000, max_total_bytes=400_000) as recorder:
        for seq in range(20):
            recorder.write(heard(seq, os.urandom(70_000)))
        assert sum(path.stat().st_size for path in recorder.files) <= 400_000
    kept = [line["seq"] for path in recorder.files for line in lines_of(path) if line["kind"] == "message"]
    assert recorder.deleted > 0
    assert kept == list(range(kept[0], 20))  # the oldest went, whole files, and nothing of the rest
    assert len({path.name for path in recorder.files}) == len(recorder.files)


def test_a_crash_leaves_what_was_flushed(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.write(heard(0))
    recorder.flush()
    (path,) = recorder.files
    with gzip.open(path, "rt") as file:
        assert [json.loads(file.readline())["kind"] for _ in range(2)] == ["meta", "message"]
    recorder.close()
    recorder.close()


def test_bounds_folders_and_endpoints_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(RecordingError, match="in all"):
        Recorder(tmp_path, max_file_bytes=10, max_total_bytes=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="folder"):
        Recorder(tmp_path / "file")
    with pytest.raises(UserError, match="twice"):
        pods_of(["a=tcp://x", "tcp://x"])
    with pytest.raises(SubscriptionError, match="nonsense"):
        Listener(["nonsense"])
    with pytest.raises(SubscriptionError, match="nonsense"):
        ask_replay("nonsense")


def test_a_recording_of_real_sockets_can_be_replayed(tmp_path, capsys):
    with Publisher(LOCAL, topic=b"kv@pod-a@m") as publisher, Publisher(LOCAL) as silent:
        stop = threading.Event()
        arguments = {"topic": "", "seconds": 0.0, "max_file_bytes": 10**6, "max_total_bytes": 10**7, "stop": stop}
        endpoints = [publisher.endpoint, f"pod-b={silent.endpoint}"]
        thread = threading.Thread(target=run_record, args=(endpoints, tmp_path), kwargs=arguments)
        thread.start()
        for number, one in enumerate((publisher, silent)):
            one.wait_for_subscribers()
            one.publish([stored("vllm-map", [1 + number], None, range(16), 16)])
        # nothing tells when it is on disk but the file itself
        (path,) = iter_until(lambda: [p for p in tmp_path.glob("*.part") if count_flushed(p) == 2], thread)
        stop.set()
        thread.join()
    assert run_replay([path.with_name(path.name.removesuffix(".part"))], model="m") == 0
    said = capsys.readouterr().out
    assert "2 messages, 2 events, 0 gaps" in said
    assert "pod-a" in said
    assert "pod-b" in said


def test_a_disk_that_is_full_is_said_whenever_that_shows(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    for flush in ("flush", "tick"):
        recorder = Recorder(tmp_path)
        recorder.write(heard(0))
        recorder.flush()
        recorder.write(heard(1))
        monkeypatch.setattr(recorder, "_flush_at", 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(recorder, "_file", SimpleNamespace(flush=full, write=len, close=full))
            with pytest.raises(RecordingError, match=r"No space left.*2 messages recorded; make room"):
                getattr(recorder, flush)()
        recorder.close()


def test_what_becomes_of_connections_is_said_once():
    reach = Reach("kv@", 0.0)

    def said(*events):
        return [text for event in events if (text := reach.change(LinkChange("e", event, 0.0)))]

    assert said("refused", "refused", "reached") == ["e: nobody listens there yet; trying on"]
    assert said("reached", "lost", "refused", "mismatched") == [
        "e: something else than a publisher listens there: the replay socket's port, or HTTP's?"
    ]
    assert said("agreed") == ["e: connected"]
    assert (reach.quiet(9.0), len(reach.quiet(10.0)), reach.quiet(11.0)) == ([], 1, [])
    assert said("lost", "refused", "lost") == ["e: the connection ended; trying on"]
    assert said("agreed", "lost") == ["e: connected", "e: the connection ended; trying on"]
    heard_of = Reach("", 0.0)
    heard_of.change(LinkChange("e", "agreed", 0.0))
    heard_of.heard("e")
    assert heard_of.quiet(10.0) == []


def iter_until(look, thread):
    pause = threading.Event()
    for _ in range(1000):
        found = look()
        if found:
            return found
        assert thread.is_alive()
        pause.wait(0.01)
    raise AssertionError("it never came")


def count_flushed(path):
    found = 0
    try:
        with gzip.open(path, "rt") as file:
            for line in file:
                found += '"kind":"message"' in line
    except EOFError:
        pass
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_completes_the_last_file(tmp_path, number):
    with Publisher(LOCAL, topic=b"kv@pod-a@m") as publisher:
        command = [sys.executable, "-m", "kvindex", "record", publisher.endpoint, "--folder", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            publisher.wait_for_subscribers(timeout=30.0)
            publisher.publish([stored("vllm-map", [1], None, range(16), 16)])
            pause = threading.Event()
            for _ in range(1000):
                if any(count_flushed(path) for path in tmp_path.glob("*.part")):
                    break
                pause.wait(0.01)
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "1 messages recorded" in out
    (path,) = tmp_path.iterdir()
    assert [line["kind"] for line in lines_of(path)] == ["meta", "message"]


def test_a_replay_is_asked_for_and_its_depth_is_told():
    with Publisher(LOCAL, replay=LOCAL, topic=b"kv@a@m", buffer_steps=3) as publisher:
        for number in range(5):
            publisher.publish([stored("vllm-map", [number + 1], None, range(16), 16)])
        answer = ask_replay(publisher.replay)
        assert (answer.received, answer.first, answer.last, answer.is_complete) == (3, 2, 4, True)
        publisher.framing = "old"
        assert ask_replay(publisher.replay, 4, keep=0)[:4] == ([], 1, 4, 4)
        silent = ask_replay(publisher.endpoint, timeout=0.2)  # what publishes answers nobody
    assert (silent.received, silent.is_complete) == (0, False)
