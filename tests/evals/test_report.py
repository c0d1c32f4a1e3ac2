"""Reports: tables, the chart, JSON, and files that are whole or absent."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lfm2_evals.report import Report, Section, bar_chart, markdown_table, write_files
from lfm2_evals.task import Score
from lfm2_mm.errors import InputError

SCORES = [Score("colour", 95, 100, 14, 0.9), Score("a <b> | c", 1, 4), Score("none", 0, 0)]


def report(complete: bool = True) -> Report:
    slices = {"tiled": SCORES, "one view": SCORES}
    section = Section(
        name="core", title="Core & more", scores=SCORES, slices=slices, complete=complete
    )
    return Report(
        title="Scenes",
        facts={"model": "nano"},
        sections=[section],
        notes=["A note."],
        details={"outcomes": [1]},
    )


def test_markdown_shows_every_number_beside_its_interval_blind_guess_and_floor() -> None:
    lines = report().markdown().splitlines()
    assert lines[:4] == ["# Scenes", "", "- model: nano", ""]
    assert "| colour | 95.0 | 88.8 to 97.8 | 14.0 | 100 | 90 reached |" in lines
    assert "| a <b> \\| c | 25.0 | 4.6 to 69.9 |  | 4 |  |" in lines
    assert "| colour | 95.0 (100) | 95.0 (100) |" in lines
    assert "| none |  |  |" in lines
    assert lines[-1] == "A note."
    assert "Stopped early" not in report().markdown()
    assert "Stopped early: these are the answers until then." in report(False).markdown()


def test_a_missed_floor_is_called_missed() -> None:
    section = Section(name="c", title="C", scores=[Score("shape", 1, 2, 0, 0.9)])
    assert "| 90 missed |" in section.markdown()


def test_tables_keep_their_columns_whatever_cells_hold() -> None:
    table = markdown_table(["", "b"], [["x|y", "1\n2"]]).splitlines()
    assert table == ["|  | b |", "| :-- | --: |", "| x\\|y | 1 2 |"]


def test_json_is_plain_and_holds_the_details() -> None:
    found = json.loads(json.dumps(report().to_dict()))
    assert found["outcomes"] == [1]
    assert found["sections"][0]["scores"][0] == {
        "name": "colour",
        "n": 100,
        "right": 95,
        "accuracy": 0.95,
        "low": 0.8882,
        "high": 0.9785,
        "blind": 0.14,
        "floor": 0.9,
    }


def test_the_chart_is_well_formed_and_draws_bar_whisker_blind_and_floor() -> None:
    root = ET.fromstring(bar_chart("Scenes <1>", [("Core & more", SCORES)]))
    space = "{http://www.w3.org/2000/svg}"
    classes = [element.get("class") for element in root.iter() if element.get("class")]
    assert classes.count("b") == 3 and classes.count("w") == 3
    assert classes.count("m") == 1 and classes.count("f") == 1
    bars = [float(e.get("width", 0)) for e in root.iter(f"{space}rect") if e.get("class") == "b"]
    assert bars == [342.0, 90.0, 0.0]
    texts = [element.text for element in root.iter(f"{space}text")]
    assert "a <b> | c" in texts and "95.0 %" in texts


def test_write_makes_the_folder_and_leaves_no_partial_file(tmp_path: Path) -> None:
    paths = report().write(tmp_path / "new" / "folder", "scenes")
    assert [path.name for path in paths] == ["scenes.md", "scenes.json", "scenes.svg"]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)
    assert paths[0].read_text("utf-8") == report().markdown()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        InputError, match=r"^the report cannot be written to '.*file' \(File exists"
    ):
        write_files(tmp_path / "file", {"a.md": "b"})
