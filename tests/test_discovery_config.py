"""Discovery as it is configured."""

from pathlib import Path

import pytest

from kvindex.config import load
from kvindex.errors import ConfigError
from kvindex.pods import sources_of


def test_discovery_is_configured_by_file_and_environment(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(
        """
        [discovery]
        identity = "ip:port"
        interval = 2
        file = "pods.yaml"
        [[discovery.dns]]
        name = "vllm"
        ranks = [8, 9]
        [[discovery.kubernetes]]
        label_selector = "app=vllm"
        [[discovery.sglang]]
        url = "http://10.0.0.7:30000"
        """
    )
    config = load(file, {"KVINDEX_DISCOVERY_DNS": '[{"name": "other"}]', "KVINDEX_DISCOVERY_INTERVAL": "3"})
    assert (config.discovery.interval, config.discovery.identity) == (3.0, "ip:port")
    labels = [source.label for source in sources_of(config.discovery)]
    assert labels == [
        "file pods.yaml",
        "dns other",
        "kubernetes (own namespace) app=vllm",
        "sglang http://10.0.0.7:30000",
    ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("DNS", '[{"name": "a", "port": 70000}]', r"discovery\.dns\[0?.*\]\.port|discovery\.dns"),
        ("DNS", '[{"name": "a", "port": 65535, "ranks": 2}]', "65535"),
        ("DNS", '[{"name": "a", "replay_port": 5558, "ranks": 2}]', "another rank"),
        ("KUBERNETES", '[{"namespace": "a"}]', "label_selector"),
        ("SGLANG", '[{"url": "10.0.0.7"}]', "url"),
        ("IDENTITY", "uid", "identity"),
        ("INTERVAL", "0", "interval"),
    ],
)
def test_bad_discovery_is_refused_with_the_keys_path(name, text, says):
    with pytest.raises(ConfigError, match=says):
        load(None, {f"KVINDEX_DISCOVERY_{name}": text})


def test_the_examples_of_the_page_are_valid(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "discovery.md").read_text()
    examples = [part.partition("```")[0] for part in page.split("```toml\n")[1:]]
    assert examples
    for example in examples:
        file = tmp_path / "c.toml"
        file.write_text(example)
        assert load(file, {}) != load(None, {})
