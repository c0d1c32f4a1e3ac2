"""Parses files in another process, which may hang, burst or die without harm.

The process gets bytes, never a path; it answers in checked JSON. It is reused from file to file
and started anew after it was lost. This module knows no format.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict
from types import TracebackType

from lfm2_mm.errors import DocumentError, MissingExtra
from lfm2_retrieval.documents import wire
from lfm2_retrieval.documents.model import DEFAULT_LIMITS, Extract, Limits

__all__ = ["Sandbox"]

_WORKER = "lfm2_retrieval.documents.worker"
_BLOCK = 1 << 20
_STARTUP = 30.0  # further seconds for the first file of a fresh process
_SEVERAL = 500  # files after which a process is replaced, so that no leak grows


class _Lost(Exception):
    """The process is gone; the message says what happened, as the end of a sentence."""


class Sandbox:
    """A process that parses. Use as a context manager, or call `close`; not for several threads.

    Args:
        limits: What one file may cost.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._served = 0
        self._idle = True  # the process waits for a file; False: it is in the middle of one

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process, self._served, self._idle = self._process, None, 0, True
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        process.wait()

    @property
    def pid(self) -> int | None:
        """The process that is up, if any."""
        return self._process.pid if self._process else None

    def parse(self, name: str, data: bytes) -> Generator[Extract, None, None]:
        """The extracts of a file: one, or one for each row of a table.

        Args:
            name: The file's name; its suffix decides on the reader.
            data: Its bytes.

        Raises:
            DocumentError: if it cannot be read, or costs too much; what was yielded before holds.
            MissingExtra: if the package that reads this format is not installed.
        """
        if self._served >= _SEVERAL:
            self.close()
        reused = self._process is not None
        yielded = False
        try:
            try:
                for extract in self._converse(name, data):
                    yielded = True
                    yield extract
            except _Lost:
                if not reused or yielded:
                    raise
                # Perhaps an earlier file left the process in a bad state: judge this one alone.
                self.close()
                yield from self._converse(name, data)
        except _Lost as error:
            raise DocumentError(f"{error}: leave it out, or save it anew") from None
        finally:
            if not self._idle:
                self.close()

    # ---- one conversation ----

    def _converse(self, name: str, data: bytes) -> Iterator[Extract]:
        fresh = self._process is None
        if self._process is None:
            self._process = self._start()
        self._served += 1
        self._idle = False
        clock = _Deadline(self._limits.seconds + (_STARTUP if fresh else 0.0))
        request = wire.encode({"name": name, "size": len(data)})
        self._send(request, clock)
        self._send(data, clock)
        while True:
            message = wire.decode(self._receive_frame(clock))
            if "text" in message:
                yield wire.extract_from(message, self._limits)
                continue
            break
        if message.get("spent"):
            if not fresh:
                raise _Lost(str(message.get("refused")).partition(":")[0])
        else:
            self._idle = True
        self._last(message)

    def _last(self, message: dict[str, object]) -> None:
        """What the last message of a conversation says."""
        missing = message.get("missing")
        if missing is not None:
            what = " ".join(str(missing).split()).rstrip(".")[:200]
            raise MissingExtra(
                f"reading this kind of document needs a package that is not installed ({what}): "
                "run pip install 'lfm2-mm[retrieval]'"
            )
        if "refused" in message:
            raise DocumentError(" ".join(str(message["refused"]).split())[:1000])

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [path for path in sys.path if path and os.path.isdir(path)]
        environment = {
            "PATH": os.defpath,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUTF8": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _WORKER, json.dumps(asdict(self._limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=os.path.abspath(os.sep),
            bufsize=0,
        )
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        return process

    def _send(self, data: bytes, clock: _Deadline) -> None:
        assert self._process is not None and self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(pipe, view[:_BLOCK]) :]
            except BlockingIOError:
                clock.wait(pipe, selectors.EVENT_WRITE, self._limits)
            except OSError:
                raise self._loss() from None

    def _receive_frame(self, clock: _Deadline) -> bytes:
        (length,) = wire.HEADER.unpack(self._receive(wire.HEADER.size, clock))
        if length > max(self._limits.memory, 2**20):
            raise DocumentError(
                f"the process that parses files announced a frame of {length} bytes: "
                "the file is refused"
            )
        return self._receive(length, clock)

    def _receive(self, size: int, clock: _Deadline) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        data = bytearray()
        while len(data) < size:
            try:
                part = os.read(pipe, min(_BLOCK, size - len(data)))
            except BlockingIOError:
                clock.wait(pipe, selectors.EVENT_READ, self._limits)
                continue
            if not part:
                raise self._loss()
            data += part
        return bytes(data)

    def _loss(self) -> Exception:
        """Why the process is gone."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return _Lost("the process that parses it closed its pipe")
        if code == -signal.SIGALRM:
            return _too_slow(self._limits)
        if code < 0:
            with contextlib.suppress(ValueError):
                return _Lost(f"it broke the process that parses it ({signal.Signals(-code).name})")
        return _Lost(f"it broke the process that parses it (exit status {code})")


def _too_slow(limits: Limits) -> DocumentError:
    return DocumentError(
        f"reading it takes longer than the {limits.seconds:g} seconds that are allowed: split it"
    )


class _Deadline:
    """Seconds left, of which only those spent waiting for the process count."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def wait(self, pipe: int, event: int, limits: Limits) -> None:
        """Wait until the pipe is ready.

        Raises:
            DocumentError: if that takes too long.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, event)
            begin = time.monotonic()
            ready = selector.select(max(self._left, 0.0))
            self._left -= time.monotonic() - begin
        if not ready:
            raise _too_slow(limits)
