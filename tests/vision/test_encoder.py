"""The vision tower against transformers: padded there, packed here, whatever the company."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lfm2_mm.kernels import native
from lfm2_mm.quantize.fitting import fit
from lfm2_mm.quantize.recipes import recipe
from lfm2_mm.train.attention import plain_attention
from lfm2_vision.config import TowerConfig
from lfm2_vision.encoder import SelfAttention, Siglip2Tower
from lfm2_vision.frontend import ImageEncoder
from tests import oracle

SHAPES = [(6, 6), (2, 8), (8, 2), (8, 8), (8, 8), (2, 2), (4, 10)]  # the table is 6 x 6


def tower() -> Siglip2Tower:
    encoder = oracle.shared("vl").encoders["image"]
    assert isinstance(encoder, ImageEncoder)
    return encoder.tower


def patches(shapes: list[tuple[int, int]] = SHAPES) -> Tensor:
    n = sum(rows * columns for rows, columns in shapes)
    return torch.rand(n, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1


def padded(rows: Tensor, shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor, list[int]]:
    sizes = [a * b for a, b in shapes]
    values = torch.zeros(len(shapes), max(sizes) + 5, rows.shape[1])
    mask = torch.zeros(len(shapes), max(sizes) + 5, dtype=torch.int32)
    for i, part in enumerate(torch.split(rows, sizes)):
        values[i, : len(part)], mask[i, : len(part)] = part, 1
    return values, mask, sizes


@torch.no_grad()
def test_packed_equals_padded_and_masked() -> None:
    rows = patches()
    values, mask, sizes = padded(rows, SHAPES)
    theirs = oracle.theirs("vl").model.vision_tower(
        pixel_values=values, pixel_attention_mask=mask, spatial_shapes=torch.tensor(SHAPES)
    )
    wanted = [view[:n] for view, n in zip(theirs.last_hidden_state, sizes, strict=True)]
    mine = tower()(rows, SHAPES)
    torch.testing.assert_close(mine, torch.cat(wanted), atol=oracle.CLOSE, rtol=0)
    assert mine.std() > 0.1


@torch.no_grad()
def test_a_view_is_the_same_alone() -> None:
    rows, sizes = patches(), [a * b for a, b in SHAPES]
    together = torch.split(tower()(rows, SHAPES), sizes)
    for part, shape, wanted in zip(torch.split(rows, sizes), SHAPES, together, strict=True):
        torch.testing.assert_close(tower()(part, [shape]), wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_turning_a_view_around_changes_it() -> None:
    rows = patches([(2, 8)])
    assert (tower()(rows, [(2, 8)]) - tower()(rows, [(8, 2)])).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(6, 6), (3, 12), (1, 1), (9, 4)])
def test_positions_are_stretched_with_antialias(shape: tuple[int, int]) -> None:
    embeddings = tower().embeddings
    table = embeddings.position_embedding.weight.reshape(6, 6, -1).permute(2, 0, 1)[None]
    wanted = F.interpolate(table, size=shape, mode="bilinear", align_corners=False, antialias=True)[
        0
    ]
    torch.testing.assert_close(embeddings.positions(shape), wanted.flatten(1).T)


def test_positions_are_stretched_in_fp32() -> None:
    embeddings = oracle.ours("vl", dtype=torch.bfloat16).encoders["image"].tower.embeddings  # type: ignore[attr-defined]
    exact = embeddings.position_embedding.weight.float().reshape(6, 6, -1).permute(2, 0, 1)[None]
    wanted = F.interpolate(exact, size=(3, 4), mode="bilinear", align_corners=False, antialias=True)
    found = embeddings.positions((3, 4))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted[0].flatten(1).T.bfloat16())


@torch.no_grad()
def test_the_attention_of_training_gives_the_same() -> None:
    made = Siglip2Tower(tower().config)
    made.load_state_dict(tower().state_dict())
    for module in made.modules():
        if isinstance(module, SelfAttention):
            module.attend = plain_attention
    rows = patches()
    torch.testing.assert_close(made(rows, SHAPES), tower()(rows, SHAPES), atol=1e-5, rtol=0)


def test_what_is_read_is_written() -> None:
    config = tower().config
    assert TowerConfig.from_dict({"vision_config": config.to_dict()}) == config
    assert (config.grid, config.patch_dim) == (6, 192)


@torch.inference_mode()
def test_packed_layers_in_one_call_give_what_they_give_one_by_one() -> None:
    config = TowerConfig(hidden_size=64, ffn_size=128, n_layers=3, n_heads=2, patch_size=4, grid=8)
    torch.manual_seed(5)
    whole = Siglip2Tower(config).eval()
    packed = copy.deepcopy(whole)
    schemes = recipe("int8").encoder
    left = fit(packed, packed.state_dict(), schemes, dtype=torch.float32, where="here")
    packed.load_state_dict(left, strict=False)
    plain = copy.deepcopy(packed)
    plain._stacks.append(None)  # nobody looks for the native one any more
    rows, shapes = torch.randn(60, config.patch_dim), [(6, 8), (4, 3)]
    wanted, found = whole(rows, shapes), packed(rows, shapes)
    assert torch.cosine_similarity(found, wanted).min() > 0.99
    assert torch.cosine_similarity(found, plain(rows, shapes)).min() > 0.99
    assert (packed._stacks[0] is not None) == (native.status().path == "amx")
    again = whole(rows, shapes)
    assert torch.equal(again, wanted) and whole._stacks == [None]
