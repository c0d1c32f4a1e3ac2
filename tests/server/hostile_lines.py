"""Callers who mean no good, continued: frames of a conversation, slowness, ways round the doors.

Knows sockets and events of the Realtime API; nothing of what the server makes of them.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.server.hostile import JUNK, NUMBERS, TEXTS

# --- frames of realtime conversations ----------------------------------------------------------

EVENTS = (
    "session.update input_audio_buffer.append input_audio_buffer.commit input_audio_buffer.clear "
    "conversation.item.create conversation.item.retrieve conversation.item.truncate "
    "conversation.item.delete response.create response.cancel output_audio_buffer.clear "
    "response.done session.created"
).split()
_NOISE = base64.b64encode(bytes(range(1, 251)) * 8).decode()
_FIELDS: dict[str, SearchStrategy[Any]] = {
    "event_id": TEXTS | JUNK,
    "audio": st.just(_NOISE) | TEXTS | JUNK,
    "item_id": st.sampled_from(["item_000001", "x"]) | JUNK,
    "content_index": JUNK,
    "audio_end_ms": NUMBERS | JUNK,
    "previous_item_id": st.sampled_from(["root", "item_000001"]) | JUNK,
    "item": st.fixed_dictionaries(
        {"type": st.sampled_from(["message", "function_call", "function_call_output"]) | JUNK},
        optional={
            "id": TEXTS | JUNK,
            "role": st.sampled_from(["user", "assistant", "system"]) | JUNK,
            "content": JUNK
            | st.lists(
                st.fixed_dictionaries(
                    {"type": st.sampled_from(["input_text", "input_audio", "output_text"])},
                    optional={"text": TEXTS | JUNK, "audio": st.just(_NOISE) | TEXTS | JUNK},
                ),
                max_size=2,
            ),
            "name": TEXTS | JUNK,
            "call_id": TEXTS | JUNK,
            "arguments": TEXTS | JUNK,
            "output": TEXTS | JUNK,
        },
    )
    | JUNK,
    "session": st.fixed_dictionaries(
        {},
        optional={
            "type": st.just("realtime") | JUNK,
            "instructions": TEXTS | JUNK,
            "audio": JUNK | st.dictionaries(st.sampled_from(["input", "output"]), JUNK),
            "max_output_tokens": st.integers(1, 8) | JUNK,
            "output_modalities": JUNK,
            "tools": JUNK
            | st.lists(
                st.fixed_dictionaries(
                    {"type": st.just("function")},
                    optional={"name": TEXTS | JUNK, "parameters": JUNK, "description": JUNK},
                ),
                max_size=2,
            ),
            "tool_choice": st.sampled_from(["auto", "none", "required"]) | JUNK,
        },
    )
    | JUNK,
    "response": JUNK,
}


@st.composite
def frames(draw: Any) -> str | bytes:
    """Messages of a client: events with wrong fields, half of an event, no event at all."""
    what = draw(st.integers(0, 11))
    if what == 0:
        return bytes(draw(st.binary(max_size=40)))
    if what == 1:
        return json.dumps(draw(JUNK))
    kind = draw(TEXTS if what == 2 else st.sampled_from(EVENTS))
    names = draw(st.sets(st.sampled_from(sorted(_FIELDS)), max_size=3))
    fields = {name: draw(_FIELDS[name]) for name in sorted(names)}
    whole = json.dumps({**fields, "type": kind})
    return whole[: draw(st.integers(0, len(whole)))] if what == 3 else whole


# --- who is slow, and who leads elsewhere ------------------------------------------------------


def slow_callers(
    base: str, count: int, seconds: float, meanwhile: Callable[[], None]
) -> tuple[int, float]:
    """Open connections that send a letter now and then, and see what becomes of others.

    Args:
        base: The server.
        count: How many connections.
        seconds: How long, at most.
        meanwhile: What somebody else does, again and again; must not fail.

    Returns:
        How many connections are still open, and the longest that `meanwhile` took, seconds.
    """
    where = urlsplit(base)
    beginnings = (b"GET /health HTTP/1.1\r\nX-A: ", b"POST /v1/chat/completions HTTP/1.1\r\n", b"")
    lines = []
    for number in range(count):
        line = socket.create_connection((where.hostname or "", where.port or 80), 10)
        line.settimeout(0.0)
        line.send(beginnings[number % 3]) if beginnings[number % 3] else None
        lines.append(line)
    until, longest, open_ = time.monotonic() + seconds, 0.0, lines
    while open_ and time.monotonic() < until:
        began = time.monotonic()
        meanwhile()
        longest = max(longest, time.monotonic() - began)
        open_ = [line for line in open_ if _lives(line)]
        time.sleep(0.05)
    left = len(open_)
    for line in lines:
        line.close()
    return left, longest


def _lives(line: socket.socket) -> bool:
    try:
        if line.recv(1 << 16) == b"":
            return False
    except BlockingIOError:
        pass
    except OSError:
        return False
    try:
        line.send(b"a")
    except BlockingIOError:
        pass
    except OSError:
        return False
    return True


@contextmanager
def canary() -> Iterator[tuple[int, list[bytes]]]:
    """A port of this machine that nobody has any business with, and who came all the same."""
    came: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as ear:
        ear.settimeout(0.2)
        ended = threading.Event()

        def listen() -> None:
            while not ended.is_set():
                try:
                    line, _ = ear.accept()
                except TimeoutError:
                    continue
                with line:
                    came.append(line.recv(200))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield ear.getsockname()[1], came
        finally:
            ended.set()
            thread.join()


def inner_addresses(port: int) -> list[str]:
    """URLs that lead to this machine or its network, however they are written."""
    hosts = (
        "127.0.0.1 localhost LOCALHOST 127.1 127.0.1 0 0.0.0.0 2130706433 0x7f000001 0x7f.0.0.1 "
        "017700000001 0177.0.0.1 127.0.0.1. localhost. [::1] [::] [::ffff:127.0.0.1] "
        "[::ffff:7f00:1] [0:0:0:0:0:ffff:127.0.0.1] [64:ff9b::7f00:1] [2002:7f00:1::] [fe80::1] "
        "[fd00::1] 10.0.0.1 192.168.0.1 172.16.0.1 169.254.169.254 100.64.0.1 224.0.0.1 "
        "user@127.0.0.1 1.1.1.1@127.0.0.1 \u2460\u2461\u2466.0.0.1 127\u30020\u30020\u30021"
    ).split()
    urls = [f"http://{host}{place}/x.png" for host in hosts for place in ("", f":{port}")]
    urls += [f"https://127.0.0.1:{port}/", "file:///etc/passwd", "/etc/passwd", "~/.ssh/id_rsa"]
    urls += [f"ftp://127.0.0.1:{port}/", f"gopher://127.0.0.1:{port}/", "http:///x", "http://"]
    urls += [f"http:\\\\127.0.0.1:{port}\\x", f"//127.0.0.1:{port}/", f"http:127.0.0.1:{port}"]
    urls += [
        f" http://127.0.0.1:{port}/",
        f"http://1.1.1.1%2f@127.0.0.1:{port}/",
        "http://[",
        "\x00",
    ]
    return urls
