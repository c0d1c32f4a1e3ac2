"""The tool that averages checkpoints."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm2_mm.errors import InputError

TOOL = Path(__file__).parents[2] / "tools" / "average_weights.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = spec_from_file_location("average_weights", TOOL)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checkpoint(folder: Path, value: float, width: int = 3) -> Path:
    (folder / "1_Dense").mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"value": {value}}}')
    for part in (folder, folder / "1_Dense"):
        tensors = {"w": torch.full((2, width), value, dtype=torch.bfloat16)}
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_mean_weighs_a_checkpoint_as_often_as_it_is_named(
    tool: ModuleType, tmp_path: Path
) -> None:
    one, five = checkpoint(tmp_path / "one", 1), checkpoint(tmp_path / "five", 5)
    tool.average([one, five, one, one], tmp_path / "out")
    for part in (tmp_path / "out", tmp_path / "out" / "1_Dense"):
        mean = load_file(part / "model.safetensors")["w"]
        assert mean.dtype == torch.bfloat16
        assert torch.equal(mean, torch.full((2, 3), 2.0, dtype=torch.bfloat16))
    assert (tmp_path / "out" / "config.json").read_text() == '{"value": 1}'


def test_checkpoints_of_two_models_are_refused(tool: ModuleType, tmp_path: Path) -> None:
    one, wide = checkpoint(tmp_path / "one", 1), checkpoint(tmp_path / "wide", 1, width=4)
    with pytest.raises(InputError, match=r"wide/.*' has other tensors than '.*one/"):
        tool.average([one, wide], tmp_path / "out")
    assert not (tmp_path / "out").exists()
