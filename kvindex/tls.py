"""TLS of the service itself: one certificate for HTTP and gRPC."""

import math
import re
import ssl
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from msgspec import UNSET
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvindex.config import TlsConfig
from kvindex.errors import UserError

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VERSION, _UTC_TIME = 0xA0, 0x17
"""Tags of DER: of what old certificates leave out, and of a time with a year of two digits."""


class Certificate(NamedTuple):
    """What the files have, PEM."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    """Who signs certificates of clients; None where they need none."""

    def __repr__(self) -> str:  # a key must not get into a log
        return f"Certificate({len(self.cert)} bytes)"


class Tls(Collector):
    """The certificate, which may be exchanged in its files while it is used. `files` are its own and that of its key,
    to show them as a client.
    """

    def __init__(self, cert: str, key: str, client_ca: str | None) -> None:
        """Raise `UserError`, which names the key of the configuration, for a file that cannot be used."""
        self.files = cert, key
        self._client_ca = client_ca
        self.certificate = self._pem()
        self.context = self._context(self.certificate)
        """Of connections that begin now. Each certificate has another one, so that none goes on from what was agreed
        upon with one before: who was let in once is not, when their authority does not hold any more."""

    def __repr__(self) -> str:
        return f"Tls({self.files[0]!r})"

    def collect(self) -> Iterator[Metric]:
        """Give the metrics."""
        yield GaugeMetricFamily(
            "kvindex_certificate_end_timestamp_seconds",
            "When the first of the certificates that are shown ends, in seconds since the epoch",
            value=ends_at(self.certificate.cert),
        )

    def renew(self) -> bool:
        """Take what is in the files now; say whether it is another than before.

        Raises `UserError`, and goes on with what it has.
        """
        certificate = self._pem()
        if certificate == self.certificate:
            return False
        context = self._context(certificate)
        if certificate != self._pem():  # they change at this moment
            return False
        self.certificate, self.context = certificate, context
        return True

    def _pem(self) -> Certificate:
        cert, key = self.files
        client_ca = None if self._client_ca is None else _file("tls.client_ca", self._client_ca)
        return Certificate(_file("tls.cert", cert), _file("tls.key", key), client_ca)

    def _context(self, certificate: Certificate) -> ssl.SSLContext:
        cert, key = self.files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # without a password it would be asked for at the terminal
            context.load_cert_chain(cert, key, password="")
        except (OSError, ValueError) as error:
            raise UserError(
                f"tls.cert {cert!r}, tls.key {key!r}: no certificate with its key, both PEM, the key without "
                f"a password: {error}"
            ) from error
        if certificate.client_ca is not None:
            try:
                context.load_verify_locations(cadata=certificate.client_ca.decode("ascii", "replace"))
            except (ssl.SSLError, ValueError) as error:
                raise UserError(f"tls.client_ca {self._client_ca!r}: no certificates in PEM: {error}") from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def ends_at(pem: bytes) -> float:
    """Give the seconds since the epoch at which the first of some certificates is not valid any more.

    Not a number where they do not say it as they should: OpenSSL takes them all the same.
    """
    try:
        return min(_ends_at(ssl.PEM_cert_to_DER_cert(found.decode("ascii"))) for found in _PEM.findall(pem))
    except (ValueError, IndexError):
        return math.nan


def _ends_at(der: bytes) -> float:
    """Read it from where RFC 5280 puts it: the standard library says it of the certificates of others alone."""
    _, at, _ = _part(der, 0)
    _, at, _ = _part(der, at)  # what is signed
    before = 3 + (der[at] == _VERSION)  # version, serial number, algorithm, issuer
    for _ in range(before):
        _, _, at = _part(der, at)
    _, at, _ = _part(der, at)  # validity: from when, and until when
    _, _, at = _part(der, at)
    tag, at, end = _part(der, at)
    said = der[at:end].decode("ascii")
    if tag == _UTC_TIME:
        said = f"{'19' if said >= '5' else '20'}{said}"
    return datetime.strptime(said, "%Y%m%d%H%M%S%z").timestamp()


def _part(der: bytes, at: int) -> tuple[int, int, int]:
    """Give a tag, and where what it has begins and ends."""
    tag, length, at = der[at], der[at + 1], at + 2
    if length & 0x80:  # as many bytes that say it
        length, at = int.from_bytes(der[at : at + (length & 0x7F)]), at + (length & 0x7F)
    return tag, at, at + length


def open_tls(config: TlsConfig) -> Tls | None:
    """Read certificate and key; give None where none are named.

    Raises `UserError`, which names the key of the configuration, for a file that cannot be used and for one without
    the other.
    """
    if config.cert is UNSET and config.key is UNSET:
        if config.client_ca is not UNSET:
            raise UserError("tls.client_ca: without tls.cert and tls.key there is no TLS; name them, or leave it out")
        return None
    if config.cert is UNSET or config.key is UNSET:
        named, missing = ("tls.key", "tls.cert") if config.cert is UNSET else ("tls.cert", "tls.key")
        raise UserError(f"{named}: needs {missing}, too; name both, or leave both out for plain HTTP")
    return Tls(config.cert, config.key, None if config.client_ca is UNSET else config.client_ca)


def _file(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{name} {path!r}: {getattr(error, 'strerror', None) or error}") from error
