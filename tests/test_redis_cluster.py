"""The cluster that tests run: that it is one, and that it survives what they do to it."""

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import redis

from .conftest import NEEDS_REDIS

pytestmark = NEEDS_REDIS
KEYS = [b"key %d" % number for number in range(300)]


@pytest.fixture
def cluster(redis_cluster):
    """The cluster for a test that harms it."""
    redis_cluster.flush()
    yield redis_cluster
    redis_cluster.heal()


@pytest.fixture
def client(cluster):
    client = redis.RedisCluster.from_url(cluster.url.replace("redis+cluster", "redis"))
    yield client
    client.close()


def test_keys_lie_where_it_says(cluster, client):
    for key in KEYS:
        client.set(key, key)
    assert [client.get(key) for key in KEYS] == KEYS
    owners = Counter(map(cluster.owner_of, KEYS))
    assert sorted(owners) == cluster.masters() == sorted(cluster.ports[:3])
    for master in cluster.clients():
        port = master.get_connection_kwargs()["port"]
        assert {key for key in KEYS if cluster.owner_of(key) == port} == set(master.keys())
    cluster.flush()
    assert [master.dbsize() for master in cluster.clients()] == [0, 0, 0]


@pytest.mark.parametrize("key", [b"a", b"b", b"c"])
def test_a_master_is_killed_and_comes_back(cluster, client, key):
    client.set(key, "before")
    assert client.wait(1, 20_000, target_nodes=client.get_node_from_key(key)) == 1
    heir = cluster.replica_of(cluster.owner_of(key))
    dead = cluster.kill_master_of(key)
    assert dead not in cluster.living
    assert cluster.owner_of(key) == heir
    assert client.get(key) == b"before"
    client.set(key, "after")
    with pytest.raises(AssertionError, match="no living replica"):
        cluster.kill_master_of(key)
    cluster.restart(dead)
    assert cluster.replica_of(heir) == dead
    assert cluster.kill_master_of(key) == heir
    assert client.get(key) == b"after"
    cluster.heal()
    assert cluster.owner_of(key) == dead
    assert client.get(key) == b"after"


def test_a_master_hands_over(cluster, client):
    port = cluster.owner_of(b"a")
    client.set(b"a", "before")
    heir = cluster.failover(port)
    assert cluster.owner_of(b"a") == heir != port
    assert client.get(b"a") == b"before"
    assert cluster.failover(port) == port


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


OWNER = """
import sys, time
from pathlib import Path
from tests.redis_cluster import RedisCluster
RedisCluster._form = lambda self: None
cluster = RedisCluster(Path(sys.argv[1]))
print(*cluster.ports, flush=True)
if sys.argv[2:]:
    cluster.close()
    cluster.close()
    print("closed", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", [["close"], []], ids=["closed", "owner killed"])
def test_nothing_is_left_of_it(tmp_path, how):
    command = [sys.executable, "-c", OWNER, str(tmp_path), *how]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=Path(__file__).parent.parent, **pipes) as owner:
        ports = [int(port) for port in owner.stdout.readline().split()]
        assert len(ports) == 6
        if how:
            assert owner.stdout.readline() == "closed\n"
            assert not [port for port in ports if listens(port)]
        owner.kill()
    deadline = time.monotonic() + 20
    while any(map(listens, ports)):
        assert time.monotonic() < deadline, "they live on"
        os.sched_yield()
    assert {path.name for path in tmp_path.iterdir()} == {f"nodes-{port}.conf" for port in ports}
