"""A server among callers who mean no good: the short form of tools/abuse_server.py."""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from hypothesis import given
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from lfm2_mm.server import Limits, ServerOptions
from tests.audio import speaking
from tests.server.hostile import Attack, attacks, broken_http, judged, many, send
from tests.server.hostile_lines import canary, frames, inner_addresses, slow_callers
from tests.server.running import running

# frames of one conversation come out of many calls, for which there is no `with`
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")

LIMITS = Limits(header_seconds=1.0, body_bytes=1 << 20, frame_bytes=1 << 16, sockets=4, seconds=30)


class Listener(logging.Handler):
    """Keeps what the server's log says is wrong."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage() + str(record.exc_info or ""))


@pytest.fixture(scope="module")
def log() -> Iterator[list[str]]:
    listener = Listener()
    loggers = [logging.getLogger(name) for name in ("lfm2_mm.server", "uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(listener)
    yield listener.lines
    for logger in loggers:
        logger.removeHandler(listener)


@pytest.fixture(scope="module")
def base(log: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from lfm2_mm import load

    models = {"nano-vl": load("nano-vl"), "speech": speaking.model()}
    notes = {"notes": str(tmp_path_factory.mktemp("index") / "notes.idx")}
    options = ServerOptions(models=tuple(models), indexes=notes, limits=LIMITS)
    with running(options, load=models.__getitem__) as url:
        yield url


@pytest.fixture(autouse=True)
def afterwards(base: str, log: list[str]) -> Iterator[None]:
    """Whatever was done, the server is well, and its log holds no failure."""
    log.clear()
    yield
    assert httpx2.get(f"{base}/health", timeout=60).json() == {"status": "ready"}
    assert log == []


def test_malformed_requests_get_sentences(base: str) -> None:
    document = httpx2.get(f"{base}/openapi.json", timeout=60).json()

    @many(200)
    @given(attacks(document, ("notes", "nano-vl", "speech")))
    def attack(one: Attack) -> None:
        reply = send(base, one)
        assert not (wrong := judged(reply)), (wrong, one)

    attack()


def test_what_is_no_http_harms_nobody(base: str) -> None:
    @many(80)
    @given(broken_http())
    def attack(data: bytes) -> None:
        reply = send(base, data, seconds=20, ends=True)
        assert not (wrong := judged(reply, whole=False)), (wrong, data)

    attack()


def test_malformed_frames_get_errors(base: str) -> None:
    address = f"{base.replace('http', 'ws')}/v1/realtime?model=speech"
    open_: list[Any] = []

    @many(120)
    @given(frames())
    def attack(frame: str | bytes) -> None:
        try:
            if not open_:
                open_.append(connect(address, open_timeout=20, proxy=None))
            open_[0].send(frame)
            while True:
                told = open_[0].recv(timeout=0.001)
                assert '"internal"' not in told and '"server_error"' not in told, (told, frame)
        except TimeoutError:
            pass
        except ConnectionClosed as closed:
            open_.pop().close()
            assert closed.rcvd is not None and closed.rcvd.code != 1011, (closed, frame)

    attack()
    for line in open_:
        line.close()


def test_slow_callers_keep_nobody_out(base: str) -> None:
    def meanwhile() -> None:
        assert httpx2.get(f"{base}/v1/models", timeout=20).status_code == 200

    left, longest = slow_callers(base, 60, 20.0, meanwhile)
    assert left == 0 and longest < 10.0


def test_bodies_that_are_too_large_or_never_end(base: str) -> None:
    where = urlsplit(base)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
    head += "Content-Type: application/json\r\n"
    declared = (head + "Content-Length: 99999999999\r\n\r\n{").encode()
    assert send(base, declared).status == 413  # without a wait for what will never come
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert (
        send(base, (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + chunk * 40).status
        == 413
    )
    with socket.create_connection((where.hostname or "", where.port or 80), 20) as line:
        line.sendall((head + "Content-Length: 10\r\n\r\n{").encode())
        assert line.recv(100).startswith(b"HTTP/1.1 408")


CHAT, JSON = "/v1/chat/completions", {"Content-Type": "application/json"}
DEEP = b'{"a":' * 900 + b"1" + b"}" * 900


@pytest.mark.parametrize(
    "attack",
    [
        Attack("GET", "/" + "a" * 100_000),
        Attack("GET", "/health", {"X-Long": "a" * 100_000}),
        Attack(
            "POST", "/v1/chat/completions", {"Content-Type": "application/json"}, b"[" * 500_000
        ),
        Attack("POST", CHAT, JSON, b'{"messages": [{"role": "user", "content": ' + DEEP + b"}]}"),
        Attack(
            "POST",
            "/v1/audio/transcriptions",
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\nx\r\n' * 2000,
        ),
    ],
    ids=["long path", "long header", "deep list", "deep message", "many fields"],
)
def test_long_and_deep(base: str, attack: Attack) -> None:
    reply = send(base, attack)
    if "X-Long" in attack.headers:  # read as far as it comes; the answer may be lost with the rest
        assert reply.status in (0, 200, 400, 431)
    else:
        assert 400 <= reply.status < 500


def look_up(host: str, port: int, **_: Any) -> list[Any]:
    """As the system's own, which reads numbers in every spelling, but without a network."""
    if ":" in host:
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (host, port, 0, 0))]
    try:
        address = socket.inet_ntoa(socket.inet_aton("127.0.0.1" if "localhost" in host else host))
    except OSError:
        raise socket.gaierror("unknown") from None
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]


def test_pictures_are_fetched_from_no_inner_address(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lfm2_mm.server.safe_fetch.socket",
        SimpleNamespace(getaddrinfo=look_up, SOCK_STREAM=socket.SOCK_STREAM),
    )
    with canary() as (port, came), httpx2.Client(base_url=base, timeout=30) as client:
        for url in inner_addresses(port):
            content = [{"type": "image_url", "image_url": {"url": url}}]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code in (400, 422), (url, answer.text)
            assert "root:" not in answer.text
    assert came == []


# --- TLS ---------------------------------------------------------------------------------------

PAIR: dict[str, Any] = {
    name: Path(__file__).with_name(f"{name}.pem") for name in ("certificate", "key")
}


def test_tls_is_spoken_and_nothing_else() -> None:
    model = speaking.model()
    options = ServerOptions(models=("speech",), limits=LIMITS)
    with running(options, load=lambda name: model, **PAIR) as base:
        trust = ssl.create_default_context(cafile=str(PAIR["certificate"]))
        with httpx2.Client(
            base_url=base.replace("127.0.0.1", "localhost"), verify=trust, timeout=60
        ) as client:
            assert client.get("/health").json() == {"status": "ready"}
            own = {"Origin": str(client.base_url).rstrip("/")}
            assert client.get("/v1/models", headers=own).status_code == 200
            plain = {"Origin": own["Origin"].replace("https", "http")}
            assert client.get("/v1/models", headers=plain).status_code == 403
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED|self-signed"):
            httpx2.get(f"{base}/health")
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{base.replace('https', 'http')}/health", timeout=5)
        address = f"{base.replace('https', 'wss')}/v1/realtime?model=speech"
        with connect(address, ssl=trust, server_hostname="localhost", proxy=None) as line:
            assert "session.created" in line.recv(timeout=20)
        began = time.monotonic()
        where = urlsplit(base)
        with (
            socket.create_connection((where.hostname or "", where.port or 443), 20) as raw,
            trust.wrap_socket(raw, server_hostname="localhost") as silent,
        ):
            assert silent.recv(10) == b"" and time.monotonic() - began < 30
