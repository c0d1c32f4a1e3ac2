from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lfm2_mm.cli import batch

from .conftest import Run, last_json

Record = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image in a subfolder, so that relative paths matter."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures/a.png")
    return tmp_path


def write(folder: Path, *lines: object) -> Path:
    path = folder / "questions.jsonl"
    rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(rows) + "\n")
    return path


def read(folder: Path) -> list[Record]:
    return [json.loads(row) for row in (folder / "answers.jsonl").read_text().splitlines()]


def args(folder: Path) -> tuple[object, ...]:
    questions, answers = folder / "questions.jsonl", folder / "answers.jsonl"
    return ("ask", "--batch", questions, "-o", answers, "--regex", "yes")


def test_one_answer_for_each_line_and_errors_stop_nothing(run: Run, folder: Path) -> None:
    write(
        folder,
        {"id": "a", "image": "pictures/a.png", "question": "Red?"},
        "{not json",
        "",
        [1],
        {"id": 7, "images": ["pictures/a.png", "pictures/a.png"], "question": "Same?"},
        {"image": "gone.png", "question": "What?"},
        {"question": ""},
        {"question": "How?", "max_tokens": "many"},
        {"question": "Who?", "image": 3},
        {"question": "Who?", "system": "Be brief.", "expected": "ignored"},
    )
    result = run(*args(folder))
    assert result.exit_code == 1
    assert result.stdout == ""
    found = read(folder)
    assert [row["line"] for row in found] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert [row.get("id") for row in found] == ["a", None, None, 7, None, None, None, None, None]
    answers = {row["line"]: row["answer"] for row in found if "answer" in row}
    assert answers == {1: "yes", 5: "yes", 10: "yes"}
    assert [len(row["images"]) for row in found if "answer" in row] == [1, 2, 0]
    errors = {row["line"]: row["error"] for row in found if "error" in row}
    assert "line 2 is not JSON" in errors[2] and "line 4 holds a JSON list" in errors[4]
    assert errors[6] == "there is no file 'gone.png'; check the path"
    assert "the question ''" in errors[7] and "max_tokens 'many'" in errors[8]
    assert "names the image 3" in errors[9]
    assert result.stderr == f"3 answered, 6 failed of 9 lines: {folder / 'answers.jsonl'}\n"


def test_a_second_run_answers_only_what_is_missing(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    answer = batch._answer

    def counted(model: Any, line: Any, *rest: Any) -> Any:
        if len(asked) == 2:
            asked.append(-1)
            raise KeyboardInterrupt
        asked.append(line.number)
        return answer(model, line, *rest)

    monkeypatch.setattr(batch, "_answer", counted)
    write(folder, *({"question": text} for text in ("One?", "Two?", "Three?", "One?")))
    result = run(*args(folder))
    assert result.exit_code == 130
    assert [row["line"] for row in read(folder)] == [1, 2]
    asked.append(-1)
    result = run(*args(folder), "--json")
    assert result.exit_code == 0
    assert asked == [1, 2, -1, -1, 3, 4]  # equal lines are answered each
    assert [row["line"] for row in read(folder)] == [1, 2, 3, 4]
    counts: Any = last_json(result)
    del counts["output"]
    assert counts == {"lines": 4, "answered": 2, "skipped": 2, "failed": 0}
    before = (folder / "answers.jsonl").read_bytes()
    assert run(*args(folder)).exit_code == 0
    assert (folder / "answers.jsonl").read_bytes() == before and len(asked) == 6


def test_a_torn_last_line_is_repaired(run: Run, folder: Path) -> None:
    write(folder, {"question": "One?"}, {"question": "Two?"})
    assert run(*args(folder)).exit_code == 0
    whole = (folder / "answers.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for kept in (first + 25, first, 12, 0):
        (folder / "answers.jsonl").write_bytes(whole[:kept])
        assert run(*args(folder)).exit_code == 0
        assert [(row["line"], row["answer"]) for row in read(folder)] == [(1, "yes"), (2, "yes")]


def test_failed_lines_are_tried_again_and_order_is_kept(run: Run, folder: Path) -> None:
    write(folder, {"image": "late.png", "question": "One?"}, {"question": "Two?"})
    assert run(*args(folder)).exit_code == 1
    assert ["error" in row for row in read(folder)] == [True, False]
    shutil.copy(folder / "pictures/a.png", folder / "late.png")
    assert run(*args(folder)).exit_code == 0
    assert [(row["line"], row["answer"]) for row in read(folder)] == [(1, "yes"), (2, "yes")]


def test_edited_questions_keep_the_answers_that_still_fit(run: Run, folder: Path) -> None:
    write(folder, {"question": "One?"}, {"question": "Two?"})
    run(*args(folder))
    write(folder, {"question": "New?"}, {"question": "Two?"})
    result = run(*args(folder))
    assert result.exit_code == 0 and "1 answered, 1 skipped" in result.stderr
    assert [row["line"] for row in read(folder)] == [1, 2]


def test_files_of_other_people_are_left_alone(run: Run, folder: Path, text_folder: Path) -> None:
    questions = write(folder, {"question": "One?"})
    target = folder / "answers.jsonl"
    for content in ("my notes\n", '{"hash": 3}\n', '{"precious": 1}', "[1]\n"):
        target.write_text(content)
        result = run(*args(folder))
        assert result.exit_code == 1 and "not written by --batch" in result.stderr
        assert target.read_text() == content
    target.unlink()
    run(*args(folder))
    before = target.read_text()
    result = run(*args(folder), "-q", "-m", text_folder)
    assert result.exit_code == 0 and target.read_text() == before  # nothing was left to ask
    write(folder, {"question": "One?"}, {"question": "Two?"})
    result = run(*args(folder), "-m", text_folder)
    assert result.exit_code == 1 and "holds answers of" in result.stderr
    write(folder, {"question": "Other?"})
    result = run(*args(folder))
    assert result.exit_code == 1 and "answers to other questions" in result.stderr
    assert target.read_text() == before
    result = run("ask", "--batch", questions, "-o", questions)
    assert result.exit_code == 1 and "is the file of the questions" in result.stderr
    result = run("ask", "--batch", questions, "-o", folder / "none" / "a.jsonl")
    assert result.exit_code == 1 and "there is no folder" in result.stderr
    questions.write_text("\n\n")
    result = run(*args(folder))
    assert result.exit_code == 1 and "holds no question" in result.stderr


def test_pictures_of_a_batch_are_numbered_by_line(run: Run, folder: Path) -> None:
    pair = ["pictures/a.png", "pictures/a.png"]
    write(folder, {"image": pair[0], "question": "A?"}, {"images": pair, "question": "B?"})
    tiles = folder / "t.png"
    assert run(*args(folder), "--show-tiles", tiles, "-q").exit_code == 0
    names = sorted(path.name for path in folder.glob("t-*.png"))
    assert names == ["t-1.png", "t-2-1.png", "t-2-2.png"]


def test_a_bar_shows_on_a_terminal_only(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, {"question": "One?"}, {"question": "Two?"})
    monkeypatch.setattr("lfm2_mm.cli.terminal.is_terminal", lambda stream: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run(*args(folder))
    assert "answering" in result.stderr and "2/2" in result.stderr
    assert result.stdout == ""
