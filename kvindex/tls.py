"""TLS of the service itself: one certificate for HTTP and gRPC."""

import ssl
from pathlib import Path
from typing import NamedTuple

from msgspec import UNSET

from kvindex.config import TlsConfig
from kvindex.errors import UserError


class Tls(NamedTuple):
    """A certificate and what it takes to use it."""

    context: ssl.SSLContext
    """For the HTTP server."""
    cert: bytes
    key: bytes
    client_ca: bytes | None
    """Who signs certificates of clients; None where they need none."""
    files: tuple[str, str]
    """Certificate and key, to show them as a client."""

    def __repr__(self) -> str:  # a key must not get into a log
        return f"Tls({self.files[0]!r})"


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
    cert, key = _read("tls.cert", config.cert), _read("tls.key", config.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # without a password it would be asked for at the terminal
        context.load_cert_chain(config.cert, config.key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise UserError(
            f"tls.cert {config.cert!r}, tls.key {config.key!r}: no certificate with its key, both PEM, the key without "
            f"a password: {error}"
        ) from error
    client_ca = None
    if config.client_ca is not UNSET:
        client_ca = _read("tls.client_ca", config.client_ca)
        try:
            context.load_verify_locations(config.client_ca)
        except ssl.SSLError as error:
            raise UserError(f"tls.client_ca {config.client_ca!r}: no certificates in PEM: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return Tls(context, cert, key, client_ca, (config.cert, config.key))


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{name} {path!r}: {getattr(error, 'strerror', None) or error}") from error
