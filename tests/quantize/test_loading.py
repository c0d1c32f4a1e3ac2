"""Loading packed: near the numbers, saved and loaded bit for bit, and errors in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lfm2_mm
from lfm2_mm.chat import Prompt
from lfm2_mm.errors import CheckpointError, CorruptWeights, SettingError, TensorMismatch
from lfm2_mm.kernels.linear import dequantize, fits
from lfm2_mm.quantize.fitting import scheme_for
from lfm2_mm.quantize.layers import Packed, PackedEmbedding, PackedLinear
from lfm2_mm.quantize.recipes import RECIPES, recipe
from lfm2_vision.demo import examples
from tests import oracle

IDS = list(range(40, 80))
VARIANTS = ("dense", "untied", "odd", "moe", "vl")


def loaded(name: str, **options: Any) -> Any:
    return lfm2_mm.load(oracle.folder(name), dtype="float32", threads=1, **options)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean divergence of next-token chances, in nats."""
    a, b = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("name", VARIANTS)
def test_eight_bits_stay_near_the_numbers(name: str) -> None:
    whole = loaded(name).logits(IDS)
    packed = loaded(name, quantize="int8").logits(IDS)
    assert 0 < distance(packed, whole) < (0.05 if name == "moe" else 0.01)


def test_four_bits_are_as_near_as_the_codes_say() -> None:
    """Random weights bear no 4 bits; a model with the rounded numbers is the one to compare."""
    model = loaded("dense", quantize="int4")
    twin = loaded("dense")
    state = {}
    for name, part in model.backbone.named_modules():
        if isinstance(part, Packed):
            state[name] = dequantize(part.packed)
    assert len(state) > 20
    for name, value in state.items():
        twin.backbone.get_parameter(name).data = value
    twin.head.weight = twin.backbone.embed_tokens.weight
    found, wanted = model.logits(IDS), twin.logits(IDS)
    assert distance(found, wanted) < 0.01
    assert nn.functional.cosine_similarity(found, wanted).min() > 0.99


def test_what_is_packed_and_what_is_not() -> None:
    model = loaded("moe", quantize="int4")
    kinds = {name: part for name, part in model.backbone.named_modules()}
    assert isinstance(kinds["embed_tokens"], PackedEmbedding)
    assert kinds["embed_tokens"].weight.scheme == "int8-g32"
    assert model.head.weight is kinds["embed_tokens"].weight
    assert kinds["layers.0.conv.in_proj"].weight.scheme == "int4-g32"
    assert kinds["layers.3.feed_forward.experts.0.w1"].weight.scheme == "int4-g32"
    assert type(kinds["layers.3.feed_forward.gate"]) is nn.Linear
    assert type(kinds["layers.0.conv.conv"]) is nn.Conv1d
    untied = loaded("untied", quantize="int4")
    assert isinstance(untied.head.weight, Packed) and untied.head.weight.scheme == "int8-g32"
    for part in loaded("vl", quantize="int4").parts.values():
        schemes = {one.scheme for one in part.modules() if isinstance(one, Packed)}
        assert schemes and schemes <= {"int8-g32", "int8"}


def test_only_chosen_experts_are_laid_out() -> None:
    model = loaded("moe", quantize="int8")
    model.logits([40])
    layer = model.backbone.layers[3].feed_forward
    used = [expert for expert in layer.experts if expert.w1.weight._ready is not None]
    assert len(used) == layer.top_k < len(layer.experts)


@pytest.mark.parametrize("quantize", ["int4", "int8"])
@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_bit_for_bit(name: str, quantize: str, tmp_path: Path) -> None:
    model = loaded(name, quantize=quantize)
    before = model.logits(IDS)
    model.save(tmp_path / "packed")
    again = lfm2_mm.load(tmp_path / "packed", threads=1)
    assert again.dtype == torch.float32
    assert torch.equal(again.logits(IDS), before)
    config = json.loads((tmp_path / "packed" / "config.json").read_text("utf-8"))
    wanted = {"quant_method": "lfm2_mm", "version": 1, "recipe": quantize}
    assert config["quantization_config"] == wanted
    again.save(tmp_path / "twice")
    first, second = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "twice")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_answers_are_the_same_through_cache_and_batch() -> None:
    model = loaded("dense", quantize="int8")
    texts = [model.generate(Prompt.from_ids(IDS[:n]), max_tokens=8, reuse=False) for n in (5, 9)]
    together = [str(text.answer) for text in texts]
    alone = [
        str(model.generate(Prompt.from_ids(IDS[:n]), max_tokens=8, reuse=False).answer)
        for n in (5, 9)
    ]
    assert together == alone


