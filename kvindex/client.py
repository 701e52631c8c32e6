"""How our own programs ask a service: with its token, and trusting the authority that signed its certificate."""

import os
import ssl

import httpx

from kvindex.access import usable_token
from kvindex.config import TOKEN_VARIABLE
from kvindex.errors import UserError


def open_client(
    *,
    token: str = "",
    timeout: float | httpx.Timeout,
    certificate: tuple[str, str] | None = None,
    proxies: bool = True,
) -> httpx.Client:
    """Make a client that sends a token, "" for none; `certificate` is a file and that of its key, to be shown.
    `proxies` says whether those of the environment are used.

    A server's certificate is held against the authorities in the file SSL_CERT_FILE or the folder SSL_CERT_DIR of the
    environment, else against the public ones. Raises `UserError` for a token that cannot be sent, and for authorities
    that cannot be read.
    """
    headers = {"Authorization": f"Bearer {usable_token(token, f'--token or {TOKEN_VARIABLE}')}"} if token else {}
    return httpx.Client(headers=headers, timeout=timeout, verify=_authorities(certificate), trust_env=proxies)


def _authorities(certificate: tuple[str, str] | None) -> ssl.SSLContext:
    try:
        context = httpx.create_ssl_context()
    except OSError as error:
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        raise UserError(
            f"{name} {os.environ.get(name)!r}: no certificates of authorities that can be read: {error}"
        ) from error
    if certificate is not None:
        context.load_cert_chain(*certificate)
    return context


def refusal_of(url: str, response: httpx.Response) -> UserError | None:
    """Give what to tell a person whose token a service did not take; None where that was not the trouble."""
    if response.status_code != httpx.codes.UNAUTHORIZED:
        return None
    return UserError(f"{url}: status 401: it wants another token, --token or {TOKEN_VARIABLE}")
