"""Pods by label, from an API that answers as the API server does."""

import importlib
import sys
import threading
from pathlib import Path

import pytest
import yaml

from kvevents import DiscoveryError
from kvevents.discovery import Follower, KubernetesDiscovery, KubernetesFollow

from .conftest import Followed, until
from .kubernetes_api import KubernetesApi, pod_document


@pytest.fixture
def api():
    api = KubernetesApi()
    api.set(pod_document("vllm-0", "10.0.0.1", "uid-0"))
    api.set(pod_document("vllm-1", "10.0.0.2", "uid-1"))
    yield api
    api.close()


@pytest.fixture
def follow(api):
    """Follows the pods of the API; what it gives is a `Followed`."""
    followers = []

    def begin(*, quiet_s=0.3, identity="name", **more):
        settings = KubernetesFollow(label_selector="app=vllm,tier in (gold)", replay_port=5600, **more)
        target = Followed()
        source = KubernetesDiscovery(settings, quiet_s=quiet_s, connect=api.client)
        follower = Follower(target, [source], identity=identity, retry_s=0.01, retry_max_s=0.01)
        followers.append(follower)
        follower.start()
        target.follower = follower
        return target

    yield begin
    for follower in followers:
        follower._stop.set()
    api.cut()
    for follower in followers:
        follower.close()


def test_pods_are_found_with_address_uid_and_model(api, follow):
    api.set(pod_document("vllm-2", "fd00::7", "uid-2", labels={"model": "qwen"}, annotations={"m": "Qwen/Qwen3-8B"}))
    followed = follow(ranks=2, model="default", model_label="model")
    until(lambda: len(followed.pods) == 3)
    first, third = followed.pods["vllm-0"], followed.pods["vllm-2"]
    assert [(one.endpoint, one.replay, one.model) for one in first.endpoints] == [
        ("tcp://10.0.0.1:5557", "tcp://10.0.0.1:5600", "default"),
        ("tcp://10.0.0.1:5558", "tcp://10.0.0.1:5601", "default"),
    ]
    assert (first.uid, third.endpoints[0].endpoint, third.endpoints[0].model) == (
        "uid-0",
        "tcp://[fd00::7]:5557",
        "qwen",
    )
    path, asked = api.questions[0]
    assert path == "/api/v1/namespaces/inference/pods"
    assert asked == {"labelSelector": "app=vllm,tier in (gold)"}
    until(lambda: len(api.questions) > 1)
    assert api.questions[1] == (path, asked | {"watch": "true", "resourceVersion": "103"})
    annotated = follow(model_annotation="m")
    until(lambda: len(annotated.pods) == 3)
    assert annotated.pods["vllm-2"].endpoints[0].model == "Qwen/Qwen3-8B"


def test_a_pod_whose_address_is_none_leaves_the_others(api, follow):
    api.set(pod_document("odd", "not an address", "uid-2"))
    followed = follow()
    until(lambda: set(followed.pods) == {"vllm-0", "vllm-1"})
    assert followed.follower.stats()["errors_total"] == 0


def test_readiness_deletion_and_return_under_another_address_and_uid(api, follow):
    followed = follow()
    until(lambda: set(followed.pods) == {"vllm-0", "vllm-1"})
    api.set(pod_document("vllm-2", "", "uid-2", ready=False, phase="Pending"))
    api.set(pod_document("vllm-2", "10.0.0.3", "uid-2", ready=False))
    api.set(pod_document("vllm-1", "10.0.0.2", "uid-1", ready=False))
    until(lambda: set(followed.pods) == {"vllm-0"})
    api.set(pod_document("vllm-2", "10.0.0.3", "uid-2"))
    api.set(pod_document("vllm-1", "10.0.0.2", "uid-1"))
    until(lambda: set(followed.pods) == {"vllm-0", "vllm-1", "vllm-2"})
    api.mark_deleted("vllm-1")
    until(lambda: set(followed.pods) == {"vllm-0", "vllm-2"})
    api.delete("vllm-1")
    # a StatefulSet's pod: the same name, another life, another address
    api.set(pod_document("vllm-1", "10.0.0.9", "uid-9"))
    until(lambda: "vllm-1" in followed.pods)
    assert (followed.pods["vllm-1"].uid, followed.pods["vllm-1"].ip) == ("uid-9", "10.0.0.9")
    # the same name and address, another life
    api.delete("vllm-0")
    api.set(pod_document("vllm-0", "10.0.0.1", "uid-10"))
    until(lambda: followed.pods.get("vllm-0") and followed.pods["vllm-0"].uid == "uid-10")
    assert followed.changes("vllm-2") == ["+uid-2"]
    assert followed.changes("vllm-0")[0] == "+uid-0"
    assert followed.changes("vllm-0")[-1] == "+uid-10"
    assert [path for path, asked in api.questions if "watch" not in asked] == ["/api/v1/namespaces/inference/pods"]


