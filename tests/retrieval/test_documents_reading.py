"""Paths in, documents out: names, order, links, special files, digests, languages, changes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents import (
    Changes,
    Document,
    Limits,
    Unchanged,
    Unreadable,
    read_documents,
    watch,
)
from lfm2_retrieval.documents.language import detect
from lfm2_retrieval.documents.walk import Found


def words(text: str) -> int:
    return len(text.split())


def run(
    *paths: Path | str, known: dict[str, str] | None = None, limits: Limits | None = None
) -> dict[str, Document | Unreadable | Unchanged]:
    found = list(
        read_documents(
            list(paths), count_tokens=words, known=known or {}, limits=limits or Limits()
        )
    )
    assert len({item.path for item in found}) == len(found)
    return {item.path: item for item in found}


def reasons(found: dict[str, Document | Unreadable | Unchanged]) -> dict[str, str]:
    return {p: item.reason for p, item in found.items() if isinstance(item, Unreadable)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    (root / "b").mkdir(parents=True)
    (root / "b" / "two.md").write_text("# Two\n\nSecond text.\n")
    (root / "a.txt").write_text("First text of the folder.\n")
    (root / "c.csv").write_text("text,n\nrow one here,1\nrow two here,2\n")
    return root


def test_a_folder_is_read_in_sorted_order_with_relative_names(folder: Path) -> None:
    found = run(folder)
    assert list(found) == ["a.txt", "b/two.md", "c.csv#1", "c.csv#2"]
    document = found["b/two.md"]
    assert isinstance(document, Document)
    assert document.title == "Two"
    assert [c.text for c in document.chunks] == ["# Two\n\nSecond text."]


def test_files_are_named_as_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert list(run("b/two.md")) == ["b/two.md"]
    assert list(run("../docs/a.txt")) == ["a.txt"]
    assert list(run(folder / "a.txt")) == ["a.txt"]
    assert list(run("a.txt", folder)) == ["a.txt", "b/two.md", "c.csv#1", "c.csv#2"]


def test_known_documents_are_unchanged_row_by_row(folder: Path) -> None:
    known = {p: d.digest for p, d in run(folder).items() if isinstance(d, Document)}
    again = run(folder, known=known)
    assert {type(item) for item in again.values()} == {Unchanged}
    (folder / "c.csv").write_text("text,n\nrow one here,1\nrow two changed,2\n")
    (folder / "a.txt").write_text("Other text.\n")
    changed = [p for p, d in run(folder, known=known).items() if isinstance(d, Document)]
    assert changed == ["a.txt", "c.csv#2"]


def test_only_what_is_named_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm2_retrieval.documents import reading, walk

    opened: list[str] = []
    real = walk.read_bytes

    def noted(found: Found, limits: Limits) -> bytes:
        opened.append(found.name)
        return real(found, limits)

    monkeypatch.setattr(reading, "read_bytes", noted)

    def only(*names: str) -> list[str]:
        found = read_documents([folder, folder / "gone"], count_tokens=words, only=names)
        return [item.path for item in found]

    assert only("b") == ["b/two.md"]
    assert only("c.csv", "a.txt") == ["a.txt", "c.csv#1", "c.csv#2"]
    assert only("two.md") == only() == []
    assert opened == ["b/two.md", "a.txt", "c.csv"]


def test_hidden_names_and_caches_are_passed_over(folder: Path) -> None:
    for name in (".git", "__pycache__", "node_modules"):
        (folder / name).mkdir()
        (folder / name / "x.txt").write_text("hidden")
    (folder / ".env").write_text("SECRET=1")
    assert list(run(folder)) == ["a.txt", "b/two.md", "c.csv#1", "c.csv#2"]


def test_links_that_leave_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("a secret")
    (folder / "leaves.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "up").symlink_to(tmp_path)
    (folder / "round").symlink_to(folder)
    (folder / "stays.txt").symlink_to("a.txt")
    (folder / "broken.txt").symlink_to("nowhere")
    found = run(folder)
    sentence = "the link leaves the folder: name its target as a path of its own"
    assert reasons(found) == {
        "broken.txt": "the link leads nowhere: no such file or directory",
        "leaves.txt": sentence,
        "up": sentence,
    }
    assert isinstance(found["stays.txt"], Document)
    assert not any(path.startswith("round") for path in found)


def test_special_files_are_never_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")  # opening it would wait for a writer for ever
    assert reasons(run(folder)) == {
        "pipe.txt": "it is no regular file but a pipe, socket or device: leave it out"
    }
    assert reasons(run("/dev/zero"))["zero"].startswith("it is no regular file")


def test_bad_files_do_not_stop_the_run(folder: Path) -> None:
    (folder / "a0.pdf").write_bytes(b"no pdf")
    (folder / "a1.txt").write_bytes(b"\x89PNG\0\0\0\0")
    (folder / "a2.jpg").write_bytes(b"x")
    (folder / "a3.txt").write_bytes(b"")
    found = run(folder)
    assert set(reasons(found)) == {"a0.pdf", "a1.txt", "a2.jpg", "a3.txt"}
    assert isinstance(found["c.csv#2"], Document)


def test_names_that_cannot_be_stored_are_refused(folder: Path) -> None:
    (folder / "bad\x1b[2Jname.txt").write_text("text")
    (folder / "bad\nline.txt").write_text("text")
    with open(os.fsencode(folder) + b"/bad\xff.txt", "wb") as stream:
        stream.write(b"text")
    found = reasons(run(folder))
    assert set(found) == {"bad\\nline.txt", "bad\\x1b[2Jname.txt", "bad\\udcff.txt"}
    assert set(found.values()) == {"its name holds characters that cannot be stored: rename it"}


def test_missing_paths_and_empty_folders(tmp_path: Path) -> None:
    assert run(tmp_path) == {}
    assert list(reasons(run(tmp_path / "nowhere")).values()) == [
        "there is no such file or folder: check the name"
    ]


def test_two_files_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"text of {name}")
    found = list(read_documents([tmp_path / "x", tmp_path / "y"], count_tokens=words))
    assert isinstance(found[0], Document)
    assert found[1] == Unreadable(
        "a.txt",
        "another of the folders holds a file of the same name: name the folder above both instead",
    )


def test_a_file_over_the_limit_is_not_read(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"x" * 3_000_000)
    assert reasons(run(folder, limits=Limits(bytes=2**20)))["a.txt"] == (
        "it has 2.9 MiB, more than the 1 MiB that are allowed: split it"
    )


def test_a_long_single_line_is_cut(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_bytes(b"some words in one line, " * 10_000)
    (document,) = run(tmp_path).values()
    assert isinstance(document, Document)
    assert max(words(chunk.text) for chunk in document.chunks) <= 300
    assert {chunk.line for chunk in document.chunks} == {1}


def test_reading_is_lazy(folder: Path) -> None:
    stream = read_documents([folder], count_tokens=words)
    assert next(stream).path == "a.txt"
    (folder / "b" / "two.md").unlink()
    (folder / "b" / "new.md").write_text("late")
    rest = [item.path for item in stream]
    assert rest[0] == "b/new.md"


def test_the_language_is_told_where_it_is_certain(tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("Die Hütte ist im Winter geschlossen, Hunde sind willkommen.")
    (tmp_path / "short.txt").write_text("OK 1234")
    (tmp_path / "code.py").write_text("def the_quick_brown_fox():\n    return 'jumps over it'\n")
    found = {p: d.language for p, d in run(tmp_path).items() if isinstance(d, Document)}
    assert found == {"de.txt": "de", "short.txt": None, "code.py": None}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("地震のときは机の下に入ります", "ja"),
        ("猫很独立，但是它需要时间", "zh"),
        ("도서관은 월요일에 쉽니다", "ko"),
        ("ok", None),
        ("12345 67890 12345 67890 12345", None),
        ("https://example.org/die/huette/ist/im/winter/geschlossen", None),
    ],
)
def test_short_texts(text: str, language: str | None) -> None:
    assert detect(text) == language


# ---- watching ----


def test_changes_are_called_back_with_document_names(folder: Path) -> None:
    stop, seen = threading.Event(), threading.Event()
    calls: list[Changes] = []

    def note(changes: Changes) -> None:
        calls.append(changes)
        if any("a.txt" in one.removed for one in calls):
            seen.set()

    thread = threading.Thread(
        target=watch, args=([folder], note), kwargs={"stop": stop, "wait_ms": 50}, daemon=True
    )
    thread.start()
    try:
        for attempt in range(100):  # the watch takes a moment to begin
            (folder / "b" / "two.md").write_text(f"# Two\n\nNew text {attempt}.\n")
            (folder / ".hidden").write_text("x")
            if calls:
                break
            seen.wait(0.1)
        (folder / "a.txt").unlink()
        assert seen.wait(10)
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()
    assert {name for call in calls for name in call.changed} == {"b/two.md"}
    assert {name for call in calls for name in call.removed} == {"a.txt"}


def test_a_path_that_does_not_exist_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="cannot be watched: there is no such file or folder"):
        watch([tmp_path / "nowhere"], lambda changes: None)
