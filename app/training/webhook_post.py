"""One HTTPS POST to an address that a tenant gave: public addresses only, no redirects, bounded in time and answer.

The name is resolved once and the connection goes to the address that was judged, so a name that changes its answer in
between (DNS rebinding) reaches nothing inside.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from urllib.parse import urlsplit

TIMEOUT_S = 10.0  # without a byte
WALL_S = 15.0  # for all of it, however its bytes drip
MAX_ANSWER_BYTES = 4096
MAX_URL_CHARS = 2048

Resolve = Callable[[str, int], Sequence[str]]  # host, port -> addresses


class UrlRefused(Exception):
    """The URL is not one that messages are sent to. It must be https, without credentials, and lead to the internet."""


class PostFailed(Exception):
    """Nobody answered, or not in HTTP."""


def check_url(url: str) -> None:
    """What can be said of a URL without looking its name up. Raises UrlRefused."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UrlRefused("its host or port cannot be read") from None
    if len(url) > MAX_URL_CHARS or any(not char.isprintable() or char.isspace() for char in url) or not url.isascii():
        raise UrlRefused("the URL is too long or holds characters that belong in no URL")
    if parts.scheme != "https" or not parts.hostname:
        raise UrlRefused("the URL must begin with https://")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise UrlRefused("the URL must carry no credentials and no fragment")
    if port not in (None, 443, 8443):
        raise UrlRefused("the port must be 443 or 8443")
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:
        return
    if not is_public(str(address)):
        raise UrlRefused("the address is not on the internet")


def is_public(address: str) -> bool:
    """True for an address of the internet; false for private, loopback, link-local, multicast and embedded ones."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if embedded is not None:
            return is_public(str(embedded))
        if parsed in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed.is_global and not parsed.is_multicast


def resolve(host: str, port: int) -> Sequence[str]:
    """The host's addresses, as the system finds them. Raises OSError."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class _Connection(http.client.HTTPSConnection):
    """Connects to one address, while the certificate is checked against the name."""

    def __init__(self, host: str, port: int, address: str) -> None:
        self._context_of_ours = ssl.create_default_context()
        super().__init__(host, port, timeout=TIMEOUT_S, context=self._context_of_ours)
        self._address = address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), timeout=TIMEOUT_S)
        try:
            # The handshake comes after: whoever cuts the connection must find the socket while it goes on.
            wrapped = self._context_of_ours.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        except BaseException:
            plain.close()
            raise
        self.sock = wrapped
        wrapped.do_handshake()


def post(url: str, body: bytes, headers: Mapping[str, str], *, resolver: Resolve = resolve) -> int:
    """Send `body` and return the status; a redirect is a status like any other. Raises UrlRefused, PostFailed."""
    check_url(url)
    until = time.monotonic() + WALL_S
    parts = urlsplit(url)
    host, port = str(parts.hostname), parts.port or 443
    addresses = _resolved(resolver, host, port, TIMEOUT_S)
    if not addresses or not all(is_public(address) for address in addresses):
        raise UrlRefused("the name leads to an address that is not on the internet")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = _Connection(host, port, addresses[0])
    return exchange(connection, path, body, headers, within_s=until - time.monotonic())


def exchange(
    connection: http.client.HTTPConnection, path: str, body: bytes, headers: Mapping[str, str], *, within_s: float
) -> int:
    """POST over `connection` and close it; `within_s` bounds everything from connecting to the answer's last byte.

    The sockets' own timeouts bound silence alone, and a byte now and then would hold us for ever. Raises PostFailed.
    """
    is_over = threading.Event()
    threading.Thread(target=_cut_after, args=(connection, within_s, is_over), name="webhook-cut", daemon=True).start()
    try:
        connection.request("POST", path, body=body, headers=dict(headers))
        answer = connection.getresponse()
        answer.read(MAX_ANSWER_BYTES)
        return answer.status
    except (OSError, http.client.HTTPException) as exc:
        raise PostFailed(type(exc).__name__) from exc
    finally:
        is_over.set()
        connection.close()


def _cut_after(connection: http.client.HTTPConnection, seconds: float, is_over: threading.Event) -> None:
    """Shut the connection down under its reader, who then sees its end; again, in case it only comes to be now."""
    is_over.wait(seconds)
    while not is_over.is_set():
        sock = connection.sock
        if sock is not None:
            with suppress(OSError):  # over already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        is_over.wait(0.1)


def _resolved(resolver: Resolve, host: str, port: int, within_s: float) -> Sequence[str]:
    """Look a name up, in a thread of its own: the system's resolver takes no time limit. Raises PostFailed."""
    found: Future[Sequence[str]] = Future()

    def look_up() -> None:
        try:
            found.set_result(resolver(host, port))
        except Exception as exc:
            found.set_exception(exc)

    threading.Thread(target=look_up, name="webhook-name", daemon=True).start()
    try:
        return found.result(within_s)
    except (OSError, UnicodeError) as exc:  # TimeoutError is an OSError
        raise PostFailed("the name cannot be resolved") from exc
