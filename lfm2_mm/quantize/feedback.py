"""Rounding with error feedback: later columns make up for the errors of earlier ones.

What a layer's inputs look like decides what counts, so some inputs must have been seen. Source:
GPTQ, Frantar et al., arXiv 2210.17323. Knows matrices only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.kernels.linear import SCHEMES, PackedWeight, Scheme, dequantize, quantize
from lfm2_mm.kernels.packed import pack_codes

__all__ = ["feedback"]


def feedback(
    weight: Float[Tensor, "w c"],
    scheme: Scheme,
    products: Float[Tensor, "c c"],
    *,
    damping: float = 0.1,
) -> PackedWeight:
    """Round a weight group by group, each with the scale that `quantize` finds for what is left.

    Args:
        weight: Of any floating dtype.
        scheme: Must fit the shape, with groups.
        products: Sum of `x x^T` over inputs `x` of the layer.
        damping: Share of the mean of the diagonal that is added to it; the more, the less is made
            up for.

    Raises:
        InputError: if the scheme does not fit.
    """
    form = SCHEMES[scheme]
    rows, cols = weight.shape
    group = form.group or cols
    x = weight.detach().float().clone()
    h = products.double()
    mean = float(h.diagonal().mean())
    h = h + torch.eye(cols, dtype=h.dtype) * (damping * mean if mean > 0 else 1.0)
    importance = h.diagonal().float()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    low, high = -form.zero, 2**form.bits - 1 - form.zero
    codes, scales = torch.empty_like(x), []
    for start in range(0, cols, group):
        part = slice(start, start + group)
        block = x[:, part].contiguous()
        scale = quantize(block, scheme, importance[part]).buffers["scales"]
        scales.append(scale)
        wide = scale.float()
        inverse_scale = torch.where(wide == 0, 0.0, 1.0 / wide)
        errors = torch.empty(rows, group)
        for j in range(group):
            column = block[:, j : j + 1]
            code = (column * inverse_scale).round().clamp(low, high)
            codes[:, start + j] = code[:, 0]
            error = (column - code * wide) / upper[start + j, start + j]
            block -= error * upper[start + j, part]
            errors[:, j] = error[:, 0]
        x[:, start + group :] -= errors @ upper[part, start + group :]
    whole = (codes + form.zero).to(torch.uint8)
    packed = PackedWeight(
        scheme,
        rows,
        cols,
        {
            "codes": pack_codes(whole) if form.bits == 4 else whole,
            "scales": torch.cat(scales, dim=1),
        },
    )
    plain = quantize(weight, scheme, importance)
    return min(packed, plain, key=lambda one: _miss(weight, one, products))


def _miss(weight: Tensor, packed: PackedWeight, products: Tensor) -> float:
    """Mean square of what the outputs change, on the inputs that were seen."""
    change = dequantize(packed) - weight.float()
    return float(((change @ products.float()) * change).sum())
