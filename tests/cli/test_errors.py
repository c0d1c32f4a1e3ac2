"""Bad input: one sentence on stderr, nothing on stdout, exit 1, no traceback."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image

from lfm2_mm.cli import plugins as plugins_module

from .conftest import Run


def sentence(result: Result) -> str:
    """The one sentence of a failure."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ") and "Traceback" not in lines[0]
    return lines[0].removeprefix("error: ")


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of this size."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"


def image_files(folder: Path) -> dict[str, Path]:
    files = {name: folder / name for name in ("empty.png", "cut.jpg", "dot.png", "huge.png")}
    files["empty.png"].write_bytes(b"")
    Image.effect_noise((200, 200), 90).save(files["cut.jpg"])
    files["cut.jpg"].write_bytes(files["cut.jpg"].read_bytes()[:3000])
    Image.new("RGB", (1, 1)).save(files["dot.png"])
    files["huge.png"].write_bytes(png_header(30_000, 30_000))
    files["note.png"] = folder / "note.png"
    files["note.png"].write_text("Dear diary,\n")
    return files


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty.png", "is empty (0 bytes)"),
        ("cut.jpg", "is damaged or cut short"),
        ("dot.png", "is 1x1 pixels"),
        ("huge.png", "is 30000x30000 pixels"),
        ("note.png", "is not an image"),
    ],
)
def test_bad_images(run: Run, tmp_path: Path, name: str, says: str) -> None:
    path = image_files(tmp_path)[name]
    said = sentence(run("ask", path, "What?"))
    assert says in said and name in said
    assert said.count(". ") == 0 and (";" in said or ":" in said)  # one sentence with advice


def test_bad_bytes_on_standard_input(run: Run) -> None:
    assert "'standard input' is empty (0 bytes)" in sentence(run("ask", "-", "What?", stdin=b""))


def test_a_missing_file_is_refused_before_a_model_is_looked_for(run: Run) -> None:
    said = sentence(run("ask", "-m", "no-such-model", "nope.png", "What?"))
    assert said == "there is no file 'nope.png'; check the path"


def test_more_placeholders_than_images(run: Run, picture: Path) -> None:
    said = sentence(run("ask", picture, "Is <image> like <image>?"))
    assert "2 image placeholders" in said and "1 image was given" in said


def test_an_image_for_a_text_model(run: Run, text_folder: Path, picture: Path) -> None:
    said = sentence(run("ask", "-m", text_folder, picture, "What?"))
    assert "reads text only" in said and "LiquidAI/LFM2.5-VL-450M" in said


def test_an_image_option_for_a_text_model(run: Run, text_folder: Path) -> None:
    said = sentence(run("ask", "-m", text_folder, "What?", "--max-tiles", 2))
    assert "have no option 'max_tiles'" in said


class Missing(BaseHTTPRequestHandler):
    """Answers 404 to everything, and nothing to stderr."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Missing) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_url_that_is_not_there(run: Run, server: str) -> None:
    said = sentence(run("ask", f"{server}/cat.png", "What?"))
    assert f"{server}/cat.png answered 404" in said and "check the address" in said


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("LFM2-VL-450", "LiquidAI/LFM2-VL-450M"),
        ("lfm2.5-vl-1.6b", "LiquidAI/LFM2.5-VL-1.6B"),
        ("LiquidAI/LFM2-VL-450", None),
    ],
)
def test_a_wrong_model_name_suggests_the_nearest(run: Run, name: str, near: str | None) -> None:
    said = sentence(run("ask", "-m", name, "What?"))
    assert name in said
    if near is not None:
        assert said == f'no model "{name}": did you mean {near}?'


def test_corrupt_weights(run: Run, nano_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(nano_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert "model.safetensors" in sentence(run("ask", "-m", folder, "What?"))


def test_another_architecture(run: Run, nano_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(nano_folder, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    said = sentence(run("ask", "-m", folder, "What?"))
    assert "'llama'" in said and "LFM2" in said


def test_what_nobody_foresaw_is_one_sentence_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("bang\nbang")

    monkeypatch.setattr("lfm2_mm.cli.ask.load_model", explode)
    said = sentence(run("ask", "What?"))
    assert said == (
        "something unexpected happened (RuntimeError: bang bang); "
        "set LFM2_MM_LOG=debug for the traceback"
    )
    monkeypatch.setenv("LFM2_MM_LOG", "debug")
    assert "Traceback" in run("ask", "What?").stderr


def test_the_system_refuses(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "/data/x")

    monkeypatch.setattr("lfm2_mm.cli.ask.load_model", full)
    assert "refused '/data/x': No space left on device" in sentence(run("ask", "What?"))


def test_interrupting_exits_130_and_keeps_what_was_said(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2_mm.model import Stream

    pieces = iter(["half an", " answer"])

    def interrupted(self: Stream) -> str:
        for piece in pieces:
            return piece
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "__next__", interrupted)
    result = run("ask", "What?")
    assert result.exit_code == 130
    assert result.stdout == "half an answer\n"
    assert result.stderr.split() == ["interrupted"]


def test_nobody_reads_the_answer(nano_folder: Path) -> None:
    code = f"lfm2 ask -m {nano_folder} 'Hi' --regex '(ab){{200}}' | true"
    program = f"{sys.executable} -m lfm2_mm"
    done = subprocess.run(
        ["bash", "-c", code.replace("lfm2", program, 1)], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("", "")


class Point:
    """An entry point that names something unusable."""

    def __init__(self, name: str, result: object) -> None:
        self.name, self.value, self.result = name, f"{name}.commands:plugin", result

    def load(self) -> object:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class NoVerb:
    """A plugin whose command is none."""

    commands = ("not a command",)


@pytest.mark.parametrize(
    ("broken", "why"),
    [(ImportError("no tensorboard"), "no tensorboard"), (NoVerb(), "is no Command of click")],
)
def test_a_broken_plugin_warns_and_breaks_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, broken: object, why: str
) -> None:
    from importlib.metadata import entry_points as real

    def points(*, group: str) -> list[Any]:
        return [*real(group=group), Point("zzz", broken)]

    monkeypatch.setattr(plugins_module, "entry_points", points)
    plugins_module.installed.cache_clear()
    try:
        result = run("ask", "What?", "--regex", "no")
        assert (result.exit_code, result.stdout) == (0, "no\n")
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("warning: the plugin 'zzz'") and why in result.stderr
        listed = json.loads(run("doctor", "--json", "-q").stdout)["plugins"]
        assert why in next(row["error"] for row in listed if row["name"] == "zzz")
    finally:
        plugins_module.installed.cache_clear()
