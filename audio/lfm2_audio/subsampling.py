"""Eight mel frames become one row: strided convolutions over time and mels, then one product.

Source: the `dw_striding` subsampling of FastConformer (arXiv 2305.05084). Parameter names equal the
official `conformer.pre_encode`. One recording at a time, long ones in pieces; knows no batch.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_audio.config import ConformerConfig
from lfm2_mm.fused import linear

__all__ = ["Subsampling", "n_rows"]

_ROWS_AT_ONCE = 256  # bounds the memory of a long recording


def n_rows(n_frames: int, factor: int) -> int:
    """Rows that so many mel frames become: `n_frames / factor`, rounded up."""
    return -(-n_frames // factor)


class Subsampling(nn.Module):
    """Mel features of one recording to rows of the encoder's width."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.factor = config.factor
        channels, halvings = config.channels, int(math.log2(config.factor))
        layers: list[nn.Module] = [_strided(1, channels), nn.ReLU()]
        for _ in range(halvings - 1):
            layers += [
                _strided(channels, channels, groups=channels),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(),
            ]
        self.conv = nn.Sequential(*layers)
        self.out = nn.Linear(channels * n_rows(config.n_mels, config.factor), config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the computation."""
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """Where features have to be."""
        return self._first.device

    @property
    def _first(self) -> Tensor:
        weight = self.conv[0].weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, mel: Float[Tensor, "m t"]) -> Float[Tensor, "n d"]:
        """Rows of one recording; `n = ceil(t / factor)`.

        A row sees the `factor - 1` frames on both sides of its first one, so a piece needs the
        frames of one row before it and none behind it.
        """
        x = mel.T[None].to(self.dtype)
        rows = n_rows(x.shape[1], self.factor)
        outs = []
        for start in range(0, rows, _ROWS_AT_ONCE):
            before = min(start, 1)
            end = (start + _ROWS_AT_ONCE) * self.factor
            out = self.conv(x[:, (start - before) * self.factor : end])[:, before:]
            outs.append(linear(out.transpose(0, 1).flatten(1), self.out))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _strided(inward: int, outward: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inward, outward, 3, stride=2, padding=1, groups=groups)
