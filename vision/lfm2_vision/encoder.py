"""SigLIP2 NaFlex vision tower over packed views: only real patches are ever computed.

Views of any size stand behind each other as rows `[n, d]`; attention runs per view (views of
equal size in one call), everything else over all rows at once. Parameter names equal those that
transformers saves under `model.vision_tower`. Source: SigLIP 2 (arXiv 2502.14786) and
`modeling_siglip2.py` of transformers 5.23. Knows no image file, no tiling and no text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_mm.fused import gelu_linear, linear
from lfm2_mm.kernels.encoder import EncoderStack
from lfm2_vision.config import TowerConfig
from lfm2_vision.native import tower_stack

__all__ = ["Siglip2Tower", "ViewShape"]

ViewShape = tuple[int, int]
"""Rows and columns of patches in one view."""


class Embeddings(nn.Module):
    """Patches to rows, plus the learnt square of positions stretched to each view."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)

    def positions(self, shape: ViewShape) -> Float[Tensor, "n d"]:
        """The position table antialiased to a view, interpolated in fp32, in the table's dtype."""
        table = self.position_embedding.weight
        if shape == (self.grid, self.grid):
            return table
        square = table.float().T.reshape(1, -1, self.grid, self.grid)
        stretched = F.interpolate(
            square, size=shape, mode="bilinear", align_corners=False, antialias=True
        )
        rows: Tensor = stretched[0].flatten(1).T.to(table.dtype)
        return rows

    def forward(
        self, patches: Float[Tensor, "n p"], shapes: Sequence[ViewShape]
    ) -> Float[Tensor, "n d"]:
        """Embed packed patches of views with these shapes."""
        tables = {shape: self.positions(shape) for shape in set(shapes)}
        rows: Tensor = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        return rows + torch.cat([tables[shape] for shape in shapes]).to(rows.dtype)


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention within each view.

    `attend` may be replaced, for instance by `lfm2_mm.train.attention.plain_attention`.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.n_heads = config.n_heads
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.q_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)
        self.attend = F.scaled_dot_product_attention

    def forward(self, x: Float[Tensor, "n d"], lengths: Sequence[int]) -> Float[Tensor, "n d"]:
        """`lengths` are the rows of each view, in order."""
        q, k, v = (linear(x, part) for part in (self.q_proj, self.k_proj, self.v_proj))
        return linear(self.mix(q, k, v, lengths), self.out_proj)

    def mix(
        self,
        q: Float[Tensor, "n d"],
        k: Float[Tensor, "n d"],
        v: Float[Tensor, "n d"],
        lengths: Sequence[int],
    ) -> Float[Tensor, "n d"]:
        """Attention proper, between the projections."""
        outs, start = [], 0
        for length, run in groupby(lengths):
            count = len(list(run))
            end = start + count * length
            heads = [
                part[start:end].view(count, length, self.n_heads, -1).transpose(1, 2)
                for part in (q, k, v)
            ]
            out = self.attend(*heads)
            outs.append(out.transpose(1, 2).reshape(end - start, -1))
            start = end
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Apply to every row."""
        return linear(gelu_linear(x, self.fc1), self.fc2)


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Float[Tensor, "n d"], lengths: Sequence[int]) -> Float[Tensor, "n d"]:
        """One layer over packed views."""
        x = x + self.self_attn(self.layer_norm1(x), lengths)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Encoder(nn.Module):
    """The stack; exists so that parameter names equal the official ones."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))


class Siglip2Tower(nn.Module):
    """Packed patches in, one row per patch out, after the final LayerNorm; no pooling head."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self._stacks: list[EncoderStack | None] = []  # the native one, once it was looked for

    def forward(
        self, patches: Float[Tensor, "n p"], shapes: Sequence[ViewShape]
    ) -> Float[Tensor, "n d"]:
        """Encode views that stand behind each other.

        Args:
            patches: Flattened patches, raster order in each view.
            shapes: Rows and columns of patches of each view; their products add up to `n`.
        """
        lengths = [rows * columns for rows, columns in shapes]
        x = self.embeddings(patches, shapes)
        stack = None if torch.is_grad_enabled() else self._native()
        if stack is not None:
            x = stack(x, lengths)
        else:
            for layer in self.encoder.layers:
                x = layer(x, lengths)
        out: Tensor = self.post_layernorm(x)
        return out

    def _native(self) -> EncoderStack | None:
        """One call through all layers, where their weights are packed."""
        if not self._stacks:
            self._stacks.append(tower_stack(self))
        return self._stacks[0]
