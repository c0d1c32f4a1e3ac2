"""A training run's folder keeps its length and its seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lfm2_mm.errors import InputError
from lfm2_mm.train.runs import begin_run, note_run


def begin(
    folder: Path, steps: int | None = None, seed: int | None = None, fresh: bool = False
) -> tuple[int, int | None]:
    return begin_run(folder, steps=steps, seed=seed, fresh=fresh, length=7, also=("words.json",))


def checkpoint(folder: Path, schedule: str = '{"steps": 12}') -> None:
    save_file({"a": torch.zeros(1)}, folder / "trainer.safetensors", {"schedule": schedule})


def test_a_new_run_takes_what_is_asked_for_or_its_own(tmp_path: Path) -> None:
    assert begin(tmp_path / "none") == (7, None)
    assert begin(tmp_path / "none", steps=3, seed=5) == (3, 5)


def test_a_run_that_goes_on_keeps_what_was_noted(tmp_path: Path) -> None:
    note_run(tmp_path, steps=40, seed=2)
    assert begin(tmp_path) == (7, None)  # without a checkpoint nothing was begun
    checkpoint(tmp_path)
    assert begin(tmp_path) == (40, 2) == begin(tmp_path, steps=40, seed=2)
    with pytest.raises(InputError) as e:
        begin(tmp_path, seed=3)
    assert str(e.value) == (
        f"the run in {str(tmp_path)!r} has seed 2, not 3; go on without --seed, or begin anew with "
        "--fresh or another --out"
    )


def test_without_a_note_the_checkpoint_tells_the_length(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    assert begin(tmp_path) == (12, None)
    with pytest.raises(InputError, match="has steps 12, not 13; go on without --steps"):
        begin(tmp_path, steps=13)


def test_beginning_anew_removes_the_run_and_leaves_other_files(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    note_run(tmp_path, steps=40, seed=2)
    for name in ("log.jsonl", "words.json", "corpus.gz"):
        (tmp_path / name).write_text("x")
    assert begin(tmp_path, steps=9, fresh=True) == (9, None)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.gz"]


@pytest.mark.parametrize("facts", ["{", "[]", '{"steps": 3}', '{"steps": null, "seed": 1}'])
def test_a_note_that_cannot_be_read(tmp_path: Path, facts: str) -> None:
    checkpoint(tmp_path)
    (tmp_path / "run.json").write_text(facts)
    with pytest.raises(InputError, match=r"cannot be read \(.+\); begin anew with --fresh$"):
        begin(tmp_path)


@pytest.mark.parametrize("schedule", ["{", "{}", "[]"])
def test_a_checkpoint_that_tells_nothing(tmp_path: Path, schedule: str) -> None:
    checkpoint(tmp_path, schedule)
    with pytest.raises(InputError, match=r"cannot be read \(.+\); begin anew with --fresh$"):
        begin(tmp_path)
