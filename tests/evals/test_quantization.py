"""The task `quantization`: divergence of packed from whole models, and its report."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lfm2_evals import quantization
from lfm2_evals.quantization import (
    FORMS,
    QuantizationReport,
    Row,
    evaluate,
    rank_correlation,
)
from lfm2_mm.cli import cli
from lfm2_mm.errors import SettingError
from lfm2_mm.quantize import calibration


def test_four_bits_lose_no_more_than_those_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    few = functools.partial(calibration.own_words, sequences=4, tokens=32)
    monkeypatch.setattr(calibration, "own_words", few)
    rows = evaluate(["divergence"], count=8, threads=1)
    by = {(row.model, row.form): row for row in rows}
    assert [form for model, form in by if model == "heavy tails"] == list(FORMS)
    for model in ("nano-vl", "heavy tails"):
        loss = {form: by[model, form].divergence or 0.0 for form in FORMS}
        assert 0 < loss["int8"] < loss["int4"] / 20
        assert loss["int4"] < 1.3 * loss["Q4_0"]  # level over more questions


@pytest.mark.slow
def test_answers_and_rankings_are_compared() -> None:
    found = evaluate(["answers", "rankings"], count=20, threads=1)
    forms = ["int8 KV cache", "int8", "int4", "int4 calibrated"]
    forms += ["int8", "int8 queries", "int4", "int4 queries"]
    assert [row.form for row in found] == forms
    assert all(0.8 < row.same <= 1 for row in found)
    assert [row.floor for row in found[4:]] == [0.98, None, 0.95, None]
    assert all(0.9 < (row.correlation or 0) <= 1 for row in found[4:])


@pytest.mark.slow
def test_what_is_heard_and_answered_is_compared() -> None:
    found = evaluate(["speech"], count=3, threads=1)
    assert [row.form for row in found] == ["int8", "int8", "int4", "int4"]
    assert {row.model for row in found} == {"nano-audio, heard", "nano-audio, answered"}
    assert all(row.n == 3 and row.floor for row in found)


def test_rankings_are_compared_by_their_order() -> None:
    wanted = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 1.0, 2.0, 9.0]])
    assert rank_correlation(wanted.exp(), wanted) == pytest.approx(1.0)
    assert rank_correlation(-wanted, wanted) == pytest.approx(-1.0)
    swapped = torch.tensor([[1.0, 2.0, 4.0, 3.0], [5.0, 1.0, 2.0, 9.0]])
    assert rank_correlation(swapped, wanted) == pytest.approx(0.9)  # 1 - 6 * 2 / (4 * 15), and 1


def test_the_report_says_it(tmp_path: Path) -> None:
    row = Row(tier="answers", model="m", form="int8", n=100, divergence=None, same=0.97, floor=0.98)
    found = Row(
        tier="rankings", model="m", form="int8", n=9, divergence=None, same=1.0, correlation=0.9987
    )
    near = Row(tier="divergence", model="m", form="int8", n=50, divergence=0.001, same=0.9)
    report = QuantizationReport(facts={"command": "lfm2-mm"}, rows=[row, near, found])
    text = report.markdown()
    assert "| answers | m | int8 | 100 |  | 97.0 % (91.5 to 99.0) | 98 %, missed |  |" in text
    assert "| divergence | m | int8 | 50 | 0.00100 | 90.0 % (78.6 to 95.7) |  |  |" in text
    assert "(70.1 to 100.0) |  | 0.9987 |" in text
    paths = report.write(tmp_path, "quantization")
    assert [path.name for path in paths] == ["quantization.md", "quantization.json"]
    assert json.loads(paths[1].read_text("utf-8"))["rows"][0]["form"] == "int8"


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(SettingError) as error:
        evaluate(["speed"], count=3)
    assert str(error.value) == (
        "there is no tier 'speed'; choose from divergence, answers, rankings, speech"
    )
    with pytest.raises(SettingError, match="the count is 1; ask for at least 2"):
        evaluate(["answers"], count=1)


def test_the_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(tier="answers", model="m", form="int8", n=10, divergence=None, same=1.0)
    asked = []

    def fake(tiers: list[str], **options: object) -> list[Row]:
        asked.append((tiers, options["count"]))
        return [row]

    monkeypatch.setattr(quantization, "evaluate", fake)
    done = CliRunner().invoke(
        cli, ["eval", "quantization", "--tier", "answers", "--count", "7", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"][0]["same"] == 1.0
    assert asked == [(["answers"], 7)]
