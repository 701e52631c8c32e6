"""Captures from disk: whole, rotated, cut off, broken, and made to do harm."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc

import msgspec
import pytest

from kvevents import Heard, Recorder
from kvevents.testing import Publisher, stored
from kvindex import captures
from kvindex.captures import Capture
from kvindex.errors import UserError
from kvindex.replay import run_replay

from .test_recording import count_flushed, iter_until

LINE = {"kind": "message", "topic": "kv@pod-a@m", "payload": "93cb000000000000000090c0"}


def text_of(*seqs):
    return "".join(json.dumps(LINE | {"seq": seq}) + "\n" for seq in seqs).encode()


def seqs_of(*files):
    return [message.seq for _, message in Capture(files).messages()]


def refusal_of(file, **options):
    with pytest.raises(UserError) as refused:
        run_replay([file], **options)
    assert str(file) in str(refused.value)
    return str(refused.value)


def test_files_are_read_in_their_order_and_packed_ones_by_what_is_in_them(tmp_path):
    plain, packed = tmp_path / "a.gz", tmp_path / "b.jsonl"
    plain.write_bytes(text_of(0, 1))
    packed.write_bytes(gzip.compress(text_of(2, 3)))
    assert seqs_of(plain, packed) == [0, 1, 2, 3]


def test_a_rotated_recording_replays_as_one(tmp_path, capsys):
    with Recorder(tmp_path, max_file_bytes=100_000, max_total_bytes=10**7) as recorder:
        for seq in range(6):
            event = stored("vllm-map", [seq + 1], seq or None, range(16), 16) | {"padding": os.urandom(60_000).hex()}
            payload = b"\x93\xcb" + bytes(8) + b"\x91" + msgspec.msgpack.encode(event) + b"\x00"
            recorder.write(Heard("tcp://x", [b"kv@pod-a@m", seq.to_bytes(8, "big"), payload], 1.0))
    assert len(recorder.written) > 2
    for files in (recorder.written, [tmp_path]):
        assert run_replay(files) == 0
        assert "6 messages, 6 events, 0 gaps" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert "no captures" in refusal_of(tmp_path / "empty")


@pytest.mark.parametrize("cut", [1, 9, 25])
def test_what_is_whole_of_a_cut_off_file_is_taken_and_that_is_said(tmp_path, capsys, cut):
    recorder = Recorder(tmp_path)
    for seq in range(5):
        recorder.write(Heard("tcp://x", [b"kv@pod-a@m", seq.to_bytes(8, "big"), b"\x93\x01\x90\x00"], 1.0))
        recorder.flush()
    (part,) = recorder.files
    part.write_bytes(part.read_bytes()[:-cut])
    assert run_replay([part]) == 0
    said = capsys.readouterr()
    taken = len(seqs_of(part))
    assert 2 <= taken <= 5
    assert f"{taken} messages" in said.out
    assert said.err.count(f"ends in the middle, as when its recorder was killed; its {taken + 1} whole lines") == 1


def test_a_killed_recorder_leaves_what_can_be_replayed(tmp_path):
    with Publisher("tcp://127.0.0.1:0", topic=b"kv@pod-a@m") as publisher:
        command = [sys.executable, "-m", "kvindex", "record", publisher.endpoint, "--folder", str(tmp_path)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            publisher.wait_for_subscribers(timeout=30.0)
            for number in range(3):
                publisher.publish([stored("vllm-map", [number + 1], number or None, range(16), 16)])
            alive = threading.Thread(target=process.wait)
            alive.start()
            (part,) = iter_until(lambda: [p for p in tmp_path.glob("*.part") if count_flushed(p) == 3], alive)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            alive.join()
    answer = subprocess.run(
        [sys.executable, "-m", "kvindex", "replay", str(part)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (answer.returncode, "3 messages, 3 events, 0 gaps" in answer.stdout) == (0, True), answer
    assert "ends in the middle" in answer.stderr


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\n", b"[" * 100_000, b'{"kind": ["x"]}', b'{"kind": "x"}'])
def test_lines_that_are_none_are_refused_by_their_number(tmp_path, content):
    file = tmp_path / "c.jsonl"
    file.write_bytes(text_of(0) + content)
    assert "line 2: " in refusal_of(file)


@pytest.mark.parametrize(
    "wrong",
    [{"seq": -1}, {"seq": 2**64}, {"seq": 1e400}, {"seq": None}, {"payload": "xy"}, {"payload": 5}, {"topic_hex": 1}],
)
def test_messages_that_are_none_are_refused_by_their_number(tmp_path, wrong):
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"kind": "meta"}) + "\n" + json.dumps(LINE | {"seq": 0} | wrong))
    assert "line 2" in refusal_of(file)


def test_damage_in_the_middle_is_refused(tmp_path):
    file = tmp_path / "c.gz"
    data = bytearray(
        gzip.compress(
            b"".join(json.dumps(LINE | {"seq": n, "x": os.urandom(64).hex()}).encode() + b"\n" for n in range(500))
        )
    )
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    file.write_bytes(data)
    refusal_of(file)
    assert "cannot be read" in refusal_of(tmp_path / "missing")


def test_a_line_without_an_end_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(captures, "MAX_LINE_BYTES", 1_000_000)
    file = tmp_path / "bomb.gz"
    file.write_bytes(gzip.compress(bytes(100_000_000), 1))
    tracemalloc.start()
    try:
        assert "longer than 1000000 bytes" in refusal_of(file)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_many_lines_take_no_memory(tmp_path, capsys):
    file = tmp_path / "many.gz"
    file.write_bytes(
        gzip.compress(json.dumps({"kind": "resident", "x": "y" * 10_000}).encode().join([b"", b"\n"]) * 8_000, 1)
    )
    tracemalloc.start()
    try:
        assert run_replay([file]) == 0
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert "0 messages" in capsys.readouterr().out
