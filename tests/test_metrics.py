"""What a service really exposes, against what the dashboard asks for and what the documentation says of it."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from litestar.testing import TestClient
from prometheus_client.parser import text_string_to_metric_families

from indexer import open_index
from indexer.redis import standing
from kvevents import EventPool, Message, trust
from kvindex.access import Access
from kvindex.config import TlsConfig, TracingConfig
from kvindex.gate import Gate
from kvindex.http import create_app
from kvindex.meanings import meaning_of
from kvindex.renewal import Renewal
from kvindex.spans import Spans
from kvindex.tls import open_tls
from scorer import PrefixScorer, PrefixStore, Prompts

from .conftest import MODEL, payload
from .test_access import Certificates

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "deploy/grafana/kvindex.json").read_text())
OPERATIONS = (ROOT / "docs/operations.md").read_text()
ALERTS = ROOT / "deploy/prometheus/kvindex-alerts.yaml"
TOKENS = list(range(40))
ADDED_BY_PROMETHEUS = {"instance", "job"}


def ask(client, route, **body):
    answer = client.post(f"/v1/{route}", json={"model": MODEL, "token_ids": TOKENS} | body)
    assert answer.status_code == 200, answer.text


def scrape(client):
    """Every sample as name -> label names -> value."""
    text = client.get("/metrics").text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples], text


def message(pod, seq, *events, rank=0):
    return Message(f"kv@{pod}@{MODEL}".encode(), seq, payload(*events, rank=rank))


STORED = ["BlockStored", [1, 2], None, TOKENS[:32], 16, None]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A service that has seen all that has a metric of its own: two pods, a gap, a bad message, questions, answers."""
    index = open_index()
    with EventPool(index) as pool, Prompts(store=PrefixStore(1 << 20)) as prompts:
        pool.subscribe("pod-c", "tcp://127.0.0.1:1", model=MODEL)
        pool.submit(message("pod-a", 0, STORED))
        pool.submit(message("pod-b", 0, STORED, rank=1))
        pool.submit(message("pod-b", 5, ["BlockRemoved", [2]], rank=1))
        pool.submit(Message(b"kv@pod-b@m", 6, b"\xc1"))
        pool.drain()
        access = Access()
        shown = Certificates(tmp_path_factory.mktemp("certificates"))
        tls = open_tls(TlsConfig(cert=str(shown.cert), key=str(shown.key)))
        spans = Spans(TracingConfig(endpoint="http://127.0.0.1:1"))
        app = create_app(
            PrefixScorer(index, prompts=prompts),
            index,
            pool,
            max_tokens=100,
            max_body_bytes=4096,
            collectors=[
                access,
                Gate(access, max_under_way=1, max_bytes_under_way=1),
                Renewal({"tls": lambda: False}),
                tls,
                spans,
            ],
        )
        with TestClient(app) as opened:
            ask(opened, "score")
            ask(opened, "routed", pod="pod-a")
            ask(opened, "observe", pod="pod-a", cached_tokens=32)
            yield opened
        spans.close()


@pytest.fixture(scope="module")
def exposed(client):
    """Label names by sample name; for Redis the names alone, as it need not be there for them."""
    labels = {}
    for sample in scrape(client)[0]:
        labels.setdefault(sample.name, set()).update(sample.labels)
    index = open_index("redis://127.0.0.1:1/0")
    for name in index.stats():
        labels.setdefault(f"kvindex_index_{name}", set())
    index.close()
    return labels


# ---- values


def test_what_is_said_of_pods_is_what_happened(client):
    samples = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in scrape(client)[0]}

    def value(name, pod, rank="0", **labels):
        return samples[name, *sorted({"pod": pod, "rank": rank, **labels}.items())]

    assert value("kvindex_pod_messages_total", "pod-a") == 1
    assert value("kvindex_pod_messages_total", "pod-b", "1") == 2
    assert value("kvindex_pod_gaps_total", "pod-a") == 0
    assert value("kvindex_pod_gaps_total", "pod-b", "1") == 1
    assert value("kvindex_pod_degraded", "pod-a", reason="") == 0
    assert value("kvindex_pod_degraded", "pod-b", "1", reason="gap") == 1
    assert value("kvindex_pod_degraded", "pod-c", reason="no events yet") == 1
    assert value("kvindex_pod_blocks", "pod-b", "1", tier="gpu") == 1
    assert samples["kvindex_pod_connected", ("pod", "pod-c")] == 0
    # the messages say that the engine made them at 1.0
    at = value("kvindex_pod_last_message_timestamp_seconds", "pod-a")
    assert time.time() - 600 < at <= time.time()
    assert value("kvindex_pod_lag_seconds", "pod-a") == pytest.approx(at - 1.0)
    assert sum(value for (name, *_), value in samples.items() if name == "kvindex_dropped_total") == 1
    assert samples["kvcache_index_admissions_total",] == 4
    assert samples["kvcache_index_evictions_total",] == 1
    assert samples["kvindex_questions_total", ("by", "http"), ("outcome", "answered")] == 1
    assert samples["kvcache_index_lookup_hits_total",] == 2
    assert samples["kvindex_lookup_blocks_total",] == 2
    assert samples["process_resident_memory_bytes",] > 1_000_000
    assert samples["kvindex_answer_stage_seconds_count", ("stage", "match")] == 1


