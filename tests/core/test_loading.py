"""From a name to a model: formats, devices, options, and each refusal in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lfm2_mm
from lfm2_mm.errors import (
    CheckpointError,
    CorruptWeights,
    ModelNotFound,
    SettingError,
    TensorMismatch,
    UnsupportedArchitecture,
)
from tests import oracle
from tests.oracle import changed


def test_small_models_are_computed_in_fp32(tmp_path: Path) -> None:
    folder = changed("dense", tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in stored.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    assert lfm2_mm.load(folder, threads=1).dtype == torch.float32
    assert lfm2_mm.load(folder, threads=1, dtype="bfloat16").dtype == torch.bfloat16


def test_large_models_keep_their_format_where_the_cpu_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfm2_mm.loading._SMALL", 10)
    folder = changed("moe", tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    half = {n: t if "expert_bias" in n else t.bfloat16() for n, t in stored.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    for native, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("lfm2_mm.loading._cpu_has", lambda kind, native=native: native)
        assert lfm2_mm.load(folder, threads=1).dtype == wanted
    monkeypatch.undo()
    assert lfm2_mm.load(oracle.folder("moe"), threads=1).dtype == torch.float32


def test_formats_that_nothing_computes_in() -> None:
    says = "the dtype is torch.int8; use one of float32, bfloat16, float16"
    with pytest.raises(SettingError, match=says):
        lfm2_mm.load(oracle.folder("dense"), dtype=torch.int8)
    with pytest.raises(SettingError, match="int3"):
        lfm2_mm.load(oracle.folder("dense"), dtype="int3")


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(SettingError, match="'mps' is not available .* use device 'cpu'"):
        lfm2_mm.load(oracle.folder("dense"), device="mps")


def test_options_nobody_knows() -> None:
    says = "text models have no option 'max_tiles'; the options beyond .* are: none"
    with pytest.raises(SettingError, match=says):
        lfm2_mm.load(oracle.folder("dense"), max_tiles=3)
    says = "no option 'tiles'; .* are: limits, max_image_tokens, max_tiles"
    with pytest.raises(SettingError, match=says):
        lfm2_mm.load(oracle.folder("vl"), tiles=3)


def test_other_architectures(tmp_path: Path) -> None:
    folder = changed("dense", tmp_path / "m", {"model_type": "llama"})
    says = "m has model_type 'llama', which no installed frontend runs; this package runs the LFM2"
    with pytest.raises(UnsupportedArchitecture, match=says):
        lfm2_mm.load(folder)


@pytest.mark.parametrize("name", ["dense", "vl"])
def test_tensors_that_do_not_belong(name: str, tmp_path: Path) -> None:
    extra = {f"adapter.{i}.weight": torch.ones(2) for i in range(5)}
    folder = changed(name, tmp_path / "m", None, **extra)
    says = r"m stores 5 unknown tensors \(adapter.0.weight, adapter.1.weight, adapter.2.weight, …\)"
    with pytest.raises(TensorMismatch, match=says):
        lfm2_mm.load(folder)


def test_tensors_that_lack(tmp_path: Path) -> None:
    folder = changed("dense", tmp_path / "m", None, **{"model.layers.0.conv.conv.weight": None})
    says = r"1 tensor is missing \(layers.0.conv.conv.weight\); use a checkpoint whose weights"
    with pytest.raises(TensorMismatch, match=says):
        lfm2_mm.load(folder)
    folder = changed("untied", tmp_path / "n", None, **{"lm_head.weight": None})
    with pytest.raises(TensorMismatch, match="unties the output head, but no lm_head.weight"):
        lfm2_mm.load(folder)


def test_a_head_of_another_size(tmp_path: Path) -> None:
    folder = changed("untied", tmp_path / "m", None, **{"lm_head.weight": torch.ones(500, 64)})
    says = r"the output head of .*m is \[500, 64\], the config says \[512, 64\]"
    with pytest.raises(TensorMismatch, match=says):
        lfm2_mm.load(folder)


def test_configs_that_belong_to_other_weights(tmp_path: Path) -> None:
    folder = changed("dense", tmp_path / "m", {"num_key_value_heads": 1})
    says = "4 tensors have another shape .*the model needs"
    with pytest.raises(TensorMismatch, match=says):
        lfm2_mm.load(folder)
    folder = changed("dense", tmp_path / "n", {"hidden_size": "x"})
    with pytest.raises(CheckpointError, match="a value of the wrong kind"):
        lfm2_mm.load(folder)


def test_damaged_weights(tmp_path: Path) -> None:
    folder = changed("dense", tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"garbage" * 100)
    with pytest.raises(CorruptWeights, match="cannot be read as safetensors"):
        lfm2_mm.load(folder)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        lfm2_mm.load(tmp_path / "nowhere")


def test_a_head_alone_serves_as_embedding(tmp_path: Path) -> None:
    stored = load_file(oracle.folder("dense") / "model.safetensors")
    swap = {
        "lm_head.weight": stored["model.embed_tokens.weight"],
        "model.embed_tokens.weight": None,
    }
    model = lfm2_mm.load(changed("dense", tmp_path / "m", None, **swap), threads=1)
    ids = oracle.ids(7)
    assert torch.equal(model.logits(ids), oracle.shared("dense").logits(ids))


def test_weights_are_frozen_and_in_evaluation_mode() -> None:
    backbone = oracle.shared("moe").backbone
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