def test_the_setting_packs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM2_MM_QUANTIZE", "int8")
    model = lfm2_mm.load(oracle.folder("dense"), threads=1)
    assert isinstance(model.backbone.layers[0].conv.in_proj, PackedLinear)
    assert model.dtype == torch.float32


def test_answers_are_the_same_over_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """nano-vl's greedy answers, its weights whole and packed, natively and by torch."""
    asked = list(examples())[::4][:3]

    def answers(**options: Any) -> list[str]:
        model = lfm2_mm.load("nano-vl", threads=1, **options)
        assert model.engine.kv_cache_dtype == options.get("kv_cache_dtype", "auto")
        return [str(model.ask(question, images=[path])) for path, question, _ in asked]

    wanted = answers()
    assert answers(kv_cache_dtype="int8") == wanted
    assert answers(kv_cache_dtype="int8", quantize="int8") == wanted
    monkeypatch.setenv("LFM2_MM_NATIVE", "0")
    assert answers(kv_cache_dtype="int8", quantize="int8") == wanted


def test_the_setting_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded("dense").engine.kv_cache_dtype == "auto"
    says = r"kv_cache_dtype is 'int2' \(from flag --kv-cache-dtype\): it must be one of auto, int8"
    with pytest.raises(SettingError, match=says):
        loaded("dense", kv_cache_dtype="int2")
    monkeypatch.setenv("LFM2_MM_KV_CACHE_DTYPE", "int8")
    assert loaded("dense").engine.kv_cache_dtype == "int8"
    assert not hasattr(lfm2_mm.load("nano-colbert", threads=1), "engine")  # keeps none


def test_bf16_goes_through() -> None:
    whole = loaded("dense").logits(IDS)
    packed = lfm2_mm.load(oracle.folder("dense"), dtype="bfloat16", quantize="int8", threads=1)
    assert packed.dtype == torch.bfloat16
    assert distance(packed.logits(IDS), whole) < 0.02


def test_retrievers_are_packed_too() -> None:
    texts = ["Open file", "Delete the file", "Größe ändern"]
    whole = lfm2_mm.load("nano-colbert", threads=1)
    packed = lfm2_mm.load("nano-colbert", quantize="int8", threads=1)
    pairs = zip(whole.encode_documents(texts), packed.encode_documents(texts), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        assert (a * b).sum(-1).min() > 0.99


def test_progress_names_every_weight() -> None:
    names: list[str] = []
    model = loaded("dense", quantize="int8", progress=names.append)
    count = sum(isinstance(part, Packed) for part in model.backbone.modules())
    assert len(names) == count == len(set(names))


def test_widths_that_fit_no_group_get_another_scheme() -> None:
    assert scheme_for((8, 64), "int4-g32") == "int4-g32"
    assert scheme_for((8, 64), "int4-g128") == "int4-g32"
    assert scheme_for((8, 24), "int4-g32") == "int8"
    assert scheme_for((8, 32), "int8-g32") == "int8"
    assert fits("int8", 8, 24)


def test_recipes_by_name() -> None:
    assert recipe("int4") is RECIPES["int4"]
    with pytest.raises(SettingError) as error:
        recipe("int3")
    assert str(error.value) == "quantize is 'int3'; use one of int4, int8, or none"
    with pytest.raises(SettingError, match="quantize is 'int3' .*must be one of none, int4, int8"):
        loaded("dense", quantize="int3")


@pytest.fixture
def packed_folder(tmp_path: Path) -> Path:
    loaded("dense", quantize="int8").save(tmp_path / "packed")
    return tmp_path / "packed"


def edit(folder: Path, **entry: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["quantization_config"] |= entry
    path.write_text(json.dumps(config), "utf-8")


def test_another_version_is_refused(packed_folder: Path) -> None:
    edit(packed_folder, version=9)
    with pytest.raises(CheckpointError) as error:
        lfm2_mm.load(packed_folder)
    assert str(error.value) == (
        f"{packed_folder} is packed in format version 9, but this release reads version 1; pack "
        "the original anew with `lfm2-mm quantize`"
    )


def test_an_entry_of_another_kind_is_refused(packed_folder: Path) -> None:
    path = packed_folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"quantization_config": "int4"}
    path.write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match="are quantised by 'int4', which is not read here"):
        lfm2_mm.load(packed_folder)


