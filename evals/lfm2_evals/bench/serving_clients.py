"""Clients of a chat server that stream and note times, and the server's process beside them.

The clients are plain sockets on one event loop, so that they take little of the processor that the
server needs. Knows OpenAI's interface and no server's name.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm2_mm.errors import Lfm2Error

__all__ = ["Answer", "ServerProcess", "ask", "ask_together", "free_port"]

_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer, as its client saw it.

    Attributes:
        began: Clock at the request, seconds.
        first: Clock at the first text, or at the end of an answer without any.
        ended: Clock at the end.
        tokens: Tokens that the server says it generated.
    """

    began: float
    first: float
    ended: float
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens a second, waiting included."""
        return self.tokens / (self.ended - self.began)


async def ask(port: int, body: Mapping[str, Any], *, seconds: float = 600.0) -> Answer:
    """Stream one answer of a server of this machine.

    Args:
        port: Where it listens.
        body: Of `/v1/chat/completions`, without the fields that ask for a stream.
        seconds: Time for the whole answer.

    Raises:
        Lfm2Error: if there is no whole answer.
    """
    try:
        return await asyncio.wait_for(_ask(port, body), seconds)
    except TimeoutError:
        raise Lfm2Error(
            f"an answer was not complete after {seconds:g} seconds; ask for fewer tokens"
        ) from None
    except (OSError, asyncio.IncompleteReadError) as error:
        raise Lfm2Error(
            f"the connection broke in the midst of an answer ({error}); see the server's log"
        ) from None


async def ask_together(port: int, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Stream several answers at once."""
    return list(await asyncio.gather(*(ask(port, body) for body in bodies)))


async def _ask(port: int, body: Mapping[str, Any]) -> Answer:
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(asked).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        "Connection: close\r\n\r\n"
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LINE)
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        status = (await reader.readline()).decode("latin-1").split()
        if len(status) < 2 or status[1] != "200":
            told = (await reader.read(4096)).decode(errors="replace").split("\r\n\r\n")[-1].strip()
            raise Lfm2Error(
                f"the server answered {' '.join(status[1:2]) or 'nothing'} ({told[:200]}); ask it "
                "by hand"
            )
        first, tokens = 0.0, -1
        while line := await reader.readline():
            if not line.startswith((b"data: ", b"error: ")):
                continue
            now = time.perf_counter()
            if line.startswith(b"data: [DONE]"):
                break
            if first and b'"usage"' not in line and b'"error"' not in line[:40]:
                continue  # nothing is read that need not be
            found = json.loads(line.partition(b": ")[2])
            if "error" in found:
                raise Lfm2Error(f"the server broke off ({str(found)[:200]}); ask it by hand")
            first = first or (now if _shows(found) else 0.0)
            if found.get("usage"):
                tokens = int(found["usage"]["completion_tokens"])
    finally:
        writer.close()
    if tokens < 0:
        raise Lfm2Error("an answer ended without its count of tokens; ask the server by hand")
    ended = time.perf_counter()
    return Answer(began, first or ended, ended, tokens)


def _shows(chunk: Mapping[str, Any]) -> bool:
    """Whether a piece of a stream holds text, or the end of the text."""
    for choice in chunk.get("choices", ()):
        if choice.get("finish_reason") or choice.get("delta", {}).get("content"):
            return True
    return False


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A server in a process of its own, ready when `with` is entered.

    Args:
        name: What it is called.
        command: What to start; it must listen on `port`.
        port: A free one; `/health` must answer 200 there when it is ready.
        environment: Variables set beside those of this process.
        seconds: Time to become ready.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        environment: Mapping[str, str] | None = None,
        *,
        seconds: float = 900.0,
    ) -> None:
        self.name, self.port = name, port
        self._command, self._seconds = list(command), seconds
        self._environment = {**os.environ, **(environment or {})}
        self._output = tempfile.TemporaryFile("w+", errors="replace")
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ServerProcess:
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                text=True,
                env=self._environment,
            )
        except OSError as error:
            self._output.close()
            raise Lfm2Error(
                f"{self.name} could not be started with {self._command[0]!r} ({error.strerror}); "
                "name another program"
            ) from None
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._output.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Processor time used so far by all threads; not a number where the system hides it."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return math.nan
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def log(self) -> str:
        """What it has written so far."""
        self._output.seek(0)
        return self._output.read()

    def _wait(self) -> None:
        assert self._process is not None
        until = time.monotonic() + self._seconds
        url = f"http://127.0.0.1:{self.port}/health"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < until:
            if (code := self._process.poll()) is not None:
                lines = [line.strip() for line in self.log().splitlines() if line.strip()]
                last = f", {lines[-1][:300]}" if lines else ""
                raise Lfm2Error(
                    f"{self.name} ended while it started (exit status {code}{last}); run it alone"
                )
            try:
                with direct.open(url, timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.1)
        raise Lfm2Error(f"{self.name} was not ready after {self._seconds:g} seconds; run it alone")