def test_pods_that_are_not_ready_can_be_followed_too(api, follow):
    api.set(pod_document("vllm-1", "10.0.0.2", "uid-1", ready=False))
    api.set(pod_document("vllm-2", "10.0.0.3", "uid-2", phase="Failed", ready=False))
    followed = follow(only_ready=False)
    until(lambda: set(followed.pods) == {"vllm-0", "vllm-1"})


def test_a_history_that_is_gone_is_listed_anew(api, follow):
    followed = follow()
    until(lambda: len(followed.pods) == 2)
    api.change_unseen(pod_document("vllm-1", "10.0.0.7", "uid-7"), gone=["vllm-0"])
    until(lambda: set(followed.pods) == {"vllm-1"} and followed.pods["vllm-1"].uid == "uid-7")
    assert followed.follower.stats()["errors_total"] == 0


def test_a_watch_that_ends_or_falls_silent_goes_on_where_it_was(api, follow):
    followed = follow(quiet_s=0.05)
    until(lambda: sum("watch" in asked for _, asked in api.questions) >= 4)
    api.cut()
    api.set(pod_document("vllm-2", "10.0.0.3", "uid-2"))
    until(lambda: len(followed.pods) == 3)
    assert sum("watch" not in asked for _, asked in api.questions) == 1
    assert followed.follower.stats()["errors_total"] == 0


def test_an_outage_removes_nobody(api, follow, capsys):
    followed = follow()
    until(lambda: len(followed.pods) == 2)
    api.refuses = 403
    api.cut()
    until(lambda: followed.follower.stats()["errors_total"] >= 3)
    assert set(followed.pods) == {"vllm-0", "vllm-1"}
    assert followed.follower.stats()["sources_unavailable"] == 1
    with api._changed:
        api.change_unseen(gone=["vllm-0"])
    api.refuses = None
    until(lambda: set(followed.pods) == {"vllm-1"})
    assert followed.follower.stats()["sources_unavailable"] == 0
    said = capsys.readouterr().out
    assert said.count("discovery_unavailable") == 1
    assert "get, list and watch of pods" in said
    assert "pods_kept=2" in said.replace("\x1b[0m", "").replace("\x1b[36m", "").replace("\x1b[35m", "")


@pytest.mark.parametrize(("identity", "name"), [("name", "vllm-0"), ("ip", "10.0.0.1"), ("ip:port", "10.0.0.1:8000")])
def test_answers_and_questions_may_use_any_name(follow, identity, name):
    followed = follow(identity=identity)
    until(lambda: len(followed.pods) == 2)
    assert name in followed.pods
    for asked in ("vllm-0", "10.0.0.1", "10.0.0.1:8000", "http://10.0.0.1:8000/v1", "inference/vllm-0"):
        assert followed.follower.resolve([asked]) == [name]
    assert followed.follower.resolve(["10.0.0.1:9", "other"]) == ["10.0.0.1:9", "other"]


def test_without_lightkube_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightkube", None)
    module = importlib.import_module("kvevents.discovery.kubernetes")
    source = module.KubernetesDiscovery(KubernetesFollow(label_selector="a=b"))
    with pytest.raises(DiscoveryError, match=r"pip install kv-cache-indexer\[kubernetes\]"):
        next(source.watch(threading.Event()))


def test_without_a_cluster_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DiscoveryError, match="kubernetes"):
        next(KubernetesDiscovery(KubernetesFollow(label_selector="a=b")).watch(threading.Event()))


def test_the_manifest_allows_what_is_asked_and_no_more(api, follow):
    file = Path(__file__).parent.parent / "deploy" / "kubernetes" / "kvindex.yaml"
    documents = {document["kind"]: document for document in yaml.safe_load_all(file.read_text())}
    assert documents["Role"]["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    account = documents["ServiceAccount"]["metadata"]["name"]
    binding = documents["RoleBinding"]
    assert binding["roleRef"]["name"] == documents["Role"]["metadata"]["name"]
    assert [(subject["kind"], subject["name"]) for subject in binding["subjects"]] == [("ServiceAccount", account)]
    template = documents["Deployment"]["spec"]["template"]
    assert template["spec"]["serviceAccountName"] == account
    assert template["metadata"]["labels"].items() >= documents["Service"]["spec"]["selector"].items()
    (container,) = template["spec"]["containers"]
    from kvindex.config import load

    config = load(None, {one["name"]: one["value"] for one in container["env"]})
    assert config.discovery.kubernetes[0].label_selector
    assert container["ports"][0]["containerPort"] == config.http.port
