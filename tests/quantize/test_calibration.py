"""Error feedback: outputs on what was seen come nearer; a calibrated model is a packed model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lfm2_mm
from lfm2_mm.errors import InputError
from lfm2_mm.kernels.linear import dequantize, quantize
from lfm2_mm.quantize.calibration import calibrate, own_words, pack_model
from lfm2_mm.quantize.feedback import feedback
from lfm2_mm.quantize.layers import Packed, PackedEmbedding, PackedLinear
from lfm2_mm.quantize.recipes import recipe
from tests import oracle

IDS = list(range(40, 80))


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g128", "int8-g32"])
def test_outputs_come_nearer(scheme: str) -> None:
    mix = drawn(0, 128, 128)
    inputs = drawn(1, 400, 128) @ mix  # what they share can be made up for
    weight = drawn(2, 40, 128)
    packed = feedback(weight, scheme, inputs.T @ inputs)  # type: ignore[arg-type]
    plain = quantize(weight, scheme)  # type: ignore[arg-type]

    def miss(found: torch.Tensor) -> float:
        return float((inputs @ (found - weight).T).square().mean())

    assert packed.scheme == scheme
    assert miss(dequantize(packed)) < 0.8 * miss(dequantize(plain))


def test_nothing_seen_is_no_reason_to_fail() -> None:
    weight = drawn(2, 20, 64)
    packed = feedback(weight, "int4-g32", torch.zeros(64, 64))
    assert (dequantize(packed) - weight).abs().max() < 0.5


def test_own_words_repeat_and_begin_alike() -> None:
    model = lfm2_mm.load(oracle.folder("dense"), threads=1)
    texts = own_words(model, sequences=3, tokens=12)
    assert [len(text) for text in texts] == [12, 12, 12]
    assert {text[0] for text in texts} == {model.backbone.config.bos_id}
    assert texts == own_words(model, sequences=3, tokens=12)


@pytest.mark.parametrize("variant", ["dense", "untied", "moe", "vl"])
def test_a_calibrated_model_is_packed_and_saved(variant: str, tmp_path: Path) -> None:
    model = lfm2_mm.load(oracle.folder(variant), dtype="float32", threads=1)
    told: list[str] = []
    pack_model(model, recipe("int4").reporting(told.append), [IDS, IDS[::-1]])
    assert isinstance(model.backbone.embed_tokens, PackedEmbedding)
    assert isinstance(model.backbone.layers[0].conv.in_proj, PackedLinear)
    assert isinstance(model.head.weight, Packed)
    assert len(told) == len(set(told)) > 20
    model.save(tmp_path / "packed")
    again = lfm2_mm.load(tmp_path / "packed", threads=1)
    assert torch.equal(again.logits(IDS), model.logits(IDS))


def test_calibrated_is_nearer_on_what_was_seen() -> None:
    def load() -> lfm2_mm.Model:
        model: lfm2_mm.Model = lfm2_mm.load(oracle.folder("dense"), dtype="float32", threads=1)
        return model

    def distance(model: lfm2_mm.Model) -> float:
        a, b = whole.log_softmax(-1), model.logits(IDS).log_softmax(-1)
        return float((a.exp() * (a - b)).sum(-1).mean())

    whole = load().logits(IDS)
    plain, told = load(), load()
    texts = [IDS, *(torch.tensor(IDS).roll(k).tolist() for k in range(1, 12))]
    pack_model(told, recipe("int4"), texts)
    plain = lfm2_mm.load(oracle.folder("dense"), quantize="int4", threads=1)
    assert distance(told) < distance(plain)


def test_no_text_is_refused() -> None:
    model = lfm2_mm.load(oracle.folder("dense"), threads=1)
    with pytest.raises(InputError) as error:
        calibrate(model.backbone, [[]], recipe("int4").backbone)
    assert str(error.value) == ("there is no text to calibrate with; give a file with some lines")
