"""Which addresses are public, and that what is checked is what is connected to."""

from __future__ import annotations

import httpx2
import pytest

from lfm2_mm.errors import FetchError
from lfm2_mm.server.safe_fetch import PublicFetcher, is_public

PRIVATE = (
    "0.0.0.0 0.1.2.3 10.1.2.3 100.64.0.1 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1 "
    "192.0.0.8 192.168.1.1 198.18.0.1 203.0.113.5 224.0.0.1 240.0.0.1 255.255.255.255 "
    ":: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe "
    "64:ff9b:1::1 2002:7f00:1:: 2002:a00:1:: 2001:0:a00:1::1 fc00::1 fd12::1 fe80::1 fe80::1%eth0 "
    "ff02::1 2001:db8::1 localhost example.org 127.1 1.2.3 0x7f.1"
).split()
PUBLIC = "1.1.1.1 8.8.8.8 93.184.216.34 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808".split()


@pytest.mark.parametrize("address", PRIVATE)
def test_what_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_public(address: str) -> None:
    assert is_public(address)


class Net:
    """Hosts with addresses, and a transport that remembers what it connected to."""

    def __init__(self, hosts: dict[str, list[str]], pages: dict[str, httpx2.Response]) -> None:
        self.hosts, self.pages = hosts, pages
        self.connected: list[tuple[str, str, str]] = []
        self.asked: list[str] = []

    def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.hosts:
            raise OSError("unknown")
        return self.hosts[host]

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        sni = request.extensions["sni_hostname"]
        self.connected.append((request.url.host, request.headers["host"], sni))
        return self.pages[request.headers["host"]]

    def fetcher(self, hosts: tuple[str, ...] = ()) -> PublicFetcher:
        return PublicFetcher(
            max_bytes=100,
            timeout=5,
            hosts=hosts,
            resolve=self.resolve,
            transport=httpx2.MockTransport(self.answer),
        )


def test_it_connects_to_the_address_it_checked() -> None:
    net = Net({"a.example": ["93.184.216.34"]}, {"a.example": httpx2.Response(200, content=b"x")})
    assert net.fetcher()("https://a.example/p.png") == b"x"
    assert net.connected == [("93.184.216.34", "a.example", "a.example")]
    assert net.asked == ["a.example"]  # once: there is no second look-up to be lied to


def test_one_private_address_among_several_is_enough() -> None:
    net = Net({"a.example": ["93.184.216.34", "10.0.0.1"]}, {})
    with pytest.raises(FetchError, match="leads to an address that is not public"):
        net.fetcher()("http://a.example/p.png")
    assert net.connected == []


@pytest.mark.parametrize("where", ["http://b.example/", "http://127.0.0.1/", "http://[::1]/x"])
def test_redirects_are_checked_too(where: str) -> None:
    net = Net(
        {
            "a.example": ["93.184.216.34"],
            "b.example": ["192.168.0.1"],
            "127.0.0.1": ["127.0.0.1"],
            "::1": ["::1"],
        },
        {"a.example": httpx2.Response(302, headers={"location": where})},
    )
    with pytest.raises(FetchError, match="leads to an address that is not public"):
        net.fetcher()("http://a.example/p.png")
    assert len(net.connected) == 1


def test_other_ports_and_hosts() -> None:
    net = Net(
        {"a.example": ["93.184.216.34"]},
        {"a.example:8443": httpx2.Response(200, content=b"x")},
    )
    with pytest.raises(FetchError, match="names the port 8443, which this server does not fetch"):
        net.fetcher()("https://a.example:8443/p.png")
    allowed = net.fetcher(("A.example",))
    assert allowed("https://a.example:8443/p.png") == b"x"
    with pytest.raises(FetchError, match="is on the host 'c.example', which this server does not"):
        allowed("https://c.example/p.png")


def test_size_and_unknown_hosts() -> None:
    net = Net(
        {"a.example": ["93.184.216.34"]},
        {"a.example": httpx2.Response(200, content=bytes(101))},
    )
    with pytest.raises(FetchError, match="over the limit of 100 bytes"):
        net.fetcher()("http://a.example/p.png")
    with pytest.raises(FetchError, match="no host named 'z.example' was found"):
        net.fetcher()("http://z.example/p.png")
    with pytest.raises(FetchError, match="scheme 'ftp', which is not fetched"):
        net.fetcher()("ftp://a.example/p.png")


def test_proxy_variables_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    net = Net({"a.example": ["93.184.216.34"]}, {"a.example": httpx2.Response(200, content=b"x")})
    assert net.fetcher()("http://a.example/p.png") == b"x"
