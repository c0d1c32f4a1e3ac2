"""The connector: squares of patches become positions of the backbone.

Pixel-unshuffle, an optional LayerNorm, then a two-layer MLP with the exact (erf) GELU. Parameter
names equal the official `multi_modal_projector`. Source: `modular_lfm2_vl.py` of transformers
5.23. Knows neither tower nor backbone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_vision.config import ConnectorConfig

__all__ = ["Connector", "pixel_unshuffle"]


def pixel_unshuffle(
    x: Float[Tensor, "n c"], shape: tuple[int, int], factor: int
) -> Float[Tensor, "m w"]:
    """Fold squares of `factor` x `factor` patches into the channels.

    Args:
        x: Rows of one view in raster order, `n = rows * columns`.
        shape: Rows and columns of the view; both multiples of `factor`.
        factor: Side of the square.

    Returns:
        `[n / factor^2, c * factor^2]`; within a square the channel order is (row, column, c).
    """
    rows, columns = shape
    x = x.view(rows // factor, factor, columns // factor, factor, -1)
    return x.transpose(1, 2).reshape(rows * columns // factor**2, -1)


class Connector(nn.Module):
    """Rows of the vision tower to embeddings of the backbone."""

    def __init__(self, config: ConnectorConfig, tower_size: int, backbone_size: int) -> None:
        super().__init__()
        self.factor = config.factor
        folded = tower_size * config.factor**2
        self.layer_norm = nn.LayerNorm(folded) if config.layer_norm else None
        self.linear_1 = nn.Linear(folded, config.hidden_size, bias=config.bias)
        self.linear_2 = nn.Linear(config.hidden_size, backbone_size, bias=config.bias)

    def forward(
        self, x: Float[Tensor, "n c"], shapes: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "m d"]:
        """Packed rows of views with these shapes to packed positions, in the same order."""
        sizes = [rows * columns for rows, columns in shapes]
        views = zip(torch.split(x, sizes), shapes, strict=True)
        folded = torch.cat([pixel_unshuffle(view, shape, self.factor) for view, shape in views])
        if self.layer_norm is not None:
            folded = self.layer_norm(folded)
        out: Tensor = self.linear_2(F.gelu(self.linear_1(folded)))
        return out
