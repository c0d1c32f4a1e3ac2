"""`lfm2-mm quantize` and `--quantize`: a packed folder, what is said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lfm2_mm
from lfm2_mm.quantize.layers import PackedLinear
from tests.cli.conftest import Run


@pytest.mark.parametrize("calibrate", ["none", "own", "lines"])
def test_a_text_model_is_packed(
    calibrate: str, text_folder: Path, run: Run, tmp_path: Path
) -> None:
    if calibrate == "lines":
        (tmp_path / "lines").write_text("What colour is the circle?\n\nred\n", "utf-8")
        calibrate = str(tmp_path / "lines")
    out = tmp_path / "packed"
    done = run("quantize", text_folder, "-o", out, "--calibrate", calibrate)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert "kB in" in done.stderr or "MB in" in done.stderr
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["recipe"] == "int4"
    model = lfm2_mm.load(out, threads=1)
    assert isinstance(model.backbone.layers[0].feed_forward.w1, PackedLinear)
    assert run("chat", "-m", out, "-q", "--max-tokens", 2, stdin="hello\n").exit_code == 0


def test_eight_bits_as_json(text_folder: Path, run: Run, tmp_path: Path) -> None:
    done = run("quantize", text_folder, "-o", tmp_path / "p", "--scheme", "int8", "--json")
    said = json.loads(done.stdout)
    assert said["scheme"] == "int8" and said["folder"] == str(tmp_path / "p")
    assert said["bytes"] > 10_000 and said["seconds"] >= 0
    assert not list(tmp_path.glob(".*"))


def test_the_option_packs_while_loading(nano_folder: Path, run: Run) -> None:
    plain = run("ask", "-", "What colour?", "--max-tokens", 3, "--quantize", "int8", stdin=b"no")
    assert plain.exit_code == 1 and "Traceback" not in plain.stderr
    wrong = run("chat", "--quantize", "int3", stdin="hello\n")
    assert wrong.exit_code == 1
    assert "quantize is 'int3' (from flag --quantize): it must be one of none, int4, int8" in (
        wrong.stderr
    )


def test_keys_and_values_in_bytes(nano_folder: Path, text_folder: Path, run: Run) -> None:
    options = ("--kv-cache-dtype", "int8", "-m", text_folder, "-q", "--max-tokens", 2)
    assert run("chat", *options, stdin="hello\n").exit_code == 0
    wrong = run("chat", "--kv-cache-dtype", "int4", stdin="hello\n")
    assert wrong.exit_code == 1
    assert (
        "kv_cache_dtype is 'int4' (from flag --kv-cache-dtype): it must be one of auto, int8"
        in (wrong.stderr)
    )


def test_what_holds_something_else_is_kept(text_folder: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    done = run("quantize", text_folder, "-o", tmp_path)
    assert done.exit_code == 1
    assert "is not empty and holds no checkpoint, so it is not overwritten" in done.stderr
    assert (tmp_path / "mine.txt").read_text("utf-8") == "mine"


@pytest.mark.parametrize("content", [None, "\n \n"])
def test_texts_that_say_nothing(
    content: str | None, text_folder: Path, run: Run, tmp_path: Path
) -> None:
    lines = tmp_path / "lines"
    if content is not None:
        lines.write_text(content, "utf-8")
    done = run("quantize", text_folder, "-o", tmp_path / "p", "--calibrate", lines)
    assert done.exit_code == 1
    assert f"the text {str(lines)!r} " in done.stderr
    assert "name a file of lines, own or none" in done.stderr
    assert not (tmp_path / "p").exists()


def test_retrievers_are_packed_but_not_calibrated(run: Run, tmp_path: Path) -> None:
    done = run("quantize", "nano-colbert", "-o", tmp_path / "p", "--scheme", "int8", "-q")
    assert done.exit_code == 0, done.stderr
    encoder = lfm2_mm.load(tmp_path / "p", threads=1)
    assert encoder.encode_queries(["file"])[0].shape[1] == encoder.dim
    refused = run("quantize", "nano-colbert", "-o", tmp_path / "q", "--calibrate", "own")
    assert refused.exit_code == 1
    assert "writes no text, so it cannot be calibrated; leave --calibrate out" in refused.stderr
