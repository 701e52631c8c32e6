"""A Redis Cluster of the tests' own: three masters with a replica each, on free ports of loopback.

It is formed with commands alone, keeps no files but the nodes' own configuration, and ends with its owner.
"""

import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from .redis_server import BINARY

MASTERS = 3
SLOTS = 16384
SECONDS = 30
"""How long anything may take before it counts as failed."""

_HOST = "127.0.0.1"
_PORTS = range(10_000, 22_000)
"""Their buses listen 10,000 above; all that is below the ports that systems give out by themselves."""

_NODE_TIMEOUT_MS = 1000
_MANUAL_S = 6.0
"""A failover that was asked for is given up by Redis after 5 s."""

_OPTIONS = {
    "bind": _HOST,
    "loglevel": "warning",
    "save": "",
    "appendonly": "no",
    "cluster-enabled": "yes",
    "cluster-announce-ip": _HOST,
    "cluster-node-timeout": str(_NODE_TIMEOUT_MS),
    "cluster-replica-validity-factor": "0",  # a replica takes over however long it has not heard of its master
    "cluster-migration-barrier": "100",  # and never moves to another one
    "repl-diskless-sync": "yes",
    "repl-diskless-sync-delay": "0",
    "repl-diskless-load": "swapdb",
    "repl-timeout": "10",
}

# The shell kills the server when its own standard input ends, be it that the owner closes it or is no more.
_WHILE_OWNED = """
exec 3<&0
"$@" 3<&- </dev/null & server=$!
{ read _ <&3; kill -9 $server; } & reader=$!
wait $server
kill $reader
"""


class Node(NamedTuple):
    """What one node says of another, or of itself."""

    id: str
    port: int
    flags: frozenset[str]
    master: str
    """The id of whom it copies."""
    slots: frozenset[int]


