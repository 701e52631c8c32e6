"""The Kubernetes manifests and compose.yaml, against what the programs take and against each other."""

from pathlib import Path

import pytest
import yaml

from kvindex.config import load

from .not_run import KVINDEX
from .written import environment_of

ROOT = Path(__file__).parents[1]
MANIFESTS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def things(request) -> list[dict]:
    return list(yaml.safe_load_all(request.param.read_text()))


def of(things, kind) -> list[dict]:
    return [thing for thing in things if thing["kind"] == kind]


def template(deployment) -> dict:
    return deployment["spec"]["template"]


def container(deployment) -> dict:
    (one,) = template(deployment)["spec"]["containers"]
    return one


def selects(selector, labels) -> bool:
    return selector.items() <= labels.items()


def config_of(args, environ):
    """What a container would run with. Raises what the program would say."""
    command = KVINDEX.commands[args[0]]
    given = command.make_context(args[0], list(args[1:])).params
    more = {"KVINDEX_INDEX_ROLE": given["role"], "KVINDEX_INDEX_URL": given["index"]}
    return load(None, environ | {key: value for key, value in more.items() if value is not None})


def test_every_container_has_a_configuration_that_holds(things):
    for deployment in of(things, "Deployment"):
        one = container(deployment)
        variables = [entry["name"] for entry in one["env"]]
        assert len(set(variables)) == len(variables)
        assert set(variables) == set(environment_of(deployment))
        config = config_of(one["args"], environment_of(deployment))
        ports = {port["name"]: port["containerPort"] for port in one["ports"]}
        assert ports["http"] == config.http.port
        assert ports.get("grpc") == config.grpc.port
        assert config.http.host == "0.0.0.0"
        follow = config.discovery.kubernetes[0]
        assert follow.namespace == ""  # its own, which is all that the Role allows
        limit = {"Gi": 2**30}[one["resources"]["limits"]["memory"][-2:]] * int(
            one["resources"]["limits"]["memory"][:-2]
        )
        assert config.index.max_bytes is None or config.index.max_bytes + 600_000_000 <= limit
        if config.snapshot.path:
            mounted = [mount["mountPath"] for mount in one["volumeMounts"]]
            assert str(Path(config.snapshot.path).parent) in mounted
            assert "/tmp" in mounted  # noqa: S108  (a peer's snapshot is kept there, and the rest is read-only)
            names = {mount["name"] for mount in one["volumeMounts"]}
            assert names == {volume["name"] for volume in template(deployment)["spec"]["volumes"]}


def test_it_may_do_no_more_than_it_has_to(things):
    (role,) = of(things, "Role")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    for deployment in of(things, "Deployment"):
        pod, one = template(deployment)["spec"], container(deployment)
        assert pod["serviceAccountName"] == of(things, "ServiceAccount")[0]["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        user = f"--uid {pod['securityContext']['runAsUser']} "
        assert user in (ROOT / "Dockerfile").read_text()
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_probes_and_stops(things):
    for deployment in of(things, "Deployment"):
        one = container(deployment)
        paths = {kind: one[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
        assert {get["port"] for get in paths.values()} == {"http"}
        asked = {kind: get["path"] for kind, get in paths.items()}
        assert asked == {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
        assert template(deployment)["spec"]["enableServiceLinks"] is False
        assert deployment["spec"]["replicas"] >= 2
        config = config_of(one["args"], environment_of(deployment))
        assert config.http.shutdown_delay_s >= 5  # endpoints are withdrawn meanwhile
        leaving_s = config.http.shutdown_delay_s + config.http.shutdown_timeout_s
        assert template(deployment)["spec"]["terminationGracePeriodSeconds"] >= leaving_s + 10


def test_what_selects_finds_what_it_means(things):
    deployments = of(things, "Deployment")
    labels = [template(deployment)["metadata"]["labels"] for deployment in deployments]
    for deployment, own in zip(deployments, labels, strict=True):
        assert selects(deployment["spec"]["selector"]["matchLabels"], own)
        # no two deployments may take each other's pods for their own
        assert sum(selects(deployment["spec"]["selector"]["matchLabels"], one) for one in labels) == 1
        budgets = of(things, "PodDisruptionBudget")
        assert sum(selects(budget["spec"]["selector"]["matchLabels"], own) for budget in budgets) == 1
    for service in of(things, "Service"):
        found = [d for d, own in zip(deployments, labels, strict=True) if selects(service["spec"]["selector"], own)]
        assert len(found) == 1
        ports = {port["name"]: port["containerPort"] for port in container(found[0])["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in things]
    assert len(set(names)) == len(names)


def test_peers_are_a_headless_service_of_the_others(things):
    for deployment in of(things, "Deployment"):
        for peer in config_of(container(deployment)["args"], environment_of(deployment)).snapshot.peers:
            name, port = peer.removeprefix("http://").split(":")
            (service,) = [one for one in of(things, "Service") if one["metadata"]["name"] == name]
            assert service["spec"]["clusterIP"] == "None"
            assert int(port) in [one["port"] for one in service["spec"]["ports"]]


def test_the_network_policy_allows_all_that_is_needed(things):
    (policy,) = of(things, "NetworkPolicy")
    spec = policy["spec"]
    allowed = [(one.get("to", [{}]), one.get("ports", [])) for one in spec["egress"]]
    for deployment in of(things, "Deployment"):
        assert selects(spec["podSelector"]["matchLabels"], template(deployment)["metadata"]["labels"])
        config = config_of(container(deployment)["args"], environment_of(deployment))
        follow = config.discovery.kubernetes[0]
        (ports,) = [
            ports
            for to, ports in allowed
            for one in to
            if one.get("podSelector", {}).get("matchLabels") == dict([follow.label_selector.split("=")])
        ]
        for port in (follow.port, follow.replay_port):
            assert any(one["port"] <= port <= one.get("endPort", one["port"]) for one in ports)
        opened = {one["port"] for _, ports in allowed for one in ports}
        assert {53, 443} <= opened  # names, the API server
        if config.index.url != "memory://":
            assert 6379 in opened
    assert {one["port"] for one in spec["ingress"][0]["ports"]} == {"http", "grpc"}


@pytest.mark.parametrize("name", [name for name, one in COMPOSE.items() if one.get("image") == "kv-cache-indexer"])
def test_every_service_of_compose_has_options_and_variables_that_hold(name):
    service = COMPOSE[name]
    for one in service.get("depends_on", {}):
        assert one in COMPOSE
    if "entrypoint" in service:
        module = service["entrypoint"][2]
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
        return
    environ = service.get("environment", {})
    if service["command"][0] == "serve":
        http = config_of(service["command"], environ).http
        assert int(service["stop_grace_period"].removesuffix("s")) >= http.shutdown_timeout_s + 10
        assert config_of(service["command"], environ).index.url == "redis://redis:6379/0"
    else:
        KVINDEX.commands[service["command"][0]].make_context(name, service["command"][1:])


def test_options_that_there_are_not_are_noticed():
    with pytest.raises(Exception, match="No such option: --rolle"):
        config_of(["serve", "--rolle", "builder"], {})
