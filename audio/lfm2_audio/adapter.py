"""The adapter: rows of the conformer become embeddings of the backbone.

A LayerNorm, then a two-layer MLP with the exact (erf) GELU. Parameter names equal the official
`audio_adapter.`. Knows neither encoder nor backbone.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_mm.fused import linear

__all__ = ["Adapter"]


class Adapter(nn.Module):
    """Encoder width to backbone width; the layers are numbered as stored."""

    def __init__(self, encoder_size: int, backbone_size: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "0": nn.LayerNorm(encoder_size),
                "1": nn.Linear(encoder_size, backbone_size),
                "3": nn.Linear(backbone_size, backbone_size),
            }
        )

    def forward(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        """Apply to every row."""
        norm, first, second = self.model.values()
        return linear(F.gelu(linear(norm(x), first)), second)
