"""Attention as two matrix products and a softmax, for training on a CPU.

PyTorch's fused CPU kernel is fast forwards and slow backwards: on 32 rows of 256 positions with 4
heads its backward took 50 ms a layer on two cores, this whole function 15 ms (docs/LOG.md). Knows
no mask logic: the caller brings a bias.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lfm2_mm.mixing import Whole

__all__ = ["FORBIDDEN", "PlainWhole", "plain_attention"]

FORBIDDEN = -1e4
"""A score no softmax notices; finite, so that bf16 stays exact."""


def plain_attention(
    q: Float[Tensor, "b h t e"],
    k: Float[Tensor, "b g s e"],
    v: Float[Tensor, "b g s e"],
    *,
    bias: Float[Tensor, "#b 1 t s"] | None = None,
) -> Float[Tensor, "b h t e"]:
    """Scaled dot-product attention, query heads grouped over key/value heads.

    Args:
        q: Queries.
        k: Keys; `h` must be a multiple of `g`.
        v: Values.
        bias: Added to the scores; a large negative number forbids.
    """
    (batch, _, t, e), groups = q.shape, k.shape[1]
    folded = (q * e**-0.5).reshape(batch, groups, -1, e)  # a group's heads: rows of one product
    scores = folded @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores.view(batch, groups, -1, t, k.shape[2]) + bias.to(scores.dtype)[:, :, None]
        scores = scores.view(batch, groups, -1, k.shape[2])
    out: Tensor = (scores.softmax(-1, dtype=scores.dtype) @ v).view(q.shape)
    return out


class PlainWhole(Whole):
    """`Whole` with this attention; arguments as there. Padding behind the ends needs no mask."""

    def __init__(
        self,
        batch: int,
        time: int,
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        causal: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(batch, time, mask=mask, causal=causal, device=device)
        allowed = torch.ones(1, 1, time, time, dtype=torch.bool, device=device)
        if causal:
            allowed = allowed.tril()
        if mask is not None:
            allowed = allowed & mask[:, None, None, :]
        self._scores = torch.where(allowed, 0.0, FORBIDDEN)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "b t h e"],
        k: Float[Tensor, "b t g e"],
        v: Float[Tensor, "b t g e"],
    ) -> Float[Tensor, "b t h e"]:
        """See `lfm2_mm.mixing.Mixing.attend`."""
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return plain_attention(*heads, bias=self._scores).transpose(1, 2)
