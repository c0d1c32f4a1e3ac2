from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lfm2_mm.model import Model
from lfm2_vision.demo import examples, same_answer
from lfm2_vision.scenes import for_evaluation

from .conftest import Run, last_json


def test_an_untrained_model_is_told_what_is_wrong(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("demo", "--seed", 3, "--out", out)
    assert result.exit_code == 1
    report = json.loads((out / "demo.json").read_text())
    assert (report["questions"], report["seed"]) == (22, 3)
    wrong = [row for row in report["answers"] if not row["right"]]
    assert wrong and report["right"] == 22 - len(wrong)
    for row in wrong:
        assert f"WRONG, it is {row['truth']}" in result.stdout
    assert result.stderr.startswith(f"error: {len(wrong)} wrong answer")
    assert repr(wrong[0]["question"]) in result.stderr
    written = {path.name for path in out.iterdir()}
    assert written == {
        "demo.json",
        "klatt3-arithmetic-answer.wav",
        "m6-capital-answer.wav",
        "m6-echo-answer.wav",
        "scene-3.png",
        "search.html",
        "search.idx",
        "simple.png",
        "tall.jpg",
        "wide-tiles.png",
        "wide.png",
    }
    assert {name for row in report["answers"] for name in row["files"]} == written - {
        "demo.json",
        "search.idx",
    }


def test_right_answers_end_well(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truths = {(path.name, question): answer for path, question, answer in examples()}

    def oracle(self: Model, question: str, images: Any, **options: Any) -> str:
        return truths.get((images[0].name, question), "?")

    import lfm2_vision.demo as module

    def remembered(*args: Any) -> Any:
        asked = for_evaluation(*args)
        truths.update({("scene-1.png", qa.question): qa.answer for qa in asked})
        return asked

    monkeypatch.setattr(Model, "ask", oracle)
    monkeypatch.setattr(module, "for_evaluation", remembered)
    result = run("demo", "--out", tmp_path, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report: Any = last_json(result)
    assert report["right"] == report["questions"] == 22
    again = run("demo", "--out", tmp_path)
    assert again.stdout.splitlines()[-1] == (f"22 of 22 right; pictures and demo.json: {tmp_path}")


def test_answers_are_compared_kindly() -> None:
    assert same_answer(" Blue.\n", "blue") and not same_answer("dark blue", "blue")
