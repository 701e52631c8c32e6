"""Pods of a name in the DNS."""

import dnslib
import dnslib.server
import pytest

from kvevents import DiscoveryError
from kvevents.discovery import DnsDiscovery, DnsFollow

from .conftest import Followed, until
from .discovering import MODEL, following


class Zone(dnslib.server.BaseResolver):
    """A DNS server on loopback that answers with `records`, or with an error."""

    def __init__(self):
        self.records = {"A": [], "AAAA": []}
        self.rcode = "NOERROR"
        self._servers = []
        while len(self._servers) < 2:  # the port of the one may be taken for the other
            udp = dnslib.server.DNSServer(self, address="127.0.0.1", port=0, logger=_QUIET)
            self.port = udp.server.server_address[1]
            try:
                tcp = dnslib.server.DNSServer(self, address="127.0.0.1", port=self.port, tcp=True, logger=_QUIET)
            except OSError:
                udp.server.server_close()
            else:
                self._servers = [udp, tcp]
        for server in self._servers:
            server.start_thread()

    def resolve(self, request, handler):
        reply = request.reply()
        reply.header.rcode = getattr(dnslib.RCODE, self.rcode)
        kind = dnslib.QTYPE[request.q.qtype]
        for address in self.records[kind]:
            record = getattr(dnslib, kind)(address)
            reply.add_answer(dnslib.RR(request.q.qname, request.q.qtype, rdata=record, ttl=30))
        return reply

    def close(self):
        for server in self._servers:
            server.stop()
            server.server.server_close()
            server.thread.join()


_QUIET = dnslib.server.DNSLogger(log="-recv,-send,-request,-reply,-truncated,-error,-data", prefix=False)


@pytest.fixture
def zone():
    zone = Zone()
    yield zone
    zone.close()


def test_all_addresses_of_a_name_are_followed(zone):
    followed = Followed()
    follow = DnsFollow(
        name="vllm.inference.svc", server=f"127.0.0.1:{zone.port}", model=MODEL, ranks=2, replay_port=5600
    )
    zone.records["A"] = ["10.0.0.1", "10.0.0.2"]
    zone.records["AAAA"] = ["fd00::1"]  # the same pods once more
    with following(followed, DnsDiscovery(follow, interval_s=0.01), identity="ip:port") as follower:
        until(lambda: set(followed.pods) == {"10.0.0.1:8000", "10.0.0.2:8000"})
        assert [(one.endpoint, one.replay) for one in followed.pods["10.0.0.1:8000"].endpoints] == [
            ("tcp://10.0.0.1:5557", "tcp://10.0.0.1:5600"),
            ("tcp://10.0.0.1:5558", "tcp://10.0.0.1:5601"),
        ]
        zone.records["A"] = ["10.0.0.9", "10.0.0.1"]  # one is back under another address
        until(lambda: set(followed.pods) == {"10.0.0.1:8000", "10.0.0.9:8000"})
        for rcode in ("SERVFAIL", "NXDOMAIN", "REFUSED"):
            errors = follower.stats()["errors_total"]
            zone.rcode = rcode
            zone.records["A"] = []
            until(lambda errors=errors: follower.stats()["errors_total"] > errors + 1)
            assert set(followed.pods) == {"10.0.0.1:8000", "10.0.0.9:8000"}
        zone.records["A"] = ["10.0.0.1"]
        zone.rcode = "NOERROR"
        until(lambda: set(followed.pods) == {"10.0.0.1:8000"})
        assert followed.changes("10.0.0.1:8000") == ["+"]
        zone.records["A"] = []
        until(lambda: "[fd00::1]:8000" in followed.pods)
        zone.records["AAAA"] = []
        until(lambda: not followed.pods)


def test_an_answer_too_long_for_a_datagram_is_whole(zone):
    zone.records["A"] = [f"10.1.{high}.{low}" for high in range(4) for low in range(200)]
    follow = DnsFollow(name="vllm", server=f"127.0.0.1:{zone.port}")
    assert len(DnsDiscovery(follow, interval_s=1).read()) == 800


def test_a_server_that_is_no_address_is_refused():
    for wrong in ("dns.example", "1.2.3.4:x", "[::1"):
        with pytest.raises(DiscoveryError, match="server"):
            DnsDiscovery(DnsFollow(name="a", server=wrong), interval_s=1)
