"""The index survives: a short run of tools/crash_index.py, and what a full disk says."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lfm2_mm.errors import IndexFault
from lfm2_retrieval.index import files
from lfm2_retrieval.index.index import Index
from tests.retrieval.index_fakes import corpus

ROOT = Path(__file__).resolve().parents[2]


def test_no_way_to_die_loses_what_was_acknowledged() -> None:
    command = [sys.executable, str(ROOT / "tools" / "crash_index.py"), "--runs", "12"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none lost, none undone" in done.stdout
    assert "2 kill, 2 step, 2 power, 2 full, 2 limit, 2 read-only" in done.stdout


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"cannot be written \(No space left on device\): the disk is full; free"),
        (errno.EROFS, r"\(Read-only file system\): the file system is read-only; open it with"),
        (errno.EACCES, r"\(Permission denied\): permission was denied; open it with read_only"),
    ],
)
def test_a_refused_write_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    index = Index.open(tmp_path / "i")
    rows = corpus(3)
    index.add_vectors(rows[:1], ["a"], ["a"])
    before = sorted(tmp_path.rglob("*"))

    def refuse(step: str, path: Path) -> None:
        if step == "sync":
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "trace", refuse)
    with pytest.raises(IndexFault, match=message):
        index.add_vectors(rows[1:], ["b", "c"], ["b", "c"])
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    assert [row.id for row in index.documents()] == ["a"]
    index.add_vectors(rows[1:], ["b", "c"], ["b", "c"])
    assert index.status(verify=True).documents == 3


def test_other_system_errors_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index.open(tmp_path / "i")

    def fail(step: str, path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "trace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        index.add_vectors(corpus(1), ["a"])
