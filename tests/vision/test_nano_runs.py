"""Runs of nano-vl's recipe: one trunk, two branches, their mean; and what resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lfm2_mm.train.runs import CHECKPOINT
from lfm2_vision import nano, nano_recipe
from lfm2_vision.commands import train_nano_vl
from lfm2_vision.nano_recipe import Batches, Recipe
from lfm2_vision.quick import Quick


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of one picture a step, that branch at step 2; nothing is compiled."""
    whole = nano_recipe.recipe

    def recipe(steps: int = 4, seed: int = 3, *, branch: int = 0) -> Recipe:
        plan = whole(steps, seed, branch=branch)
        return replace(plan, stages=(replace(plan.stages[0], until=steps, batch=1),))

    monkeypatch.setattr(nano_recipe, "recipe", recipe)
    monkeypatch.setattr(nano_recipe, "BRANCH_AT", 2)
    monkeypatch.setattr(nano, "BRANCH_AT", 2)
    monkeypatch.setattr(nano_recipe, "STEPS", 4)
    quick = lambda model: Quick(model.vision_tower, model.language_model, compiled=False)  # noqa: E731
    monkeypatch.setattr(nano, "_quicken", quick)


def step_of(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


@pytest.mark.usefixtures("small")
def test_a_run_parts_in_two_and_their_mean_comes_out(tmp_path: Path) -> None:
    said: list[str] = []
    run = {"workers": 0, "say": said.append}
    assert train_nano_vl(tmp_path, until=1, **run) == tmp_path / "model"  # type: ignore[arg-type]
    assert step_of(tmp_path / CHECKPOINT) == 1
    assert not list(tmp_path.glob("branch-*"))
    train_nano_vl(tmp_path, until=3, **run)  # type: ignore[arg-type]
    assert step_of(tmp_path / CHECKPOINT) == 2
    train_nano_vl(tmp_path, **run)  # type: ignore[arg-type]
    assert said.count("resumed at step 3") == 2  # both branches went on

    files = [tmp_path / f"branch-{number}" / CHECKPOINT for number in (1, 2)]
    assert [step_of(file) for file in files] == [4, 4]
    name = "mean.model.multi_modal_projector.linear_2.weight"
    first, second = (load_file(file)[name] for file in files)
    assert not torch.equal(first, second)
    made = load_file(tmp_path / "model" / "model.safetensors")
    mean = ((first + second) / 2).to(torch.bfloat16)
    assert torch.equal(made["model.multi_modal_projector.linear_2.weight"], mean)

    train_nano_vl(tmp_path, steps=2, fresh=True, **run)  # type: ignore[arg-type]
    assert [step_of(file) for file in files] == [2, 2]  # nothing of the old branches is left


@pytest.mark.usefixtures("small")
def test_branches_see_the_same_scenes_before_they_part_and_others_after() -> None:
    tokenizer = nano.tokenizer_files()["tokenizer.json"]
    one, two = (
        Batches(nano_recipe.recipe(branch=number), tokenizer, nano.IMAGES) for number in (1, 2)
    )
    for step in range(4):
        a, b = one[step].patches, two[step].patches
        assert (a.shape == b.shape and torch.equal(a, b)) is (step < 2)
