"""lfm2_mm.fetch, against a transport in memory; no test opens a socket."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Iterator

import httpx2
import pytest

from lfm2_mm.errors import FetchError
from lfm2_mm.fetch import fetch, is_url, shown

Handler = Callable[[httpx2.Request], httpx2.Response]


def get(url: str, handler: Handler, max_bytes: int = 1000, timeout: float = 5.0) -> bytes:
    with httpx2.Client(transport=httpx2.MockTransport(handler)) as client:
        return fetch(url, max_bytes=max_bytes, timeout=timeout, client=client)


def refuse(url: str, handler: Handler, max_bytes: int = 1000) -> str:
    with pytest.raises(FetchError) as caught:
        get(url, handler, max_bytes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def never(request: httpx2.Request) -> httpx2.Response:
    raise AssertionError(f"no request expected, got {request.url}")


def test_body_is_returned_and_request_names_the_program() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        assert request.headers["user-agent"] == "lfm2-mm"
        return httpx2.Response(200, content=b"pixels")

    assert get("https://example.org/a.png", answer) == b"pixels"


def test_redirects_are_followed_hop_by_hop() -> None:
    seen = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(str(request.url))
        if request.url.path == "/start":
            return httpx2.Response(302, headers={"location": "/next?x=1"})
        if request.url.path == "/next":
            return httpx2.Response(301, headers={"location": "http://other.example/end"})
        return httpx2.Response(200, content=b"done")

    assert get("https://example.org/start", answer) == b"done"
    assert seen == [
        "https://example.org/start",
        "https://example.org/next?x=1",
        "http://other.example/end",
    ]


def test_five_redirects_pass_and_six_do_not() -> None:
    def after(n: int) -> Handler:
        def answer(request: httpx2.Request) -> httpx2.Response:
            step = int(request.url.path[1:])
            if step < n:
                return httpx2.Response(307, headers={"location": f"/{step + 1}"})
            return httpx2.Response(200, content=b"end")

        return answer

    assert get("http://h/0", after(5)) == b"end"
    assert refuse("http://h/0", after(6)) == (
        "http://h/0 redirects more than 5 times; "
        "open it in a browser and use the address it ends at"
    )


def test_redirect_to_another_scheme_is_refused() -> None:
    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(302, headers={"location": "file:///etc/passwd"})

    assert "the scheme 'file', which is not fetched" in refuse("http://h/", answer)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (404, "http://h/a.png answered 404 Not Found; check the address"),
        (
            403,
            "http://h/a.png answered 403 Forbidden; "
            "it may need a login, so download it yourself and give the file",
        ),
        (503, "http://h/a.png answered 503 Service Unavailable; try again later"),
    ],
)
def test_status(status: int, text: str) -> None:
    assert refuse("http://h/a.png?token=x", lambda _: httpx2.Response(status)) == text


def test_announced_size_is_checked_before_the_body_is_read() -> None:
    def body() -> Iterator[bytes]:
        raise AssertionError("the body must not be read")
        yield b""

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-length": "2000"}, content=body())

    assert refuse("http://h/big", answer) == (
        "http://h/big holds 2,000 bytes, over the limit of 1,000 bytes; "
        "use a smaller file or raise the limit"
    )


def test_unannounced_size_stops_the_stream() -> None:
    sent = []

    def body() -> Iterator[bytes]:
        for at in range(1000):
            sent.append(at)
            yield b"x" * 65536

    text = refuse("http://h/endless", lambda _: httpx2.Response(200, content=body()), 100_000)
    assert text.startswith("http://h/endless holds more than the limit of 100,000 bytes")
    assert len(sent) <= 4


def test_time_out() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadTimeout("slow", request=request)

    assert refuse("http://h/slow", answer) == (
        "http://h/slow did not answer in full within 5 seconds; try again later"
    )


def test_slow_drip_meets_the_deadline() -> None:
    import time

    def body() -> Iterator[bytes]:
        while True:
            time.sleep(0.02)
            yield b"x" * 65536

    with pytest.raises(FetchError, match=r"within 0\.05 seconds"):
        get("http://h/", lambda _: httpx2.Response(200, content=body()), 10**9, timeout=0.05)


def test_unknown_host_is_named() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        try:
            raise socket.gaierror(-2, "Name or service not known")
        except socket.gaierror as error:
            raise httpx2.ConnectError(str(error), request=request) from error

    assert refuse("https://nowhere.example/a.png", answer) == (
        "no host named 'nowhere.example' was found for https://nowhere.example/a.png; "
        "check the spelling and the network"
    )


def test_refused_connection() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("[Errno 111] Connection refused", request=request)

    assert refuse("http://h:1/a", answer) == (
        "http://h:1/a could not be fetched ([Errno 111] Connection refused); "
        "check that h can be reached from here"
    )


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("ftp://h/a.png", "ftp://h/a.png has the scheme 'ftp', which is not fetched"),
        ("file:///etc/passwd", "has the scheme 'file'"),
        ("http:///a.png", "names no host; write it as https://host/path"),
        ("http://[::1/a", "is not a valid address"),
        ("http://h:99999/a", "is not a valid address"),
    ],
)
def test_unusable_addresses(url: str, text: str) -> None:
    assert text in refuse(url, never)


def test_data_urls() -> None:
    packed = base64.b64encode(bytes(range(256)) * 3)
    assert fetch(f"data:image/png;base64,{packed.decode()}") == bytes(range(256)) * 3
    urlsafe = base64.urlsafe_b64encode(b"\xfb\xff\xfe").decode().rstrip("=")
    assert fetch(f"DATA:;base64,{urlsafe}") == b"\xfb\xff\xfe"
    assert fetch("data:text/plain,a%20b") == b"a b"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (
            "data:image/png;base64",
            "the data URL data:image/png;base64,… has no comma before its data",
        ),
        ("data:image/png;base64,a", "does not hold valid base64"),
        ("data:image/png;base64,§§§§", "does not hold valid base64"),
        ("data:," + "a" * 1001, "holds 1,001 bytes, over the limit of 1,000 bytes"),
        ("data:," + "a" * 5000, "holds more than the limit of 1,000 bytes"),
    ],
)
def test_bad_data_urls(url: str, text: str) -> None:
    assert text in refuse(url, never)


def test_is_url() -> None:
    assert is_url("https://h/a") and is_url("data:,x") and is_url("FTP://h")
    assert not any(map(is_url, ["a.png", "-", "C:\\a.png", "dir/http.png", "datas/a.png", ""]))


def test_shown_hides_secrets_and_control_characters() -> None:
    assert shown("https://user:secret@h/a?key=1#f") == "https://h/a"
    assert shown("data:image/png;base64,AAAA") == "the data URL data:image/png;base64,…"
    assert shown("http://h/\x1b[31m" + "a" * 200).startswith("http://h/?[31maaa")
    assert len(shown("http://h/" + "a" * 200)) == 120
