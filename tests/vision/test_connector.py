"""The connector: the order of folded channels, and transformers' projector on the same rows."""

from __future__ import annotations

import pytest
import torch

from lfm2_mm.errors import CheckpointError
from lfm2_vision.config import ConnectorConfig
from lfm2_vision.connector import Connector, pixel_unshuffle
from lfm2_vision.frontend import ImageEncoder
from tests import oracle


def connector(name: str) -> Connector:
    encoder = oracle.shared(name).encoders["image"]
    assert isinstance(encoder, ImageEncoder)
    return encoder.connector


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_squares_fold_into_channels_row_by_row(factor: int) -> None:
    rows, columns, channels = 2 * factor, 3 * factor, 5
    x = torch.arange(rows * columns * channels).float().reshape(-1, channels)
    grid = x.reshape(rows, columns, channels)
    folded = pixel_unshuffle(x, (rows, columns), factor)
    assert folded.shape == (6, channels * factor**2)
    for r in range(2):
        for q in range(3):
            square = [
                grid[factor * r + j, factor * q + k] for j in range(factor) for k in range(factor)
            ]
            assert torch.equal(folded[3 * r + q], torch.cat(square))


@pytest.mark.parametrize("name", ["vl", "vl_odd"])
@torch.no_grad()
def test_it_equals_the_projector_of_transformers(name: str) -> None:
    made = connector(name)
    assert (made.layer_norm is not None) is (name == "vl_odd")
    shapes = [(2, 6), (4, 4), (8, 2)]
    x = torch.randn(12 + 16 + 16, 32, generator=torch.Generator().manual_seed(0))
    projector = oracle.theirs(name).model.multi_modal_projector
    views = torch.split(x, [12, 16, 16])
    wanted = [
        projector(view.reshape(1, *shape, 32)).flatten(0, 2)
        for view, shape in zip(views, shapes, strict=True)
    ]
    torch.testing.assert_close(made(x, shapes), torch.cat(wanted), atol=1e-5, rtol=0)


def test_the_gelu_is_exact_not_the_tower_s() -> None:
    made = Connector(ConnectorConfig(hidden_size=4, layer_norm=False, factor=1), 4, 4)
    with torch.no_grad():
        for linear in (made.linear_1, made.linear_2):
            linear.weight.copy_(torch.eye(4))
            linear.bias.zero_()
        x = torch.tensor([[-2.0, -0.5, 0.5, 2.0]])
        erf = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        torch.testing.assert_close(made(x, [(1, 1)]), erf, atol=1e-6, rtol=0)


def test_tensors_decide_about_the_layer_norm() -> None:
    said = {"projector_use_layernorm": True, "projector_hidden_size": 9, "projector_bias": False}
    config = ConnectorConfig.from_dict(said, layer_norm=False)
    assert (config.layer_norm, config.hidden_size, config.bias) == (False, 9, False)
    assert ConnectorConfig.from_dict(config.to_dict(), layer_norm=False) == config


def test_another_activation_is_refused() -> None:
    with pytest.raises(CheckpointError, match="activation 'relu'; every LFM2-VL uses 'gelu'"):
        ConnectorConfig.from_dict({"projector_hidden_act": "relu"}, layer_norm=True)
