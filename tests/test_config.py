"""The configuration, and every way to get it wrong."""

import pytest

from kvindex.config import Config, load
from kvindex.errors import ConfigError

TOML = """
[pool]
workers = 2
[[pods]]
pod = "a"
endpoint = "tcp://h:5557"
[scorer]
tier_weights = { cpu = 0.5 }
"""


def test_file_and_environment(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(TOML)
    environ = {"KVINDEX_HTTP_PORT": "9000", "KVINDEX_POOL_WORKERS": "3", "KVINDEX_INDEX_MAX_BYTES": "2000000"}
    config = load(file, environ | {"OTHER": "x", "KVINDEX_IMPL": "python"})
    assert (config.http.port, config.pool.workers, config.pods[0].pod) == (9000, 3, "a")
    assert (config.index.max_bytes, Config().index.max_bytes) == (2_000_000, None)
    assert config.scorer.tier_weights == {"cpu": 0.5}
    yaml = tmp_path / "c.yaml"
    yaml.write_text(
        "pool: {workers: 2}\npods:\n- {pod: a, endpoint: 'tcp://h:5557'}\nscorer: {tier_weights: {cpu: 0.5}}\n"
    )
    assert load(yaml, {}) == load(file, {})
    assert load(None, {}) == Config()


def test_lists_and_maps_are_json_in_the_environment():
    config = load(
        None, {"KVINDEX_PODS": '[{"pod":"b","endpoint":"tcp://x:1"}]', "KVINDEX_SCORER_TIER_WEIGHTS": '{"gpu":2}'}
    )
    assert config.pods[0].pod == "b"
    assert config.scorer.tier_weights == {"gpu": 2.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[htp]\nport=1", "htp"),
        ("[http]\nprt=1", "http"),
        ("[http]\nport='x'", "http.port"),
        ("[http]\nport=70000", "http.port"),
        ("[pool]\nworkers=0", "pool.workers"),
        ("[[pods]]\npod='a'", "endpoint"),
        ("[pool]\ncopies='x'", "pool.copies"),
        ("[index]\nmax_bytes=1000", "index.max_bytes"),
        ("[scorer]\ntier_weights={gpu=-1}", "scorer.tier_weights"),
        ("[scorer]\ntier_weights={gpu=inf}", "scorer.tier_weights"),
        ("nonsense", "c.toml"),
    ],
)
def test_bad_files_are_refused_with_the_keys_path(tmp_path, text, says):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        load(file, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KVINDEX_HTP_PORT", "1"),
        ("KVINDEX_HTTP_PRT", "1"),
        ("KVINDEX_HTTP_PORT", "x"),
        ("KVINDEX_PODS", "["),
        ("KVINDEX_HTTP", "1"),
    ],
)
def test_bad_variables_are_refused(name, value):
    with pytest.raises(ConfigError, match=r"http\.port|KVINDEX"):
        load(None, {name: value})


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        load(tmp_path / "nowhere.toml", {})
