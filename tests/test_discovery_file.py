"""Pods of a file."""

import pytest

from kvevents import DiscoveryError
from kvevents.discovery import FileDiscovery

from .conftest import Followed, until
from .discovering import following


def test_a_file_is_followed_through_every_change(tmp_path):
    file, followed = tmp_path / "pods.yaml", Followed()
    with following(followed, FileDiscovery(file, interval_s=0.005)) as follower:
        until(lambda: follower.stats()["errors_total"])
        file.write_text("- {pod: a, endpoint: 'tcp://h:1', uid: '1'}\n- {pod: b, endpoint: 'tcp://h:2', uid: '1'}\n")
        until(lambda: set(followed.pods) == {"a", "b"})
        for broken in (
            "",
            "- {pod: a, endpoint",
            "pods:\n- {pod: a}",
            "x: 1",
            "3",
            "- {pod: a, unknown: 1}",
            "[" * 5000,
        ):
            errors = follower.stats()["errors_total"]
            file.write_text(broken)
            until(lambda errors=errors: follower.stats()["errors_total"] > errors + 1)
            assert set(followed.pods) == {"a", "b"}
        file.unlink()
        # another address, and a link as Kubernetes swaps those of a ConfigMap
        (tmp_path / "new").write_text(
            "pods:\n- {pod: a, endpoint: 'tcp://h:1', uid: '1'}\n- {pod: b, endpoint: 'tcp://h:3'}"
        )
        file.symlink_to(tmp_path / "new")
        until(lambda: followed.pods["b"].endpoints[0].endpoint == "tcp://h:3")
        assert followed.changes("a") == ["+1"]
        (tmp_path / "new").write_text("[]")
        until(lambda: not followed.pods)


LEVELS = "\n".join(f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))
MERGES = "\n".join(f"- &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 9))
ENDS = "- &e [" + ", ".join(["{endpoint: 'tcp://h:1'}"] * 1_000) + "]"
RANKS = "\n".join(f"- {{pod: p{n}, endpoints: *e}}" for n in range(2_000))


@pytest.mark.parametrize(
    "text",
    [f"- &a0 [1, 2]\n{LEVELS}", f"- &m0 {{pod: x, endpoint: 'tcp://h:1'}}\n{MERGES}", f"{ENDS}\n{RANKS}"],
    ids=["aliases", "merges", "endpoints"],
)
def test_a_file_that_says_little_and_means_much_is_refused(tmp_path, text):
    path = tmp_path / "pods.yaml"
    path.write_text(text)
    with pytest.raises(DiscoveryError, match="more than 1000000 values, aliases included"):
        FileDiscovery(path, interval_s=1.0).read()


def test_a_file_may_use_aliases_and_itself_is_none(tmp_path):
    path = tmp_path / "pods.yaml"
    path.write_text("- &a {pod: a, endpoint: 'tcp://h:1', model: m}\n- {<<: *a, pod: b}\n")
    assert [(found.name, found.endpoints[0].model) for found in FileDiscovery(path, interval_s=1.0).read()] == [
        ("a", "m"),
        ("b", "m"),
    ]
    for text in ("&a [*a]", "[" * 50_000, "- " + "9" * 10_000, "[]]"):
        path.write_text(text)
        with pytest.raises(DiscoveryError, match="pods"):
            FileDiscovery(path, interval_s=1.0).read()


def test_a_file_may_be_json_and_is_worked_out_once(tmp_path, monkeypatch):
    path = tmp_path / "pods.json"
    source = FileDiscovery(path, interval_s=1.0)
    path.write_text('[{"pod": "a", "endpoint": "tcp://h:1"}]')
    first = source.read()
    monkeypatch.setattr(source, "_parse", None)
    assert source.read() is first
    monkeypatch.undo()
    for text in ("[{]", '"\\ud800"', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(DiscoveryError, match="pods"):
            source.read()


def test_a_file_may_be_toml(tmp_path):
    file = tmp_path / "pods.toml"
    file.write_text('[[pods]]\npod = "a"\nendpoint = "tcp://h:1"\nranks = 2\n')
    (found,) = FileDiscovery(file, interval_s=1).read()
    assert [one.endpoint for one in found.endpoints] == ["tcp://h:1", "tcp://h:2"]
    file.write_bytes(b"\xff")
    with pytest.raises(DiscoveryError):
        FileDiscovery(file, interval_s=1).read()