def test_another_library_is_refused(packed_folder: Path) -> None:
    edit(packed_folder, quant_method="gptq")
    with pytest.raises(CheckpointError) as error:
        lfm2_mm.load(packed_folder)
    assert str(error.value) == (
        f"the weights of {packed_folder} are quantised by 'gptq', which is not read here; use the "
        "checkpoint they were made of and quantize='int4' or 'int8'"
    )


def test_packed_is_not_packed_otherwise(packed_folder: Path) -> None:
    assert lfm2_mm.load(packed_folder, quantize="int8", threads=1).logits([1]).isfinite().all()
    with pytest.raises(SettingError) as error:
        lfm2_mm.load(packed_folder, quantize="int4")
    assert str(error.value) == (
        f"{packed_folder} is packed as int8 already, so it cannot be packed as int4; use the "
        "checkpoint it was made of"
    )


def test_a_truncated_file_is_refused(packed_folder: Path) -> None:
    path = packed_folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptWeights, match="cannot be read as safetensors .*download it again"):
        lfm2_mm.load(packed_folder)


@pytest.mark.parametrize("part", ["scales", "codes"])
def test_a_missing_part_is_named(packed_folder: Path, part: str) -> None:
    path = packed_folder / "model.safetensors"
    state = load_file(path)
    name = "model.layers.0.conv.in_proj.weight"
    left = {key: value.clone() for key, value in state.items() if key != f"{name}.{part}"}
    save_file(left, path, {"format": "pt"})
    with pytest.raises(TensorMismatch) as error:
        lfm2_mm.load(packed_folder)
    text = str(error.value)
    assert text.startswith(
        f"the packed weight layers.0.conv.in_proj.weight of {packed_folder} cannot be used ("
    )
    assert text.endswith("; pack the model anew with `lfm2-mm quantize`")


def test_parts_of_another_shape_are_refused(packed_folder: Path) -> None:
    path = packed_folder / "model.safetensors"
    whole = {key: value.clone() for key, value in load_file(path).items()}
    codes, scales = (f"model.layers.0.conv.in_proj.weight.{part}" for part in ("codes", "scales"))
    for name, value in (
        (codes, whole[codes][:-1]),
        (codes, whole[codes].flatten()),
        (scales, whole[scales][0, 0]),
        (scales, whole[scales][:, :0]),
    ):
        save_file(whole | {name: value.clone()}, path, {"format": "pt"})
        with pytest.raises(TensorMismatch, match="cannot be used"):
            lfm2_mm.load(packed_folder)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfm2_mm.loading, "_device", lambda name: torch.device("cuda"))
    with pytest.raises(SettingError) as error:
        lfm2_mm.load(oracle.folder("dense"), quantize="int8")
    assert str(error.value) == (
        "packed weights are for the CPU, but the device is cuda; use device 'cpu', or load the "
        "model as it is"
    )


def test_without_the_library_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    native = loaded("dense", quantize="int4").logits(IDS[:6])
    monkeypatch.setenv("LFM2_MM_NATIVE", "0")
    twin = loaded("dense", quantize="int4")
    found = twin.logits(IDS[:6])
    assert twin.backbone.layers[0].conv.in_proj.weight.ready.native is False
    assert torch.allclose(found, native, atol=2e-3, rtol=1e-3)


def test_an_index_of_the_pages_is_released_and_comes_back(packed_folder: Path) -> None:
    """The file may be removed once a model was used: what it needs is in memory then."""
    model = lfm2_mm.load(packed_folder, threads=1)
    wanted = model.logits(IDS)
    shutil.rmtree(packed_folder)
    assert torch.equal(model.logits(IDS), wanted)
