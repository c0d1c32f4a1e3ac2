from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lfm2_mm.cli import terminal

from .conftest import Run, last_json

BOX = r'\[\{"bbox_2d": \[100, 250, 500, 750\], "label": "a"\}\]'


def test_an_answer_goes_to_stdout_and_nothing_else_does(run: Run, picture: Path) -> None:
    result = run("ask", picture, "What colour?", "--regex", "dark red")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "dark red\n", "")


def test_a_question_alone_works(run: Run, text_folder: Path) -> None:
    for model in ((), ("-m", text_folder)):
        result = run("ask", *model, "Who?", "--regex", "me")
        assert (result.exit_code, result.stdout) == (0, "me\n")


def test_json_holds_what_was_seen_and_what_it_took(run: Run, tmp_path: Path, picture: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.new("RGB", (900, 600), "blue").save(wide)
    result = run("ask", picture, wide, "Same?", "--json", "--regex", "no")
    assert result.exit_code == 0
    found: Any = last_json(result)
    assert set(found) == {
        "answer",
        "model",
        "images",
        "finish_reason",
        "usage",
        "timings",
        "tokens_per_second",
    }
    assert (found["answer"], found["finish_reason"]) == ("no", "stop")
    first, second = found["images"]
    assert first["source"] == str(picture)
    assert (first["size"], first["tiles"]) == ([96, 64], None)
    assert (second["size"], second["tiles"]) == ([900, 600], [3, 2])
    assert found["usage"]["attachment_tokens"] == first["tokens"] + second["tokens"]
    assert found["timings"]["first_token"] > 0


def test_a_text_model_reports_no_images(run: Run, text_folder: Path) -> None:
    found: Any = last_json(run("ask", "-m", text_folder, "Who?", "--json", "--regex", "me"))
    assert "images" not in found and found["model"] == str(text_folder)


def test_the_image_budget_reaches_the_encoder(run: Run, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.new("RGB", (900, 600), "blue").save(wide)
    common = ("ask", wide, "What?", "--json", "--regex", "no")
    one: Any = last_json(run(*common, "--max-tiles", 1))
    assert one["images"][0]["tiles"] is None
    few: Any = last_json(run(*common, "--max-tiles", 1, "--max-image-tokens", 48))
    assert few["images"][0]["tokens"] <= 48 < one["images"][0]["tokens"]


def test_an_image_comes_through_standard_input(run: Run, picture: Path) -> None:
    result = run("ask", "-", "What?", "--json", "--regex", "no", stdin=picture.read_bytes())
    found: Any = last_json(result)
    assert found["images"][0]["size"] == [96, 64]
    assert found["images"][0]["source"] == "-"


def test_a_question_comes_through_standard_input(run: Run, picture: Path) -> None:
    result = run("ask", picture, "-", "--regex", "no", stdin="What is this?\n")
    assert (result.exit_code, result.stdout) == (0, "no\n")
    wrong = run("ask", "what?", "-", stdin=picture.read_bytes())
    assert wrong.exit_code == 1 and "put '-' first" in wrong.stderr


def test_a_schema_comes_from_the_command_line_or_a_file(run: Run, tmp_path: Path) -> None:
    schema = json.dumps({"enum": ["red"]})
    path = tmp_path / "schema.json"
    path.write_text(schema)
    for given in (schema, path):
        assert json.loads(run("ask", "Colour?", "--json-schema", given).stdout) == "red"


def test_seed_and_sampling_are_honoured(run: Run) -> None:
    common = ("ask", "Tell me.", "--max-tokens", 6, "--temperature", 2, "--top-k", 50)
    one, same, other = (run(*common, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == same != other
    bad = run("ask", "Tell me.", "--temperature", -1)
    assert bad.exit_code == 1
    assert bad.stderr == "error: temperature is -1.0: it must be 0 (greedy) or a number up to 100\n"


def test_show_tiles_writes_one_sheet_per_image(run: Run, tmp_path: Path, picture: Path) -> None:
    one = tmp_path / "tiles.png"
    result = run("ask", picture, "What?", "--regex", "no", "--show-tiles", one)
    assert result.exit_code == 0 and result.stderr == f"tiling drawn: {one}\n"
    with Image.open(one) as sheet:
        assert min(sheet.size) > 100
    two = run("ask", picture, picture, "What?", "--regex", "no", "--show-tiles", one, "-q")
    assert two.stderr == ""
    assert (tmp_path / "tiles-1.png").exists() and (tmp_path / "tiles-2.png").exists()


def test_show_tiles_from_standard_input(run: Run, tmp_path: Path, picture: Path) -> None:
    args = ("ask", "-", "What?", "--regex", "no", "--show-tiles", tmp_path / "t.png")
    assert run(*args, stdin=picture.read_bytes()).exit_code == 0
    assert (tmp_path / "t.png").exists()


def test_draw_boxes_draws_what_the_answer_names(run: Run, tmp_path: Path, picture: Path) -> None:
    target = tmp_path / "boxes.png"
    result = run("ask", picture, "Where?", "--regex", BOX, "--draw-boxes", target)
    assert result.exit_code == 0
    with Image.open(target) as drawn, Image.open(picture) as before:
        assert drawn.size == before.size
        assert drawn.tobytes() != before.tobytes()
    none = run("ask", picture, "Where?", "--regex", "no", "--draw-boxes", target)
    assert "names no boxes" in none.stderr


def test_pictures_that_cannot_be_written_are_refused_first(run: Run, picture: Path) -> None:
    result = run("ask", picture, "What?", "--show-tiles", "tiles.txt")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "does not end like one" in result.stderr
    result = run("ask", picture, "What?", "--show-tiles", "no-such-folder/tiles.png")
    assert result.exit_code == 1 and "is not there" in result.stderr


def test_decorations_show_on_a_terminal_only(
    run: Run, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: stream is sys.stderr)
    result = run("ask", picture, "What?", "--regex", "dark red")
    assert result.stdout == "dark red\n"
    line = result.stderr.splitlines()[-1]
    assert "1 image (" in line and "tokens" in line and "first token" in line
    assert run("ask", picture, "What?", "--regex", "dark red", "-q").stderr == ""


def test_the_embedded_model_says_what_it_knows(
    run: Run, nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "pretrained"
    home.mkdir()
    (home / "nano-vl").symlink_to(nano_folder)
    monkeypatch.setattr("lfm2_mm.locate._pretrained", lambda: home)
    result = run("ask", "-m", "nano-vl", "What?", "--regex", "no")
    assert result.stdout == "no\n"
    assert result.stderr.count("\n") == 1
    assert "drawn scenes only" in result.stderr and "LiquidAI/LFM2.5-VL-450M" in result.stderr
    assert run("ask", "-m", "nano-vl", "What?", "--regex", "no", "-q").stderr == ""
