from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lfm2_mm.train.trainer import Trainer
from lfm2_vision import nano

from .conftest import Run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training without compiling, scoring or real batches; everything around it stays."""
    threads = torch.get_num_threads()

    def batches(data: Any, start: int, workers: int) -> Iterator[int]:
        yield from range(start, len(data))

    def one(self: Trainer, batch: int) -> dict[str, float]:
        assert batch == self.step
        self.step += 1
        if batch == 3 and not (self.folder / "log.jsonl").exists():
            (self.folder / "log.jsonl").touch()
            raise KeyboardInterrupt
        return {"loss": 1.0}

    monkeypatch.setattr(nano, "_quicken", lambda model: None)
    monkeypatch.setattr(nano, "held_out_scores", lambda *args, **kwargs: {"colour": 0.5})
    monkeypatch.setattr(nano, "_stream", batches)
    monkeypatch.setattr(Trainer, "_one", one)
    yield
    torch.set_num_threads(threads)


def step_of(folder: Path) -> int:
    with safe_open(folder / "trainer.safetensors", framework="pt") as file:
        return int(file.metadata()["step"])


@pytest.mark.usefixtures("quick")
def test_training_is_interrupted_resumed_and_exported(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    common = ("train", "nano-vl", "--out", folder, "--workers", 0)
    result = run(*common, "--steps", 6, "--seed", 5)
    assert result.exit_code == 130 and result.stdout == ""
    assert "checkpoint kept" in result.stderr and step_of(folder) == 4
    assert json.loads((folder / "run.json").read_text()) == {"steps": 6, "seed": 5}

    other = run(*common, "--steps", 7)
    assert other.exit_code == 1
    assert other.stderr == (
        f"error: the run in {str(folder)!r} has steps 6, not 7; go on without --steps, or begin "
        "anew with --fresh or another --out\n"
    )
    assert "has seed 5, not 6" in run(*common, "--seed", 6).stderr

    until = run(*common, "--until", 5)
    assert until.exit_code == 0 and step_of(folder) == 5
    assert "resumed at step 4" in until.stderr

    done = run(*common, "-q", "--json")
    assert (done.exit_code, done.stderr, step_of(folder)) == (0, "", 6)
    made = json.loads(done.stdout)
    assert made["model"] == str(folder / "model")
    assert run("ask", "-m", made["model"], "What?", "--regex", "no").stdout == "no\n"

    again = run(*common, "--fresh", "--steps", 2)
    assert again.exit_code == 0 and step_of(folder) == 2
    assert again.stdout == f"{folder / 'model'}\n"


def test_an_unknown_recipe_names_the_nearest(run: Run) -> None:
    result = run("train", "nano-vll")
    assert result.exit_code == 1
    assert result.stderr == "error: there is no recipe 'nano-vll'; did you mean nano-vl?\n"
    assert "these exist: " in run("train", "other").stderr


def test_a_checkpoint_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "trainer.safetensors").write_bytes(b"no")
    result = run("train", "nano-vl", "--out", tmp_path)
    assert result.exit_code == 1 and "begin anew with --fresh" in result.stderr
    save_file({"a": torch.zeros(1)}, tmp_path / "trainer.safetensors")
    result = run("train", "nano-vl", "--out", tmp_path)
    assert result.exit_code == 1 and "cannot be read" in result.stderr