class RedisCluster:
    """Six processes, of which masters can be killed, and started again in the same place.

    Every method returns when all living nodes agree on what is whose, and raises `TimeoutError` with what they say
    when that does not happen. `heal` brings back what it was at first: then `ports[:3]` are the masters, and
    `ports[3:]` their replicas in the same order.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._clients: dict[int, redis.Redis] = {}
        self.ports: list[int] = []
        try:
            for attempt in range(3):
                if self._start_all():
                    break
                self.close()
                assert attempt < 2, "no six nodes could be started: are there no free ports?"
            self._form()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Where to begin: a replica, which is killed only when its shard loses a master twice."""
        return f"redis+cluster://{_HOST}:{self.ports[-1]}"

    @property
    def living(self) -> list[int]:
        """The ports of all processes that run."""
        return list(self._processes)

    def masters(self) -> list[int]:
        """Give the ports of the masters that have slots, as a living node sees them."""
        return sorted({node.port for node in self._seen_by(self.living[0]) if node.slots})

    def owner_of(self, key: bytes) -> int:
        """Give the port of the master of a key."""
        slot = key_slot(key)
        return next(node.port for node in self._seen_by(self.living[0]) if slot in node.slots)

    def replica_of(self, port: int) -> int:
        """Give the port of the living replica of a master."""
        nodes = self._seen_by(port)
        (own,) = (node.id for node in nodes if "myself" in node.flags)
        found = [node.port for node in nodes if node.master == own and node.port in self._processes]
        assert found, f"the master at {port} has no living replica: restart() one"
        return found[0]

    def clients(self) -> list[redis.Redis]:
        """Give a client of each master, which answers for its own keys only. They are closed with the cluster."""
        return [self._clients[port] for port in self.masters()]

    def kill_master_of(self, key: bytes) -> int:
        """Kill the master of a key with SIGKILL, wait for its replica to take over, and give the port of the dead."""
        port = self.owner_of(key)
        self.replica_of(port)
        self._kill(port)
        self._wait(f"a replica in place of {port}", self._unsettled)
        return port

    def restart(self, port: int) -> None:
        """Start a killed node again, empty, and wait until it is a replica that has all its master has."""
        self._start(port)
        self._wait(f"{port} to be back", self._incomplete)

    def failover(self, port: int) -> int:
        """Exchange a master and its replica, without loss; `port` is of either. Give the port of the new master."""
        heir = self.replica_of(port) if port in self.masters() else port
        asked_at = 0.0

        def missing() -> str:
            nonlocal asked_at
            if heir not in self.masters() and time.monotonic() > asked_at + _MANUAL_S:
                asked_at = time.monotonic()
                self._clients[heir].execute_command("CLUSTER FAILOVER")
            return self._incomplete() or ("" if heir in self.masters() else f"{heir} is no master yet")

        self._wait(f"{heir} to take over", missing)
        return heir

    def replicate(self) -> None:
        """Wait until every replica has what its master has now: what it has not is lost when the master dies."""
        behind = [
            (master, self._clients[master].info("replication")["master_repl_offset"]) for master in self.masters()
        ]

        def missing() -> str:
            for master, offset in behind:
                replica = self.replica_of(master)
                if self._clients[replica].info("replication")["slave_repl_offset"] < offset:
                    return f"{replica} has less than {master}"
            return ""

        self._wait("replicas", missing)

    def heal(self) -> None:
        """Start what was killed, and make those masters who were at first."""
        for port in self.ports:
            if port not in self._processes:
                self._start(port)
        self._wait("all nodes to be back", self._incomplete)
        for port in self.ports[:MASTERS]:
            if port not in self.masters():
                self.failover(port)

    def flush(self) -> None:
        """Delete all keys."""
        for client in self.clients():
            client.flushall()

    def close(self) -> None:
        """Kill all nodes. May be called twice."""
        for client in self._clients.values():
            client.close()
        for port in self.living:
            self._kill(port)
        self._clients.clear()

    # ---- processes

    def _start_all(self) -> bool:
        self.ports = _free_ports(2 * MASTERS)
        try:
            for port in self.ports:
                self._start(port)
        except ChildProcessError:  # somebody was quicker to take a port
            return False
        return True

    def _start(self, port: int) -> None:
        options = {"port": str(port), "dir": str(self._folder), "cluster-config-file": f"nodes-{port}.conf"} | _OPTIONS
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        process = subprocess.Popen(
            ["sh", "-c", _WHILE_OWNED, "sh", str(BINARY), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._processes[port] = process
        client = self._clients.get(port)
        if client is None:
            # one more try at once, for connections to what was killed meanwhile
            client = self._clients[port] = redis.Redis(port=port, socket_timeout=5, retry=Retry(NoBackoff(), 1))
            client.set_response_callback("CLUSTER NODES", lambda answer, **_: answer)

        def missing() -> str:
            if process.poll() is not None:
                raise ChildProcessError(f"the node at {port} ended by itself")
            try:
                client.ping()
            except redis.exceptions.BusyLoadingError as error:
                return str(error)
            return ""

        self._wait(f"an answer from {port}", missing)

    def _kill(self, port: int) -> None:
        process = self._processes.pop(port)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(SECONDS)

    # ---- forming

    def _form(self) -> None:
        masters, replicas = self.ports[:MASTERS], self.ports[MASTERS:]
        for number, port in enumerate(self.ports):
            self._clients[port].execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for number, port in enumerate(masters):
            slots = range(number * SLOTS // MASTERS, (number + 1) * SLOTS // MASTERS)
            try:
                self._clients[port].execute_command("CLUSTER ADDSLOTSRANGE", slots[0], slots[-1])
            except redis.ResponseError:  # before Redis 7
                self._clients[port].execute_command("CLUSTER ADDSLOTS", *slots)
        # each meets each: quicker than to wait until word has gone round
        for number, port in enumerate(self.ports):
            for other in self.ports[number + 1 :]:
                self._clients[port].execute_command("CLUSTER MEET", _HOST, other)
        self._wait("six nodes to know each other", self._unsettled)
        for master, replica in zip(masters, replicas, strict=True):
            (own,) = (node.id for node in self._seen_by(master) if "myself" in node.flags)
            self._clients[replica].execute_command("CLUSTER REPLICATE", own)
        self._wait("a replica of each master", self._incomplete)

    def _seen_by(self, port: int) -> list[Node]:
        answer: bytes = self._clients[port].execute_command("CLUSTER NODES")
        return [_node(line) for line in answer.decode().splitlines()]

    def _unsettled(self) -> str:
        """Say what living nodes do not agree on yet: all slots have to be some living node's."""
        views = set()
        for port in self.living:
            state = self._clients[port].execute_command("CLUSTER INFO")
            if _is_down(state):
                return f"{port} says that the cluster is down"
            nodes = self._seen_by(port)
            strange = [node.port for node in nodes if node.flags & {"handshake", "noaddr"}]
            if strange or {node.port for node in nodes} != set(self.ports):
                return f"{port} does not know all nodes: it knows {sorted(node.port for node in nodes)}"
            owners = {slot: node.port for node in nodes for slot in node.slots}
            if len(owners) < SLOTS:
                return f"{port} misses {SLOTS - len(owners)} slots"
            if dead := set(owners.values()) - self._processes.keys():
                return f"{port} still takes {sorted(dead)} for masters"
            views.add(frozenset(owners.items()))
        return "" if len(views) == 1 else "nodes differ on whose the slots are"

    def _incomplete(self) -> str:
        """Say what keeps each master from having a replica that has all the master has."""
        if missing := self._unsettled():
            return missing
        for port in self.living:
            nodes = self._seen_by(port)
            if failed := [node.port for node in nodes if node.flags & {"fail", "fail?"} and node.port in self.living]:
                return f"{port} takes {failed} for dead"
            masters = {node.id: node.port for node in nodes if node.slots}
            if len(masters) != MASTERS:
                return f"{port} knows {len(masters)} masters"
            for node in nodes:
                if node.port in self._processes and node.id not in masters and node.master not in masters:
                    return f"{port} takes {node.port} for nobody's replica"
        for port in set(self.living) - set(self.masters()):
            if self._clients[port].info("replication").get("master_link_status") != "up":
                return f"{port} has no copy of what its master has"
        return ""

    def _wait(self, what: str, missing: Callable[[], str]) -> None:
        """Wait until nothing is missing any more."""
        deadline, pause, last = time.monotonic() + SECONDS, threading.Event(), "nothing yet"
        while time.monotonic() < deadline:
            try:
                last = missing()
                if not last:
                    return
            except redis.RedisError as error:
                last = repr(error)
            pause.wait(0.02)
        raise TimeoutError(f"waited {SECONDS} s for {what}: {last}")


def _node(line: str) -> Node:
    """Read a line of CLUSTER NODES."""
    name, address, flags, master, _ping, _pong, _epoch, _link, *ranges = line.split()
    port = int(address.partition("@")[0].rpartition(":")[2])
    slots = set()
    for text in ranges:
        if not text.startswith("["):  # a slot on the move
            first, _, last = text.partition("-")
            slots.update(range(int(first), int(last or first) + 1))
    return Node(name, port, frozenset(flags.split(",")), master, frozenset(slots))


def _is_down(info: object) -> bool:
    """Read the answer to CLUSTER INFO, which some clients take apart."""
    return not (info.get("cluster_state") == "ok" if isinstance(info, dict) else b"cluster_state:ok" in bytes(info))


def _free_ports(count: int) -> list[int]:
    """Find ports that are free, as are those of their buses."""
    found = []
    for port in random.sample(_PORTS, 1000):
        with suppress(OSError), socket.create_server((_HOST, port)), socket.create_server((_HOST, port + 10_000)):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError("no free ports")
