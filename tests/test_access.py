"""Who may ask: tokens and certificates, over HTTP and gRPC, for strangers and for our own programs."""

import asyncio
import contextlib
import http.server
import json
import os
import socket
import ssl
import subprocess
import sys
import threading

import grpc
import httpx
import pytest
import trustme
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kvindex.access import Access, read_tokens
from kvindex.client import open_client
from kvindex.comparing import Checker
from kvindex.config import AccessConfig, TlsConfig
from kvindex.errors import UserError
from kvindex.fleet import Fleet
from kvindex.gate import Gate
from kvindex.tls import open_tls

from .conftest import until
from .grpc_service import HEALTH, LLMD, OURS, field, llmd_request
from .serving import refusing_port, service, serving

TOKEN, OLD = "correct-horse", "battery-staple="
BEARER = {"Authorization": f"Bearer {TOKEN}"}
QUESTION = {"model": "m", "token_ids": [1]}
GRPC_QUESTION = field(1, "m") + field(2, [1])


def run(*arguments, **environ):
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("KVINDEX_", "SSL_CERT"))}
    command = [sys.executable, "-m", "kvindex", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=plain | {k: str(v) for k, v in environ.items()},
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A service with two tokens."""
    folder = tmp_path_factory.mktemp("kept")
    file = folder / "tokens"
    file.write_text(f"{OLD}\n\n")
    with service(folder, grpc=True, access_token=TOKEN, access_token_file=file) as running:
        yield running


# ---- which tokens hold


def test_tokens_come_from_the_configuration_and_from_a_file(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"\n {OLD} \r\nthird\n")
    assert read_tokens(AccessConfig()) == []
    assert read_tokens(AccessConfig(token=f"{TOKEN}\n")) == [TOKEN]
    assert read_tokens(AccessConfig(token=TOKEN, token_file=str(file))) == [TOKEN, OLD, "third"]


@pytest.mark.parametrize("token", ["", " \t\n", "two words", "not-äscii", "a\x00b"])
def test_a_token_that_cannot_be_one_is_refused_by_its_key_and_not_shown(token):
    with pytest.raises(UserError, match=r"^access\.token: ") as caught:
        read_tokens(AccessConfig(token=token))
    assert "words" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"", "no token in it"),
        (b" \n\n", "no token in it"),
        (b"good\nsecret words\n", "line 2"),
        (b"secret\xff\n", "UTF-8"),
    ],
)
def test_a_file_without_tokens_is_refused_by_its_key_and_not_shown(tmp_path, content, says):
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^access\.token_file '{file}'.*{says}") as caught:
        read_tokens(AccessConfig(token=TOKEN, token_file=str(file)))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("environ", [{"KVINDEX_ACCESS_TOKEN": ""}, {"KVINDEX_ACCESS_TOKEN_FILE": ""}])
def test_a_service_whose_token_is_empty_does_not_start(environ):
    answer = run("serve", "--port", "0", **environ)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1), answer.stderr
    assert "access.token" in answer.stderr


def test_a_token_without_a_value_in_a_file_is_refused(tmp_path):
    file = tmp_path / "kvindex.yaml"
    file.write_text("access:\n  token:\n")  # a template that had nothing to put in
    answer = run("serve", "--port", "0", "--config", str(file))
    assert (answer.returncode, "access.token" in answer.stderr) == (2, True), answer.stderr


def test_a_token_is_not_shown_where_the_configuration_is(tmp_path):
    file = tmp_path / "tokens"
    shown = run("config", KVINDEX_ACCESS_TOKEN=TOKEN, KVINDEX_ACCESS_TOKEN_FILE=file).stdout
    assert TOKEN not in shown
    assert f"token_file: {file}" in shown


@pytest.mark.parametrize("value", ["Bearer T", "bearer T", "BEARER  T "])
def test_the_scheme_may_be_spelled_otherwise(value):
    assert Access(["T"]).allows(value.encode(), "http")
    assert not Access(["T"]).allows(value.encode().replace(b"T", b""), "http")


# ---- over HTTP


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"X-Authorization": f"Bearer {TOKEN}"},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
)
def test_without_a_token_that_holds_there_is_no_answer(kept, headers):
    answer = httpx.post(f"{kept.url}/v1/score", json=QUESTION, headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["type"], problem["title"], problem["status"]) == ("about:blank", "Unauthorized", 401)
    assert "Authorization: Bearer" in problem["detail"]
    assert TOKEN not in answer.text


@pytest.mark.parametrize("token", [TOKEN, OLD])
def test_each_token_holds(kept, token):
    answer = httpx.post(f"{kept.url}/v1/score", json=QUESTION, headers={"Authorization": f"Bearer {token}"})
    assert answer.json()["scores"] == {}


def test_every_route_wants_a_token_but_those_of_probes(kept):
    routes = httpx.get(f"{kept.url}/schema/openapi.json", headers=BEARER).json()["paths"]
    asked = [(path, method.upper()) for path, methods in routes.items() for method in methods]
    asked += [("/schema", "GET"), ("/", "GET"), ("/nothing", "GET"), ("//healthz", "GET"), ("/healthz/", "GET")]
    free = [path for path, method in asked if httpx.request(method, f"{kept.url}{path}").status_code != 401]
    assert sorted(free) == ["/healthz", "/readyz"]
    assert {("/v1/score", "POST"), ("/v1/snapshot", "GET"), ("/v1/pods/{pod}", "DELETE")} <= set(asked)


def refused(kept):
    text = httpx.get(f"{kept.url}/metrics", headers=BEARER).text
    return [
        float(line.split()[1])
        for by in ("http", "grpc")
        for line in text.splitlines()
        if line.startswith(f'kvindex_unauthorized_total{{by="{by}"}}')
    ]


def test_those_who_are_refused_are_counted(kept):
    before = refused(kept)
    httpx.get(f"{kept.url}/metrics")
    with grpc.insecure_channel(kept.grpc) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(OURS)(GRPC_QUESTION, timeout=20)
    assert refused(kept) == [before[0] + 1, before[1] + 1]


# ---- over gRPC


def code_of(call):
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_grpc_wants_the_same_tokens(kept):
    with grpc.insecure_channel(kept.grpc) as channel:
        ours, llmd = channel.unary_unary(OURS), channel.unary_unary(LLMD)
        for metadata in ([], [("authorization", "Bearer wrong")], [("token", TOKEN)], [("authorization", TOKEN)]):
            for method, data in ((ours, GRPC_QUESTION), (llmd, llmd_request("1")), (ours, b"no message")):
                with pytest.raises(grpc.RpcError) as caught:
                    method(data, timeout=20, metadata=metadata)
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
                assert "Authorization: Bearer" in caught.value.details()
                assert TOKEN not in caught.value.details()
        for token in (TOKEN, OLD):
            metadata = [("authorization", f"Bearer {token}")]
            assert ours(GRPC_QUESTION, timeout=20, metadata=metadata) is not None
            assert code_of(lambda m=metadata: llmd(llmd_request("1"), timeout=20, metadata=m)) == (
                grpc.StatusCode.FAILED_PRECONDITION  # it has no tokenizer, and came so far
            )
        assert channel.unary_unary(HEALTH + "Check")(b"", timeout=20) == b"\x08\x01"
        watch = channel.unary_stream(HEALTH + "Watch")(b"", timeout=20)
        assert next(iter(watch)) == b"\x08\x01"
        watch.cancel()
        assert code_of(lambda: ProtoReflectionDescriptorDatabase(channel).get_services()) == (
            grpc.StatusCode.UNAUTHENTICATED
        )


# ---- how many at a time


def test_one_more_than_may_be_under_way_is_refused_and_probes_are_not():
    begun, go_on = threading.Semaphore(0), asyncio.Event()
    loops = []

    async def app(scope, receive, send):
        if scope["type"] == "http" and scope["path"] == "/slow":
            loops.append(asyncio.get_running_loop())
            begun.release()
            await go_on.wait()
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    gate = Gate(Access(), max_under_way=2, max_bytes_under_way=1024)
    with serving(gate.before(app)) as (url,):
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(httpx.get(f"{url}/slow"))) for _ in range(2)]
        for thread in threads:
            thread.start()
            assert begun.acquire(timeout=20)
        answer = httpx.post(f"{url}/v1/score", json=QUESTION)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.headers["content-type"] == "application/problem+json"
        assert "2 requests" in answer.json()["detail"]
        assert [httpx.get(f"{url}{path}").status_code for path in ("/healthz", "/readyz")] == [200, 200]
        counted = {metric.name: metric.samples[0].value for metric in gate.collect()}
        assert counted == {
            "kvindex_http_under_way": 2,
            "kvindex_http_bytes_under_way": 0,
            "kvindex_http_overloaded": 1,
            "kvindex_http_turned_away": 0,
            "kvindex_http_late": 0,
        }
        loops[0].call_soon_threadsafe(go_on.set)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert httpx.get(f"{url}/other").status_code == 200
        assert next(metric.samples[0].value for metric in gate.collect()) == 0


def test_more_bytes_than_may_be_under_way_are_refused(tmp_path):
    head = b"POST /v1/score HTTP/1.1\r\nhost: a\r\ncontent-length: 5000\r\n\r\n"
    with service(tmp_path, http_max_bytes_under_way=8192) as served:
        with socket.create_connection(served.address) as slow:
            slow.sendall(head + b" " * 4999)
            until(lambda: "kvindex_http_bytes_under_way 4999.0" in httpx.get(f"{served.url}/metrics").text)
            answer = httpx.post(f"{served.url}/v1/score", content=b" " * 5000)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "8192 bytes" in answer.json()["detail"]
            assert httpx.post(f"{served.url}/v1/score", json=QUESTION).status_code == 200
        until(lambda: "kvindex_http_bytes_under_way 0.0" in httpx.get(f"{served.url}/metrics").text)
        text = httpx.get(f"{served.url}/metrics").text
        assert "kvindex_http_overloaded_total 1.0" in text
        assert not served.events("request_failed")


# ---- TLS


class Certificates:
    """An authority, and what it signed for a service and for a client."""

    def __init__(self, folder):
        authority = trustme.CA()
        server, client = authority.issue_cert("127.0.0.1", "localhost"), authority.issue_cert("client@example.com")
        self.ca, self.cert, self.key, self.client = (folder / name for name in ("ca", "cert", "key", "client"))
        authority.cert_pem.write_to_path(self.ca)
        server.cert_chain_pems[0].write_to_path(self.cert)
        server.private_key_pem.write_to_path(self.key)
        client.private_key_and_cert_chain_pem.write_to_path(self.client)

    def context(self, *, client=None):
        context = ssl.create_default_context(cafile=self.ca)
        if client is not None:
            context.load_cert_chain(client)
        return context

    def channel(self, address, *, client=None):
        shown = [client.read_bytes()] * 2 if client is not None else [None, None]
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(self.ca.read_bytes(), *shown))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def sealed(certificates, tmp_path_factory):
    """A service with TLS and a token."""
    settings = {"tls_cert": certificates.cert, "tls_key": certificates.key, "access_token": TOKEN}
    with service(tmp_path_factory.mktemp("sealed"), grpc=True, **settings) as running:
        yield running


def test_tls_serves_http_and_grpc(sealed, certificates):
    assert sealed.url.startswith("https://127.0.0.1:")
    with httpx.Client(verify=certificates.context(), headers=BEARER) as client:
        assert client.post(f"{sealed.url}/v1/score", json=QUESTION).status_code == 200
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{sealed.url}/healthz")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{sealed.url.replace('https', 'http')}/healthz")
    with certificates.channel(sealed.grpc) as channel:
        metadata = [("authorization", f"Bearer {TOKEN}")]
        assert channel.unary_unary(OURS)(GRPC_QUESTION, timeout=20, metadata=metadata) is not None
        assert code_of(lambda: channel.unary_unary(OURS)(GRPC_QUESTION, timeout=20)) == grpc.StatusCode.UNAUTHENTICATED
    with grpc.insecure_channel(sealed.grpc) as channel:
        assert code_of(lambda: channel.unary_unary(HEALTH + "Check")(b"", timeout=20)) == grpc.StatusCode.UNAVAILABLE
    assert "Traceback" not in sealed.log.read_text()


def test_tls_is_1_2_or_newer(certificates):
    found = open_tls(TlsConfig(cert=str(certificates.cert), key=str(certificates.key)))
    assert found.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert b"PRIVATE KEY" in found.certificate.key
    assert "PRIVATE KEY" not in f"{found!r} {found.certificate!r}"


def test_clients_must_show_a_certificate_where_an_authority_is_named(certificates, tmp_path):
    stranger = tmp_path / "stranger"
    trustme.CA().issue_cert("client@example.com").private_key_and_cert_chain_pem.write_to_path(stranger)
    settings = {"tls_cert": certificates.cert, "tls_key": certificates.key, "tls_client_ca": certificates.ca}
    with service(tmp_path, grpc=True, **settings) as running:
        for shown, status in ((certificates.client, 200), (None, None), (stranger, None)):
            with httpx.Client(verify=certificates.context(client=shown)) as client:
                if status is None:
                    with pytest.raises(httpx.TransportError):
                        client.get(f"{running.url}/healthz")
                else:
                    assert client.get(f"{running.url}/healthz").status_code == status
            with certificates.channel(running.grpc, client=shown) as channel:
                code = code_of(lambda c=channel: c.unary_unary(OURS)(GRPC_QUESTION, timeout=20))
                assert code == (grpc.StatusCode.OK if status else grpc.StatusCode.UNAVAILABLE)
        assert "Traceback" not in running.log.read_text()


def encrypted(key):
    made = subprocess.run(
        ["openssl", "rsa", "-aes128", "-passout", "pass:secret"], input=key, capture_output=True, check=False
    )
    return made.stdout


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cert": "cert"}, r"^tls\.cert: needs tls\.key"),
        ({"key": "key"}, r"^tls\.key: needs tls\.cert"),
        ({"client_ca": "ca"}, r"^tls\.client_ca: without"),
        ({"cert": "nowhere", "key": "key"}, r"^tls\.cert '.*nowhere': No such file"),
        ({"cert": "cert", "key": "nowhere"}, r"^tls\.key '.*nowhere': No such file"),
        ({"cert": "", "key": "key"}, r"^tls\.cert '.*': "),
        ({"cert": "broken", "key": "key"}, r"^tls\.cert '.*broken', tls\.key '.*key': no certificate with its key"),
        ({"cert": "cert", "key": "broken"}, "no certificate with its key"),
        ({"cert": "cert", "key": "other"}, "no certificate with its key"),
        ({"cert": "cert", "key": "locked"}, "without a password"),
        ({"cert": "cert", "key": "key", "client_ca": "nowhere"}, r"^tls\.client_ca '.*nowhere': No such file"),
        ({"cert": "cert", "key": "key", "client_ca": "broken"}, r"^tls\.client_ca '.*broken': no certificates"),
    ],
)
def test_files_that_are_no_certificates_are_refused_by_their_key(certificates, tmp_path, given, says):
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_bytes(getattr(certificates, name).read_bytes())
    (tmp_path / "broken").write_text("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(tmp_path / "other")
    if "locked" in given.values():
        key = trustme.CA(key_type=trustme.KeyType.RSA).issue_cert("localhost", key_type=trustme.KeyType.RSA)
        (tmp_path / "locked").write_bytes(encrypted(key.private_key_pem.bytes()))
        key.cert_chain_pems[0].write_to_path(tmp_path / "cert")
        assert b"ENCRYPTED" in (tmp_path / "locked").read_bytes()
    with pytest.raises(UserError, match=says) as caught:
        open_tls(TlsConfig(**{name: str(tmp_path / file) if file else "" for name, file in given.items()}))
    assert "\n" not in str(caught.value)


def test_a_service_without_its_key_does_not_start(certificates):
    answer = run("serve", "--port", "0", KVINDEX_TLS_CERT=certificates.cert)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1), answer.stderr
    assert "tls.key" in answer.stderr


# ---- our own programs


@pytest.mark.parametrize("way", ["option", "variable"])
@pytest.mark.parametrize(
    "command",
    [
        ["score", "--json", "--url", "URL", "1"],
        ["watch", "--seconds", "0.1", "--url", "URL"],
        ["doctor", "--url", "URL"],
    ],
    ids=lambda command: command[0],
)
def test_our_programs_send_a_token_and_trust_an_authority(sealed, certificates, command, way):
    command = [sealed.url if word == "URL" else word for word in command]
    option, variable = ["--token", TOKEN], {"KVINDEX_TOKEN": TOKEN}
    given = (option, {}) if way == "option" else ([], variable)
    answer = run(*command, *given[0], SSL_CERT_FILE=certificates.ca, **given[1])
    assert answer.returncode in ((0, 1) if command[0] == "doctor" else (0,)), answer.stderr
    assert answer.stdout
    answer = run(*command, "--token", "wrong", SSL_CERT_FILE=certificates.ca)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1), answer.stderr
    assert "401: it wants another token, --token or KVINDEX_TOKEN" in answer.stderr
    answer = run(*command, *given[0], **given[1])
    assert (answer.returncode, "certificate verify failed" in answer.stderr) == (2, True), answer.stderr


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"KVINDEX_TOKEN": "two words"}, "--token or KVINDEX_TOKEN: a token has"),
        ({"SSL_CERT_FILE": "/nowhere/ca.pem"}, "SSL_CERT_FILE '/nowhere/ca.pem'"),
        ({"SSL_CERT_FILE": __file__}, "SSL_CERT_FILE"),
    ],
)
def test_what_cannot_be_sent_or_trusted_is_one_line(environ, says):
    answer = run("score", "--url", f"https://127.0.0.1:{refusing_port()}", "1", **environ)
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1), answer.stderr
    assert says in answer.stderr
    assert "two words" not in answer.stderr


def test_the_token_of_programs_is_no_key_of_a_service(tmp_path):
    with service(tmp_path, token="mine") as running:  # noqa: S106
        assert httpx.get(f"{running.url}/v1/pods").status_code == 200  # and it wants none


def test_a_token_is_for_the_service_and_not_for_an_engine(sealed, certificates):
    seen = []

    class Engine(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("Authorization"))
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with contextlib.closing(http.server.HTTPServer(("127.0.0.1", 0), Engine)) as engine:
        engine.close = engine.server_close
        threading.Thread(target=engine.serve_forever, daemon=True).start()
        pods = [f"tcp://127.0.0.1:{refusing_port()}", "--seconds", "0.1"]
        asked = ["--engine", f"http://127.0.0.1:{engine.server_port}", "--url", sealed.url, "--token", TOKEN]
        answer = run("doctor", *pods, *asked, SSL_CERT_FILE=certificates.ca)
        engine.shutdown()
    assert (answer.returncode, seen) == (1, [None, None]), answer.stderr


def test_replicas_ask_each_other_with_what_they_have_themselves(certificates, tmp_path, monkeypatch):
    """The token, and where clients have to show a certificate, that too."""
    settings = {"tls_cert": certificates.cert, "tls_key": certificates.key, "tls_client_ca": certificates.ca}
    settings |= {"access_token": TOKEN, "SSL_CERT_FILE": certificates.ca}
    with Fleet(2, num_blocks=256) as fleet:
        settings["pods"] = json.dumps(fleet.endpoints())
        with service(tmp_path, **settings) as first:
            until(lambda: all(pod.publisher.subscribers for pod in fleet.pods))
            prompt = list(range(64))
            for number in range(2):
                fleet.step(number, prompt)
            monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
            shown = (str(certificates.client), str(certificates.client))
            with open_client(token=TOKEN, timeout=20, certificate=shown) as client:
                until(lambda: client.get(f"{first.url}/readyz").status_code == 200)
            peers = json.dumps([first.url])
            with service(tmp_path, snapshot_peers=peers, **settings) as second:
                (loaded,) = second.events("snapshot_loaded")
                assert loaded["source"] == first.url
            with service(tmp_path, snapshot_peers=peers, **settings | {"access_token": "another"}) as other:
                (refusal,) = other.events("peer_not_used")
                assert "401" in refusal["error"]


def test_our_programs_show_the_certificate_of_the_environment(certificates, tmp_path):
    settings = {"tls_cert": certificates.cert, "tls_key": certificates.key, "tls_client_ca": certificates.ca}
    with service(tmp_path, **settings) as running:
        trusting = {"SSL_CERT_FILE": certificates.ca}
        for shown in ({}, {"KVINDEX_CLIENT_KEY": certificates.client}):
            for program in (("score", "--url", running.url, "1"), ("doctor", "--url", running.url)):
                shows = run(*program, **trusting, **shown, KVINDEX_CLIENT_CERT=certificates.client)
                assert "no pod has said anything" in shows.stdout or "best: None" in shows.stdout, shows
                assert run(*program, **trusting).returncode == 2
        for wrong, named in (
            ({"KVINDEX_CLIENT_KEY": certificates.client}, "KVINDEX_CLIENT_KEY: needs KVINDEX_CLIENT_CERT"),
            ({"KVINDEX_CLIENT_CERT": certificates.cert}, "KVINDEX_CLIENT_CERT '"),
            ({"KVINDEX_CLIENT_CERT": tmp_path / "nowhere"}, "No such file"),
        ):
            answer = run("score", "--url", running.url, "1", **trusting, **wrong)
            assert (answer.returncode, named in answer.stderr, answer.stderr.count("\n")) == (2, True, 1), answer.stderr


def test_a_fleet_checks_a_service_that_wants_a_token(tmp_path):
    with (
        Fleet(1, num_blocks=256) as fleet,
        service(tmp_path, access_token=TOKEN, pods=json.dumps(fleet.endpoints())) as running,
    ):
        until(lambda: fleet.pods[0].publisher.subscribers)
        fleet.step(0, list(range(64)))
        for token, differences in ((TOKEN, 0), ("", 1)):
            checker = Checker(fleet, running.url, token=token)
            seen = checker.check([list(range(64))], threading.Event())
            checker.close()
            assert len(seen.differences) == differences, seen.differences
