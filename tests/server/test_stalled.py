"""Clients who stop reading: they are cut off within seconds, and what they held is free again."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from lfm2_mm.events import Done, Event, TextDelta, Timings, Usage
from lfm2_mm.server import Limits, ServerOptions
from lfm2_mm.server.listening import _Patience
from tests.audio import speaking
from tests.audio.voice_fakes import Talk
from tests.server.running import running
from tests.server.test_realtime import Voice, address, event

pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")

SECONDS = 1.0
LONG = "x" * 20_000


def answer(number: int, talk: Talk) -> Iterator[Event]:
    yield TextDelta("Yes.")
    yield Done("stop", Usage(10, completion_tokens=1), Timings())


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    limits = Limits(sockets=1, unread_seconds=SECONDS)
    models = {"voice": Voice(answer), "tiny": speaking.model()}
    options = ServerOptions(models=tuple(models), limits=limits)
    with running(options, load=models.__getitem__) as url:
        yield url


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds after which something was so."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not come about"
        time.sleep(0.05)
    return time.monotonic() - began


def room(base: str) -> bool:
    """Whether somebody else can talk."""
    try:
        with connect(address(base)) as line:
            return bool(line.recv())
    except InvalidStatus:
        return False


@contextmanager
def narrow(base: str) -> Iterator[socket.socket]:
    """A connection whose receiver takes little before it must be read."""
    where = urlsplit(base)
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect((where.hostname, where.port))
        yield line


def silent(line: Any) -> None:
    """Have so much written that nothing more fits in, and read none of it."""
    content = [{"type": "input_text", "text": LONG}]
    line.send(
        event("conversation.item.create", item={"id": "a", "role": "user", "content": content})
    )
    for _ in range(600):  # 12 MB, more than systems keep for a reader
        line.send(event("conversation.item.retrieve", item_id="a"))


@contextmanager
def calling(base: str) -> Iterator[Any]:
    """A client with little room for what it has not read."""
    for _ in range(200):  # whoever was here before is still being seen off
        with narrow(base) as raw, suppress(InvalidStatus):
            options: Any = {"max_queue": 1, "close_timeout": 0.1, "compression": None}
            line = connect(address(base), sock=raw, **options)
            try:
                yield line
            finally:
                line.close()
            return
        time.sleep(0.05)
    raise AssertionError("there is no room")


def test_who_stops_reading_frees_the_slot(base: str, caplog: pytest.LogCaptureFixture) -> None:
    with calling(base) as line:
        silent(line)
        assert until(lambda: room(base), 15 * SECONDS) < 8 * SECONDS
    # neither that nor the refusals meanwhile are failures of the server
    assert [one.message for one in caplog.records if one.levelno >= logging.ERROR] == []


def test_who_reads_slowly_is_let_be(base: str) -> None:
    with calling(base) as line:
        silent(line)
        began, read = time.monotonic(), 0
        while time.monotonic() - began < 3 * SECONDS:
            read += json.loads(line.recv(timeout=5))["type"] == "conversation.item.retrieved"
            time.sleep(0.02)
        assert read > 10


def test_an_answer_that_is_not_read_is_dropped(base: str) -> None:
    size = 12 << 20
    asked = {"input": "Hi", "max_output_tokens": 1, "metadata": {"a": "x" * size}}
    body = json.dumps({"model": "tiny", **asked}).encode()  # it comes back with the answer
    head = (
        "POST /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with narrow(base) as line:
        line.sendall(head.encode() + body)
        line.settimeout(30)
        read = len(line.recv(1 << 16))
        time.sleep(4 * SECONDS)
        with suppress(ConnectionResetError):
            while piece := line.recv(1 << 16):
                read += len(piece)
        assert 0 < read < size


class Transport:
    """A connection of which so much is read at every look."""

    def __init__(self, waiting: int, read: int) -> None:
        self.waiting, self.read, self.aborted = waiting, read, False

    def get_write_buffer_size(self) -> int:
        self.waiting = max(0, self.waiting - self.read)
        return self.waiting

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize(("read", "aborted"), [(0, True), (5, True), (400, False)])
def test_reading_something_is_enough(read: int, aborted: bool) -> None:
    transport = Transport(1 << 20, read)

    async def work() -> None:
        patience = _Patience(cast(Any, transport), 0.05)
        patience.begin()
        await asyncio.sleep(0.4)
        patience.end()

    asyncio.run(work())
    assert transport.aborted is aborted


def test_a_closed_tls_connection_waits_for_nobody() -> None:
    """Its transport in asyncio has no protocol left that it could ask."""

    async def work() -> int:
        transport = asyncio.sslproto._SSLProtocolTransport(  # type: ignore[attr-defined]
            asyncio.get_running_loop(), None
        )
        transport._closed = True
        patience = _Patience(transport, 0.05)
        patience.last()
        return patience.waiting

    assert asyncio.run(work()) == 0