def test_no_prompt_model_or_stranger_makes_a_series(client):
    before = {(sample.name, *sample.labels.items()) for sample in scrape(client)[0]}
    for number in range(20):
        ask(client, "score", model=f"model-{number}", pods=[f"stranger-{number}"], cache_salt=f"salt-{number}")
        ask(client, "score", token_ids=[number] * 16, lora_name=f"lora-{number}")
        client.post("/v1/observe", json={"model": MODEL, "pod": f"x-{number}", "token_ids": [1], "cached_tokens": 0})
    samples, text = scrape(client)
    assert {(sample.name, *sample.labels.items()) for sample in samples} == before
    for word in ("model-", "stranger-", "salt-", "lora-", "x-1"):
        assert word not in text


def test_a_pod_that_is_forgotten_leaves_no_series(client):
    index = open_index()
    with EventPool(index) as pool:
        pool.submit(message("gone", 0, STORED))
        pool.drain()
        app = create_app(PrefixScorer(index), index, pool, max_tokens=100, max_body_bytes=4096)
        with TestClient(app) as opened:
            ask(opened, "observe", pod="gone", cached_tokens=32)
            assert 'pod="gone"' in scrape(opened)[1]
            assert opened.delete("/v1/pods/gone").status_code == 204
            # what was observed of it goes when sources are looked at next
            lines = [line for line in scrape(opened)[1].splitlines() if 'pod="gone"' in line]
            assert all(
                line.startswith(("kvindex_observations", "kvindex_prediction", "kvindex_pod_drifting"))
                for line in lines
            )


def test_a_redis_that_is_down_does_not_hide_the_other_metrics():
    index = open_index("redis://127.0.0.1:1/0?timeout=0.1")
    pool = EventPool(index)
    with TestClient(create_app(PrefixScorer(index), index, pool, max_tokens=9, max_body_bytes=4096)) as opened:
        samples, text = scrape(opened)
        assert opened.post("/v1/score", json={"model": MODEL, "token_ids": [1]}).status_code == 503
        after = scrape(opened)[1]
    values = {sample.name: sample.value for sample in samples}
    assert values["kvindex_index_up"] == 0
    assert "kvindex_pool_queue_depth 0.0" in text
    assert 'kvindex_questions_total{by="http",outcome="unavailable"} 1.0' in after
    index.close()


# ---- the dashboard

WORDS = {
    *("sum", "min", "max", "count", "avg", "by", "topk", "rate", "increase", "histogram_quantile", "or", "vector"),
    *("time", "le"),
}


def asked_for(expression):
    """The metrics of a PromQL expression, each with the labels that it is selected by; labels that are grouped by."""
    text = expression.replace("$__rate_interval", "1m")
    grouped = {name for group in re.findall(r"\bby \(([^)]*)\)", text) for name in re.split(r",\s*", group)}
    bare = re.sub(r"\bby \([^)]*\)", "", text)
    found = re.findall(r"([a-z_][a-z0-9_]*)(?:\{([^}]*)\})?", re.sub(r"\[[^\]]*\]", "", bare))
    metrics = {}
    for name, selected in found:
        if name not in WORDS:
            metrics[name] = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selected))
    return metrics, grouped


def panels():
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


QUERIES = [
    (panel["title"], target["expr"], target["legendFormat"]) for panel in panels() for target in panel["targets"]
]


