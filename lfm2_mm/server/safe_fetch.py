"""Fetches what a remote caller names, from public addresses only.

The address that is checked is the very address that is connected to, on every redirect too: a name
cannot point elsewhere in between. Proxy variables of the environment are not used. Knows nothing
of what is fetched.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Collection
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING

from lfm2_mm.errors import FetchError
from lfm2_mm.fetch import fetch, shown

if TYPE_CHECKING:
    import httpx2

__all__ = ["PublicFetcher", "is_public"]

_PORTS = (80, 443)
_PROTOCOLS = ipaddress.ip_network("192.0.0.0/24")  # RFC 6890; only parts of it count as private
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Collection[str]]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, whatever it is wrapped in.

    Addresses that carry an IPv4 address (mapped, 6to4, Teredo, NAT64) count as what they carry.
    """
    try:
        found: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64_LOCAL:
            return False
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        carried = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        if any(inner is not None for inner in carried):
            return all(is_public(str(inner)) for inner in carried if inner is not None)
        if int(found) >> 32 == 0:  # IPv4-compatible, long out of use
            return False
    return (
        found.is_global
        and found not in _PROTOCOLS
        and not (
            found.is_multicast or found.is_reserved or found.is_unspecified or found.is_loopback
        )
    )


def _resolve(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class PublicFetcher:
    """Reads URLs for callers who must not reach what only this machine can reach.

    Args:
        max_bytes: Size of an answer, at most.
        timeout: Seconds for a whole transfer.
        hosts: If not empty, only these hosts (on any port) are asked; they must be public too.
        resolve: Host and port to addresses; another one only in tests.
        transport: Sends requests; another one only in tests.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout: float,
        hosts: Collection[str] = (),
        resolve: Resolver = _resolve,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        import httpx2

        self.max_bytes, self.timeout = max_bytes, timeout
        self._hosts = frozenset(host.lower() for host in hosts)
        self._resolve = resolve
        inner = transport if transport is not None else httpx2.HTTPTransport()

        class Checked(httpx2.BaseTransport):
            """Connects to the address that was checked, and to no other."""

            def handle_request(self, request: httpx2.Request) -> httpx2.Response:
                return inner.handle_request(_pinned(request))

            def close(self) -> None:
                inner.close()

        def _pinned(request: httpx2.Request) -> httpx2.Request:
            url = request.url
            port = url.port or (443 if url.scheme == "https" else 80)
            address = self._checked(url.host, port, str(url))
            request.headers["host"] = url.netloc.decode("ascii")
            request.extensions = {**request.extensions, "sni_hostname": url.host}
            request.url = url.copy_with(host=address)
            return request

        # addresses take the place of names, so cookies would reach other hosts behind them
        nothing = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        self._client = httpx2.Client(transport=Checked(), trust_env=False, cookies=nothing)

    def __call__(self, url: str) -> bytes:
        """The bytes behind an http(s) or data URL.

        Raises:
            FetchError: if the host is not allowed or not public, or the transfer fails.
        """
        return fetch(url, max_bytes=self.max_bytes, timeout=self.timeout, client=self._client)

    def close(self) -> None:
        """Give connections back."""
        self._client.close()

    def _checked(self, host: str, port: int, url: str) -> str:
        """An address of the host, after looking at all of them."""
        name = host.lower().rstrip(".")
        if self._hosts and name not in self._hosts:
            raise FetchError(
                f"{shown(url)} is on the host {host!r}, which this server does not fetch from; "
                "send the picture itself as a data URL"
            )
        if port not in _PORTS and name not in self._hosts:
            raise FetchError(
                f"{shown(url)} names the port {port}, which this server does not fetch from; send "
                "the picture itself as a data URL"
            )
        try:
            addresses = list(self._resolve(host, port))
        except (OSError, UnicodeError) as error:
            raise FetchError(
                f"no host named {host!r} was found for {shown(url)}; check the spelling"
            ) from error
        if not addresses or not all(is_public(address) for address in addresses):
            raise FetchError(
                f"{shown(url)} leads to an address that is not public, which this server does not "
                "fetch from; send the picture itself as a data URL"
            )
        return addresses[0]
