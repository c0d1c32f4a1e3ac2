"""A start for vision towers trained from scratch: early attention that begins as a convolution.

A tower with random weights spends thousands of steps before it knows which patches are
neighbours, and shapes cannot be told before. Here positions start as sines and cosines in
dimensions of their own, and each head of the first layers starts as a look at one neighbour:
shifting such a position is a rotation, so the query of a head is the position rotated by its
offset. Everything stays an ordinary SigLIP2 parameter and is trained on. (The idea of starting
attention as convolution: d'Ascoli et al., ConViT, arXiv 2103.10697.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lfm2_vision.encoder import EncoderLayer, Siglip2Tower

__all__ = ["start_local"]

_WAVES = 8  # per axis; 2 axes of sines and cosines fill 32 dimensions
_SHARPNESS = 2.0  # logits of the neighbour looked at over those around it
_LOOKS = (
    ((0, -1), (0, 1), (-1, 0), (1, 0)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((0, -2), (0, 2), (-2, 0), (2, 0)),
)


def _frequencies() -> Tensor:
    return 8.0 ** (-torch.arange(_WAVES) / _WAVES) * 1.2  # radians per patch, 1.2 down to 0.19


def _positions(grid: int, size: int) -> Tensor:
    """`[grid * grid, size]`: waves of the row, waves of the column, then zeros."""
    angles = torch.arange(grid)[:, None] * _frequencies()
    one = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    table = torch.zeros(grid, grid, size)
    table[..., : 2 * _WAVES] = one[:, None]
    table[..., 2 * _WAVES : 4 * _WAVES] = one[None]
    return table.reshape(grid * grid, size)


def _shift(offset: tuple[int, int]) -> Tensor:
    """The rotation `[4w, 4w]` that takes the waves of a place to those of a neighbour."""
    out = torch.zeros(4 * _WAVES, 4 * _WAVES)
    for axis, step in enumerate(offset):
        for i, frequency in enumerate(_frequencies()):
            turn, at = frequency * step, 2 * _WAVES * axis + 2 * i
            out[at, at], out[at, at + 1] = turn.cos(), turn.sin()
            out[at + 1, at], out[at + 1, at + 1] = -turn.sin(), turn.cos()
    return out


@torch.no_grad()
def start_local(tower: Siglip2Tower) -> None:
    """Set positions and the first layers of a tower, in place.

    Raises:
        ValueError: if a head is too narrow to hold the waves.
    """
    config = tower.config
    head, used = config.hidden_size // config.n_heads, 4 * _WAVES
    if head < used:
        raise ValueError(f"heads of {head} dimensions cannot hold {used}; use fewer heads")
    embeddings = tower.embeddings
    embeddings.position_embedding.weight.copy_(_positions(config.grid, config.hidden_size))
    embeddings.patch_embedding.weight[:used] = 0  # these dimensions belong to positions
    gain = (_SHARPNESS * head**0.5) ** 0.5
    for layer, looks in zip(tower.encoder.layers, _LOOKS, strict=False):
        assert isinstance(layer, EncoderLayer)
        attention = layer.self_attn
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        for i in range(config.n_heads):
            rows = slice(i * head, i * head + used)
            attention.q_proj.weight[rows, :used] = gain * _shift(looks[i % len(looks)])
            attention.k_proj.weight[rows, :used] = gain * torch.eye(used)
        attention.out_proj.weight[:used] = 0
        layer.mlp.fc2.weight[:used] = 0
