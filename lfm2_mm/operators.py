"""The parts of a block: RMSNorm, rotary positions, gated short convolution, attention, SwiGLU.

Each works position by position and asks a `Mixing` where it must look along time. Parameter names
equal those of the official checkpoints. Source of the formulas: the LFM2 technical report
(arXiv 2511.23404) and `modeling_lfm2.py` of transformers 5.23. Knows no cache and no weights file.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm2_mm.config import BackboneConfig
from lfm2_mm.fused import linear, rms_norm, swiglu
from lfm2_mm.mixing import Mixing

__all__ = ["Attention", "RMSNorm", "Rotary", "ShortConv", "SwiGLU", "rotate"]


class RMSNorm(nn.Module):
    """`weight * x / rms(x)`, the mean of squares taken in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Normalise the last dimension."""
        return rms_norm(x, self.weight, self.eps)


class Rotary(nn.Module):
    """Cosines and sines of rotary positions, rotate-half form over the whole head."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(
        self, positions: Int[Tensor, "*n"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "*n 1 e"], Float[Tensor, "*n 1 e"]]:
        """Tables for these positions, computed in fp32, one row for all heads."""
        even = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions[..., None].float() * (1.0 / self.theta ** (even / self.head_dim))
        angles = torch.cat([angles, angles], dim=-1)[..., None, :]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "*n h e"], cos: Float[Tensor, "*n 1 e"], sin: Float[Tensor, "*n 1 e"]
) -> Float[Tensor, "*n h e"]:
    """Turn each pair (i, i + e/2) of a head by its angle."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class ShortConv(nn.Module):
    """Gated short convolution: `out(C * conv(B * x))` with `B, C, x = in(h)`."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        d, k, bias = config.hidden_size, config.conv_taps, config.conv_bias
        self.in_proj = nn.Linear(d, 3 * d, bias=bias)
        self.conv = nn.Conv1d(d, d, k, groups=d, bias=bias)  # holds taps and bias, never called
        self.out_proj = nn.Linear(d, d, bias=bias)

    def forward(
        self, x: Float[Tensor, "*n d"], mixing: Mixing, layer: int
    ) -> Float[Tensor, "*n d"]:
        """Mix along time through `mixing.convolve`."""
        b, c, u = linear(x, self.in_proj).chunk(3, dim=-1)
        y = mixing.convolve(layer, b * u, self.conv.weight[:, 0])
        if self.conv.bias is not None:
            y = y + self.conv.bias
        return linear(c * y, self.out_proj)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalised per head before rotation."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        d, e = config.hidden_size, config.head_dim
        self.head_dim = e
        self.q_proj = nn.Linear(d, config.n_heads * e, bias=False)
        self.k_proj = nn.Linear(d, config.n_kv_heads * e, bias=False)
        self.v_proj = nn.Linear(d, config.n_kv_heads * e, bias=False)
        self.out_proj = nn.Linear(config.n_heads * e, d, bias=False)
        self.q_layernorm = RMSNorm(e, config.norm_eps)
        self.k_layernorm = RMSNorm(e, config.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "*n d"],
        mixing: Mixing,
        layer: int,
        rotary: tuple[Float[Tensor, "*n 1 e"], Float[Tensor, "*n 1 e"]],
    ) -> Float[Tensor, "*n d"]:
        """Mix along time through `mixing.attend`."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = rotate(self.q_layernorm(linear(x, self.q_proj).view(heads)), *rotary)
        k = rotate(self.k_layernorm(linear(x, self.k_proj).view(heads)), *rotary)
        v = linear(x, self.v_proj).view(heads)
        return linear(mixing.attend(layer, q, k, v).flatten(-2), self.out_proj)


class SwiGLU(nn.Module):
    """`w2(silu(w1 x) * w3 x)`."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, width, bias=False)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Apply to every position."""
        return linear(swiglu(x, self.w1, self.w3), self.w2)
