"""The process that parses files: bytes come in over stdin, JSON frames go out over stdout.

It drops what it does not need before it reads the first byte: memory beyond its limit, writing
files, starting programs, the network. It ends when its stdin ends, and an alarm that no parser can
hold back ends it when a file takes too long. Run by `sandbox` as
`python -P -m lfm2_retrieval.documents.worker LIMITS`, with the limits as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import resource
import signal
import sys
import warnings
from typing import Any, BinaryIO

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents import readers, wire
from lfm2_retrieval.documents.model import Limits

__all__ = ["main"]

_CLONE_NEWUSER, _CLONE_NEWNET, _PR_SET_NO_NEW_PRIVS = 0x10000000, 0x40000000, 38
_DENIED = (
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "socket.sendmsg",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_GRACE = 1.0  # seconds the alarm leaves the parent to notice first


def _deny(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: no network, no programs, no writing."""
    if event == "open":
        flags = arguments[2] if len(arguments) > 2 else 0
        if isinstance(flags, int) and flags & _WRITES:
            raise PermissionError(f"a reader tried to write to {arguments[0]!r}")
    elif event.startswith(_DENIED):
        raise PermissionError(f"a reader tried {event}")


def _address_space() -> int:
    """Bytes of address space in use, 256 MiB where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 256 * 2**20


def _confine(limits: Limits) -> None:
    """Give up what parsing does not need; best effort where a system lacks a means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends our stdin
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET):
            libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, _address_space() + limits.memory),
    ):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (value, value))
    sys.addaudithook(_deny)


class _Clock:
    """The time left for one file; it stands still while the parent does not take what we send."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds + _GRACE
        self.run()

    def run(self) -> None:
        # The default action of SIGALRM ends the process, wherever it is.
        signal.setitimer(signal.ITIMER_REAL, max(self._left, 0.001))

    def hold(self) -> None:
        self._left = signal.setitimer(signal.ITIMER_REAL, 0)[0]


def _serve(name: str, data: bytes, limits: Limits, out: BinaryIO) -> dict[str, Any]:
    """Parse one file and send its extracts; returns the closing message."""
    clock = _Clock(limits.seconds)
    try:
        for extract in readers.read(name, data, limits):
            frame = wire.encode(wire.message_of(extract))
            del extract
            clock.hold()
            out.write(frame)
            clock.run()
    except DocumentError as error:
        return {"refused": str(error)}
    except ImportError as error:
        return {"missing": error.name or str(error)}
    except MemoryError:
        return {
            "spent": True,
            "refused": (
                f"reading it takes more than the {limits.memory / 2**20:.4g} MiB of memory that "
                "are allowed: split it"
            ),
        }
    except BrokenPipeError:
        raise
    except Exception as error:  # a parser's own fault must not end the run
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"refused": f"its content broke the reader ({what}): save it anew"}
    finally:
        clock.hold()
    return {"done": True}


def main() -> None:
    """Serve files until stdin ends."""
    limits = Limits(**json.loads(sys.argv[1]))
    source, out = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints is no frame
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    # trafilatura loads these if it can; they cost start-up and memory, and we do not use them
    sys.modules["py3langid"] = None  # type: ignore[assignment]
    _confine(limits)
    with contextlib.suppress(BrokenPipeError):
        while (request := wire.read(source)) is not None:
            data = source.read(request["size"])
            if len(data) < request["size"]:
                return
            closing = _serve(request["name"], data, limits, out)
            del data
            out.write(wire.encode(closing))
            out.flush()


if __name__ == "__main__":
    main()
