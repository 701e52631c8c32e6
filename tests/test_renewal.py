"""Tokens and certificates that are exchanged while the service runs."""

import math
import socket
import ssl
from datetime import UTC, datetime

import grpc
import httpx
import pytest
import trustme

from kvindex.access import Access, read_tokens
from kvindex.config import AccessConfig, TlsConfig
from kvindex.errors import UserError
from kvindex.renewal import Renewal
from kvindex.tls import ends_at, open_tls

from .conftest import until
from .grpc_service import HEALTH, OURS, field
from .serving import service
from .test_access import Certificates, code_of

QUESTION = {"model": "m", "token_ids": [1]}
GRPC_QUESTION = field(1, "m") + field(2, [1])
OLD, NEW = "battery-staple", "correct-horse"


def replaced(path, content):
    """Exchange a file at once, as a mounted secret is."""
    other = path.with_name(f"{path.name}.new")
    other.write_bytes(content)
    other.replace(path)


def said_of(renewal):
    """The metrics by name and section."""
    return {
        (sample.name, sample.labels["section"]): sample.value
        for metric in renewal.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def test_a_token_that_is_exchanged_in_its_file_holds_from_then_on(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(OLD)
    with service(tmp_path, grpc=True, access_token_file=file) as served, grpc.insecure_channel(served.grpc) as channel:

        def status(token):
            headers = {"Authorization": f"Bearer {token}"}
            return httpx.post(f"{served.url}/v1/score", json=QUESTION, headers=headers).status_code

        def asks(token):
            metadata = [("authorization", f"Bearer {token}")]
            return code_of(lambda: channel.unary_unary(OURS)(GRPC_QUESTION, timeout=20, metadata=metadata))

        assert (status(OLD), status(NEW)) == (200, 401)
        replaced(file, f"{NEW}\n".encode())
        until(lambda: status(NEW) == 200)
        assert status(OLD) == 401
        assert (asks(OLD), asks(NEW)) == (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.OK)
        text = httpx.get(f"{served.url}/metrics", headers={"Authorization": f"Bearer {NEW}"}).text
        assert 'kvindex_secrets_renewed_total{section="access"} 1.0' in text
        assert [line["section"] for line in served.events("secrets_renewed")] == ["access"]
        assert NEW not in served.log.read_text()


def test_what_is_of_no_use_changes_nothing_and_is_said_once(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(OLD)
    config = AccessConfig(token_file=str(file))
    access = Access(read_tokens(config))
    renewal = Renewal({"access": lambda: access.renew(read_tokens(config))})

    def look():
        renewal.look()
        said = said_of(renewal)
        return access.allows(f"Bearer {OLD}".encode(), "http"), *said.values()

    assert look() == (True, 0, 0)
    for wrong in (b"", b"two words\n", None):
        if wrong is None:
            file.unlink()
        else:
            replaced(file, wrong)
        assert look() == look() == (True, 0, 1)
    replaced(file, f"{NEW}\n{OLD}\n".encode())
    assert look() == look() == (True, 1, 0)
    replaced(file, f"{NEW}\n".encode())
    assert look() == (False, 2, 0)


@pytest.fixture
def folders(tmp_path):
    """Certificates of two authorities; the first ones are in use."""
    both = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        both.append(Certificates(tmp_path / name))
    used = tmp_path / "used"
    used.mkdir()
    for name in ("ca", "cert", "key"):
        (used / name).write_bytes((tmp_path / "one" / name).read_bytes())
    return used, *both


def greets(served, trusted, client=None):
    """Whether a new connection comes about, over HTTP and over gRPC."""
    try:
        with httpx.Client(verify=trusted.context(client=client)) as asking:
            over_http = asking.get(f"{served.url}/healthz").status_code == 200
    except httpx.TransportError:
        over_http = False
    with trusted.channel(served.grpc, client=client) as channel:
        over_grpc = code_of(lambda: channel.unary_unary(HEALTH + "Check")(b"", timeout=20)) == grpc.StatusCode.OK
    return over_http, over_grpc


def test_a_certificate_that_is_exchanged_is_shown_to_new_connections(folders, tmp_path):
    used, one, other = folders
    settings = {"tls_cert": used / "cert", "tls_key": used / "key"}
    with service(tmp_path / "one", grpc=True, **settings) as served, httpx.Client(verify=one.context()) as kept:
        assert (greets(served, one), greets(served, other)) == ((True, True), (False, False))
        assert kept.get(f"{served.url}/healthz").status_code == 200
        replaced(used / "cert", other.cert.read_bytes())  # half of it: what was there before holds
        until(lambda: served.events("secrets_kept"))
        assert greets(served, one) == (True, True)
        replaced(used / "key", other.key.read_bytes())
        until(lambda: greets(served, other) == (True, True))
        assert greets(served, one) == (False, False)
        assert kept.get(f"{served.url}/healthz").status_code == 200  # its connection is from before
        assert 'kvindex_secrets_unusable{section="tls"} 0.0' in kept.get(f"{served.url}/metrics").text
        assert len(served.events("secrets_renewed")) == 1


def test_an_authority_of_clients_that_is_exchanged_lets_in_its_own_and_no_others(folders, tmp_path):
    used, one, other = folders
    settings = {"tls_cert": used / "cert", "tls_key": used / "key", "tls_client_ca": used / "ca"}
    with service(tmp_path / "one", grpc=True, **settings) as served:
        assert greets(served, one, one.client) == (True, True)
        assert greets(served, one, other.client) == greets(served, one) == (False, False)
        replaced(used / "ca", other.ca.read_bytes())
        until(lambda: greets(served, one, other.client) == (True, True))
        assert greets(served, one, one.client) == greets(served, one) == (False, False)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_who_was_let_in_once_does_not_go_on_from_that_when_their_authority_does_not_hold_any_more(
    folders, tmp_path, version
):
    used, one, other = folders
    context = one.context(client=one.client)
    context.maximum_version = version

    def asks(served, session=None):
        """The session that a connection ended with, and whether it went on from another one."""
        with (
            socket.create_connection(served.address, timeout=20) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1", session=session) as sealed,
        ):
            sealed.sendall(b"GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            if not sealed.recv(100):
                raise ConnectionResetError("without a word, as some of OpenSSL's versions see it")
            return sealed.session, sealed.session_reused

    settings = {"tls_cert": used / "cert", "tls_key": used / "key", "tls_client_ca": used / "ca"}
    with service(tmp_path / "one", **settings) as served:
        session, _ = asks(served)
        session, went_on = asks(served, session)
        assert went_on
        replaced(used / "ca", other.ca.read_bytes())
        until(lambda: served.events("secrets_renewed"))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            asks(served, session)


def test_it_is_known_when_the_first_of_the_certificates_ends(folders, tmp_path):
    used, one, _ = folders
    ends = [datetime(year, 12, 31, 23, 59, 58, tzinfo=UTC) for year in (2049, 2050)]  # said in two ways
    by_year = [trustme.CA().issue_cert("localhost", not_after=end).cert_chain_pems[0].bytes() for end in ends]
    assert [ends_at(pem) for pem in by_year] == [end.timestamp() for end in ends]
    assert ends_at(by_year[1] + b"and a word\n" + by_year[0]) == ends[0].timestamp()
    assert math.isnan(ends_at(b"-----BEGIN TRUSTED CERTIFICATE-----"))

    def said(tls):
        (metric,) = tls.collect()
        return metric.name, metric.samples[0].value

    tls = open_tls(TlsConfig(cert=str(used / "cert"), key=str(used / "key")))
    name, before = said(tls)
    assert (name, before) == ("kvindex_certificate_end_timestamp_seconds", ends_at(one.cert.read_bytes()))
    authority = trustme.CA()
    renewed = authority.issue_cert("localhost", not_after=ends[1])
    replaced(used / "cert", renewed.cert_chain_pems[0].bytes())
    with pytest.raises(UserError):
        tls.renew()
    assert said(tls) == (name, before)
    replaced(used / "key", renewed.private_key_pem.bytes())
    assert tls.renew()
    assert said(tls) == (name, ends[1].timestamp())
    assert not tls.renew()
