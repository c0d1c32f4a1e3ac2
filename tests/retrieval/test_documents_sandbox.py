"""A parser may hang, burst, die, lie or reach out: one file is lost, the next one is read."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm2_mm.errors import DocumentError, MissingExtra
from lfm2_retrieval.documents import sandbox as sandboxes
from lfm2_retrieval.documents.model import Limits
from lfm2_retrieval.documents.sandbox import Sandbox

LIMITS = Limits(seconds=2.0, memory=256 * 2**20)

ROGUE = """
import os, signal, socket, subprocess, sys
from lfm2_retrieval.documents import readers, worker
from lfm2_retrieval.documents.model import Extract

real = readers.read

def read(name, data, limits):
    what, _, rest = data.decode().partition(" ")
    if what == "hang":
        while True:
            pass
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        os._exit(7)
    if what == "fat":
        bytearray(2**33)
    if what == "connect":
        socket.create_connection(("127.0.0.1", int(rest)))
    if what == "write":
        open(rest, "w")
    if what == "program":
        subprocess.run(["true"])
    if what == "import":
        import package_of_nowhere
    if what == "break":
        raise RuntimeError("odd\\ninput")
    if what == "lie":
        yield Extract("text", ((9, 3, "paragraph", None, None, 0),))
    if what == "print":
        print("hello", flush=True)
    if what == "half":
        yield from real(name, b"first half", limits)
        sys.__stdout__.buffer.flush()
        os._exit(1)
    yield from real(name, data, limits)

readers.read = read
worker.main()
"""


@pytest.fixture
def rogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    (tmp_path / "rogue_document_worker.py").write_text(ROGUE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sandboxes, "_WORKER", "rogue_document_worker")
    with Sandbox(LIMITS) as sandbox:
        assert texts(sandbox, "warm") == ["warm"]
        yield sandbox


def texts(sandbox: Sandbox, data: str) -> list[str]:
    return [extract.text for extract in sandbox.parse("a.txt", data.encode())]


def reason(sandbox: Sandbox, data: str) -> str:
    with pytest.raises(DocumentError) as caught:
        texts(sandbox, data)
    return str(caught.value)


def test_the_process_is_reused(rogue: Sandbox) -> None:
    first = rogue.pid
    assert texts(rogue, "more") == ["more"]
    assert rogue.pid == first


def test_a_refusal_leaves_the_process_up(rogue: Sandbox) -> None:
    first = rogue.pid
    assert reason(rogue, " ") == "it holds nothing but space: there is nothing to index"
    assert (texts(rogue, "more"), rogue.pid) == (["more"], first)


def test_a_hanging_parser_is_ended(rogue: Sandbox) -> None:
    first = rogue.pid
    begin = time.monotonic()
    assert reason(rogue, "hang") == (
        "reading it takes longer than the 2 seconds that are allowed: split it"
    )
    assert time.monotonic() - begin < 20
    assert texts(rogue, "more") == ["more"]
    assert rogue.pid != first


@pytest.mark.parametrize(("data", "how"), [("die", "SIGSEGV"), ("exit", "exit status 7")])
def test_a_dying_parser_costs_one_file(rogue: Sandbox, data: str, how: str) -> None:
    assert reason(rogue, data) == (
        f"it broke the process that parses it ({how}): leave it out, or save it anew"
    )
    assert texts(rogue, "more") == ["more"]


def test_a_process_that_was_lost_between_files_costs_none(rogue: Sandbox) -> None:
    assert rogue.pid is not None
    os.kill(rogue.pid, signal.SIGKILL)
    assert texts(rogue, "more") == ["more"]


def test_memory_is_limited(rogue: Sandbox) -> None:
    assert "takes more than the 256 MiB of memory that are allowed" in reason(rogue, "fat")
    assert texts(rogue, "more") == ["more"]


def test_a_parser_reaches_no_network(rogue: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        found = reason(rogue, f"connect {server.getsockname()[1]}")
        assert "PermissionError: a reader tried socket." in found
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_parser_writes_no_file(rogue: Sandbox, tmp_path: Path) -> None:
    assert "PermissionError: a reader tried to write to" in reason(rogue, f"write {tmp_path}/x")
    assert not (tmp_path / "x").exists()


def test_a_parser_starts_no_program(rogue: Sandbox) -> None:
    assert "PermissionError: a reader tried subprocess.Popen" in reason(rogue, "program")


def test_a_fault_of_a_parser_is_one_sentence(rogue: Sandbox) -> None:
    assert reason(rogue, "break") == (
        "its content broke the reader (RuntimeError: odd input): save it anew"
    )


def test_a_lying_parser_is_refused(rogue: Sandbox) -> None:
    assert reason(rogue, "lie") == (
        "the process that parses files answered with blocks that are no blocks of its text: "
        "the file is refused"
    )
    assert texts(rogue, "more") == ["more"]


def test_what_a_parser_prints_is_no_answer(rogue: Sandbox) -> None:
    assert texts(rogue, "print this") == ["print this"]


def test_what_came_before_a_fault_holds(rogue: Sandbox) -> None:
    stream = rogue.parse("a.txt", b"half")
    assert next(stream).text == "first half"
    with pytest.raises(DocumentError, match="exit status 1"):
        next(stream)


def test_a_missing_package_names_the_extra(rogue: Sandbox) -> None:
    with pytest.raises(MissingExtra) as caught:
        texts(rogue, "import")
    assert str(caught.value) == (
        "reading this kind of document needs a package that is not installed "
        "(package_of_nowhere): run pip install 'lfm2-mm[retrieval]'"
    )


def test_a_caller_that_stops_early_ends_the_conversation(rogue: Sandbox) -> None:
    table = "text\n" + "some words here\n" * 5000
    stream = rogue.parse("a.csv", table.encode())
    assert next(stream).row == 1
    stream.close()
    assert texts(rogue, "more") == ["more"]


def test_a_slow_caller_is_no_slow_parser(rogue: Sandbox) -> None:
    table = "text\n" + f"{'some words here ' * 100}\n" * 500
    stream = rogue.parse("a.csv", table.encode())
    assert next(stream).row == 1
    time.sleep(3.5)
    assert sum(1 for _ in stream) == 499


def test_closing_ends_the_process() -> None:
    sandbox = Sandbox(Limits())
    assert texts(sandbox, "one") == ["one"]
    pid = sandbox.pid
    sandbox.close()
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_process_ends_when_its_parent_is_killed() -> None:
    script = (
        "import sys, time\n"
        "from lfm2_retrieval.documents.sandbox import Sandbox\n"
        "sandbox = Sandbox()\n"
        "list(sandbox.parse('a.txt', b'one'))\n"
        "print(sandbox.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether a process is up; one that only waits to be collected is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
