"""The conformer that trains fast is the conformer that runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lfm2_audio.config import ConformerConfig
from lfm2_audio.conformer import BatchNorm, Conformer
from lfm2_audio.quick import equal_rows, subsampled


def conformer(factor: int = 8) -> Conformer:
    torch.manual_seed(0)
    config = ConformerConfig(
        n_mels=16,
        hidden_size=16,
        ffn_size=32,
        n_layers=2,
        n_heads=2,
        kernel=5,
        channels=4,
        factor=factor,
    )
    model = Conformer(config).double().eval()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for layer in model.layers:
        nn.init.normal_(layer.self_attn.pos_bias_u)  # type: ignore[union-attr, arg-type]
        nn.init.normal_(layer.self_attn.pos_bias_v)  # type: ignore[union-attr, arg-type]
    return model


@pytest.mark.parametrize("time", [9, 16, 41, 57])
@pytest.mark.parametrize("factor", [4, 8])
def test_rows_are_the_same(time: int, factor: int) -> None:
    model = conformer(factor)
    mel = torch.randn(3, 16, time, dtype=torch.float64)
    wanted = torch.stack(model(list(mel)))
    torch.testing.assert_close(equal_rows(model, mel), wanted, atol=1e-6, rtol=1e-6)


def test_subsampling_alone() -> None:
    model = conformer()
    mel = torch.randn(2, 16, 30, dtype=torch.float64)
    wanted = torch.stack([model.pre_encode(one) for one in mel])
    torch.testing.assert_close(subsampled(model.pre_encode, mel), wanted)


def test_gradients_are_the_same() -> None:
    model = conformer()
    mel = torch.randn(2, 16, 33, dtype=torch.float64)
    weights = torch.randn(2, 5, 16, dtype=torch.float64)
    parameters = list(model.parameters())
    plain = torch.autograd.grad((torch.stack(model(list(mel))) * weights).sum(), parameters)
    quick = torch.autograd.grad((equal_rows(model, mel) * weights).sum(), parameters)
    for wanted, found in zip(plain, quick, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
