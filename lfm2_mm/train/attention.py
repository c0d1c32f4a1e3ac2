"""Attention as two matrix products and a softmax, for training on a CPU.

PyTorch's fused CPU kernel is fast forwards and slow backwards: on 32 rows of 256 positions with 4
heads its backward took 50 ms a layer on two cores, this whole function 15 ms (docs/LOG.md). Knows
no mask logic: the caller brings a bias.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["plain_attention"]


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
