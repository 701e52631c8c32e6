"""How our own programs ask a service: what they send and show, and whom they trust."""

import os
import ssl

import httpx

from kvindex.access import usable_token
from kvindex.config import CERT_VARIABLE, KEY_VARIABLE, TOKEN_VARIABLE
from kvindex.errors import UserError


def open_client(
    *,
    token: str = "",
    timeout: float | httpx.Timeout,
    certificate: tuple[str, str] | None = None,
    proxies: bool = True,
) -> httpx.Client:
    """Make a client that sends a token, "" for none, and shows a `certificate`, a file and that of its key, to who asks
    for one: by default what `CERT_VARIABLE` and `KEY_VARIABLE` name. `proxies` says whether the environment's are
    used.

    A server's certificate is held against the authorities in the file SSL_CERT_FILE or the folder SSL_CERT_DIR of the
    environment, else against the public ones. Raises `UserError` for a token that cannot be sent, and for authorities
    that cannot be read.
    """
    headers = {"Authorization": f"Bearer {usable_token(token, f'--token or {TOKEN_VARIABLE}')}"} if token else {}
    return httpx.Client(headers=headers, timeout=timeout, verify=_context(certificate or _own()), trust_env=proxies)


def _context(certificate: tuple[str, str] | None) -> ssl.SSLContext:
    try:
        context = httpx.create_ssl_context()
    except OSError as error:
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        raise UserError(
            f"{name} {os.environ.get(name)!r}: no certificates of authorities that can be read: {error}"
        ) from error
    if certificate is not None:
        try:
            context.load_cert_chain(*certificate, password="")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{CERT_VARIABLE} {certificate[0]!r}, {KEY_VARIABLE} {certificate[1]!r}: no certificate with its key, "
                f"both PEM, the key without a password: {error}"
            ) from error
    return context


def _own() -> tuple[str, str] | None:
    """Give the files of the environment's certificate and its key, which may be one."""
    cert, key = os.environ.get(CERT_VARIABLE, ""), os.environ.get(KEY_VARIABLE, "")
    if key and not cert:
        raise UserError(f"{KEY_VARIABLE}: needs {CERT_VARIABLE}, too; name both, or leave both out")
    return (cert, key or cert) if cert else None


def refusal_of(url: str, response: httpx.Response) -> UserError | None:
    """Give what to tell a person whose token a service did not take; None where that was not the trouble."""
    if response.status_code != httpx.codes.UNAUTHORIZED:
        return None
    return UserError(f"{url}: status 401: it wants another token, --token or {TOKEN_VARIABLE}")