@pytest.mark.parametrize(("title", "expression", "legend"), QUERIES)
def test_the_dashboard_asks_for_what_there_is(exposed, title, expression, legend):
    metrics, grouped = asked_for(expression)
    assert metrics, expression
    assert all(expression.count(left) == expression.count(right) for left, right in ("()", "{}", "[]"))
    assert metrics.keys() <= exposed.keys(), metrics.keys() - exposed.keys()
    for name, selected in metrics.items():
        assert selected <= exposed[name] | ADDED_BY_PROMETHEUS, (name, selected)
    for label in grouped:
        assert all(label in exposed[name] | ADDED_BY_PROMETHEUS for name in metrics), (label, expression)
    for label in re.findall(r"\{\{(\w+)\}\}", legend):
        assert label in grouped, f"{title}: the legend has {label}, the answer has not"
    # a rate is of a counter, all else is not
    for counter in re.findall(r"(?:rate|increase)\(([a-z_]+)", expression):
        assert counter.endswith(("_total", "_bucket", "_count", "_sum")), counter
    for name in metrics:
        assert name.endswith(("_total", "_bucket")) == bool(re.search(rf"(rate|increase)\({name}\b", expression)), name


def test_the_dashboard_can_be_imported():
    assert [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"] == [
        *("Fleet trust", "Events and lag", "Answers", "Index size", "Prediction error", "Discovery", "Checks"),
    ]
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) - {"__rate_interval"}
    assert used == variables


# ---- the documentation


def family_of(sample):
    return re.sub(r"_(bucket|count|sum)$", "", sample)


def test_every_metric_is_explained_and_none_that_is_not(exposed):
    named = set(re.findall(r"`((?:kvindex|kvcache|process)_[a-z_]+)`", OPERATIONS))
    there = {family_of(name) for name in exposed}
    assert there - named == set(), "say in docs/operations.md what they mean"
    counted_when_they_happen = {"kvindex_pool_receiver_errors_total"}
    assert named - there - counted_when_they_happen - {"kvcache_index_"} == set()


def test_every_metric_the_operators_wait_for_is_there(exposed):
    rows = re.findall(r"^\| `([^`]+)` \| [0-9]+ min", OPERATIONS, re.MULTILINE)
    assert len(rows) >= 5
    for expression in rows:
        metrics, grouped = asked_for(expression)
        assert metrics.keys() <= exposed.keys(), expression
        assert all(label in exposed[name] for name in metrics for label in grouped - {"le"})


def test_the_alerts_are_those_of_the_table(exposed):
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    rows = re.findall(r"^\| `([^`]+)` \| ([0-9]+) min", OPERATIONS, re.MULTILINE)
    assert [(rule["expr"], rule["for"]) for rule in group["rules"]] == [(expr, f"{minutes}m") for expr, minutes in rows]
    assert len({rule["alert"] for rule in group["rules"]}) == len(rows)
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            metrics, grouped = asked_for(rule["expr"])
            assert all(label in (grouped or exposed[name]) for name in metrics), rule["alert"]


def test_every_reason_has_its_row():
    sources = [trust.__file__, standing.__file__, ROOT / "indexer/ledger.py", ROOT / "scorer/observing.py"]
    texts = [text for source in sources for text in re.findall(r'"((?:[a-z]+ ?){1,3}): ', Path(source).read_text())]
    reasons = {text for text in texts if text} | {"unreachable", "over max_bytes"}
    rows = set(re.findall(r"^\| `([a-z_ ]+)` \|", OPERATIONS, re.MULTILINE))
    assert {"gap", "behind", "unsure", "no events yet", "error", "full", "lost", "drifting"} <= reasons
    assert reasons <= rows


def test_every_counter_has_a_meaning(client):
    index = open_index("redis://127.0.0.1:1/0")
    parts = {"index": index.stats()}
    index.close()
    for part, stats in parts.items():
        for name in stats:
            plain = name.removesuffix("_total")
            assert meaning_of(part, plain) != f"{plain.replace('_', ' ')} of the {part}", plain
    text = scrape(client)[1]
    for line in text.splitlines():
        if line.startswith("# HELP kvindex_"):
            assert not re.search(r" of the (index|pool|discovery|scorer)$", line), line


def test_sources_that_share_a_name_have_a_series_each(client):
    """The ranks of a pod are apart in every metric that has pods."""
    samples = [
        sample for sample in scrape(client)[0] if sample.name.startswith("kvindex_pod_") and "rank" in sample.labels
    ]
    keys = [(sample.name, *sorted(sample.labels.items())) for sample in samples]
    assert len(set(keys)) == len(keys)
    assert {sample.labels["rank"] for sample in samples if sample.labels["pod"] == "pod-b"} == {"1"}
