"""Choosing the codes and scales of a quantised weight, so that little is lost.

The error that is minimised is the squared one, weighed by how large the inputs of each column are.
Scales start from the extremes of each group and are then fitted by least squares to the codes, in
turn with the codes (Lloyd's iteration). Where no inputs are known, 4 bits without minimums count
the error of large weights more, and as a fit is shorter than the weight, everywhere and so in every
layer, it is stretched to the weight's length along it at last: both bring a model nearer to its
fp32 (docs/LOG.md). Knows neither products nor files.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.errors import InputError
from lfm2_mm.kernels.packed import Format, PackedWeight, Scheme, check_shape, pack_codes

__all__ = ["quantize"]

_CHUNK = 2**18  # numbers that are looked at together, so that they stay in the cache
_STARTS = (-1 / 8, -0.9 / 8, -0.8 / 8, 1 / 7, 0.9 / 7, 0.8 / 7)  # scale by extreme, symmetric 4 bit
_SHRINK = (1.0, 0.85)  # of the range, 4 bit with minimum
_TURNS = 2
_SMALLEST = 2.0**-24  # of fp16


def quantize(
    weight: Float[Tensor, "w c"],
    scheme: Scheme,
    importance: Float[Tensor, " c"] | None = None,
    *,
    minimum: bool = False,
) -> PackedWeight:
    """Round a weight to a scheme.

    Args:
        weight: Of any floating dtype.
        scheme: See `lfm2_mm.kernels.packed.SCHEMES`.
        importance: How much the error of each column counts, such as the mean square of its
            inputs; all alike if None.
        minimum: Give each group a minimum of its own (schemes of 4 bits only).

    Raises:
        InputError: the scheme does not fit the weight, the weight holds a number that is not
            finite or too large for fp16 scales, or the importance is negative or not finite.
    """
    form = check_shape(scheme, *weight.shape)
    if minimum and form.bits != 4:
        raise InputError(f"{scheme} has no minimums; ask for them with a scheme of 4 bits")
    rows, cols = weight.shape
    share = _share(importance, cols, form)
    codes = torch.empty(rows, cols * form.bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, form.groups(cols), dtype=torch.float16)
    minimums = torch.empty_like(scales)
    step = max(1, _CHUNK // cols)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        groups = weight[part].detach().float().view(-1, form.groups(cols), form.group or cols)
        if form.bits == 8:
            found, scales[part] = _eight(groups)
        elif minimum:
            found, scales[part], minimums[part] = _four_with_minimum(groups, share)
        else:
            found, scales[part] = _four(groups, None if importance is None else share)
        flat = found.to(torch.uint8).view(len(groups), cols)
        codes[part] = pack_codes(flat) if form.bits == 4 else flat
    buffers = {"codes": codes, "scales": scales} | ({"minimums": minimums} if minimum else {})
    if not all(buffers[name].isfinite().all() for name in buffers if name != "codes"):
        raise InputError(
            f"the weight cannot be {scheme}: it holds numbers that are not finite or too large "
            f"for scales in fp16 (largest magnitude {weight.abs().max().item():g}); "
            "check the checkpoint"
        )
    return PackedWeight(scheme, rows, cols, buffers)


def _share(importance: Tensor | None, cols: int, form: Format) -> Tensor:
    """How much each column counts, `[1, groups, group]`."""
    if importance is None:
        return torch.ones(1, 1, 1)
    share = importance.detach().float()
    if not (share.isfinite() & (share >= 0)).all():
        raise InputError(
            "the importance of columns holds negative numbers or such that are not finite; "
            "hand in mean squares of the inputs"
        )
    # no column is worthless: where nothing was seen, its error still counts a little
    share = share / share.mean().clamp(min=_SMALLEST) + 1e-3
    return share.view(1, form.groups(cols), -1)


def _half(scale: Tensor) -> tuple[Tensor, Tensor]:
    """A scale as it is stored, `[w, g]` fp16, and what to multiply with, `[w, g, 1]` fp32.

    A NaN stays one; a scale that fp16 rounds to zero gives codes for zero.
    """
    stored = scale.squeeze(-1).half()
    wide = stored.float()[..., None]
    return stored, torch.where(wide == 0, 0.0, 1.0 / wide)


def _eight(w: Tensor) -> tuple[Tensor, Tensor]:
    scales, inverse = _half(w.abs().amax(-1, keepdim=True) / 127)
    return (w * inverse).round().clamp(-127, 127) + 128, scales


def _four(w: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
    """Symmetric, codes -8 to 7: of several starts the best after fitting.

    Where it is not known how much the errors count, the rounded group's projection on the group is
    the group itself.
    """
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    square = torch.where(extreme == 0, 0.0, w / extreme).square()
    share = square + square.mean(-1, keepdim=True) if known is None else known
    weighed = w * share
    best = torch.zeros_like(extreme)
    gain = torch.full_like(extreme, -1.0)  # what of the weight's own square is explained
    for start in _STARTS:
        inverse = torch.where(extreme == 0, 0.0, 1.0 / (extreme * start))
        codes = (w * inverse).round_().clamp_(-8, 7)
        along = (weighed * codes).sum(-1, keepdim=True)
        own = (codes.square() * share).sum(-1, keepdim=True)
        explained = torch.where(own > 0, along.square() / own, 0.0)
        best = torch.where(explained > gain, torch.where(own > 0, along / own, 0.0), best)
        gain = torch.maximum(gain, explained)
    best = torch.where(extreme.isfinite(), best, extreme)
    scales, inverse = _half(best)
    codes = (w * inverse).round_().clamp_(-8, 7)
    if known is None:
        along = (w * codes).sum(-1, keepdim=True)
        long = w.square().sum(-1, keepdim=True)
        scales, _ = _half(torch.where(along == 0, best, long / along))
    return codes + 8, scales


def _four_with_minimum(w: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 above a minimum; the range is shrunk a little or not, then both are fitted."""
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    total = share.expand_as(w).sum(-1, keepdim=True)
    mean = (w * share).sum(-1, keepdim=True) / total
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_low = torch.zeros_like(low), low
    for shrink in _SHRINK:
        middle = (low + high) / 2
        scale, offset = (high - low) * shrink / 15, middle - (high - low) * shrink / 2
        for _ in range(_TURNS):
            codes = _above(w, scale, offset)
            centre = (codes * share).sum(-1, keepdim=True) / total
            away = codes - centre
            square = (away.square() * share).sum(-1, keepdim=True)
            fitted = (w * away * share).sum(-1, keepdim=True) / square
            scale = torch.where(square > 0, fitted, scale)
            offset = mean - scale * centre
            error = ((codes * scale + offset - w).square() * share).sum(-1, keepdim=True)
            better = error < best_error
            best_scale = torch.where(better, scale, best_scale)
            best_low = torch.where(better, offset, best_low)
            best_error = torch.minimum(error, best_error)
    best_low = torch.where(best_error.isfinite(), best_low, torch.nan)
    scales, minimums = best_scale.squeeze(-1).half(), best_low.squeeze(-1).half()
    codes = _above(w, scales.float()[..., None], minimums.float()[..., None])
    return codes, scales, minimums


def _above(w: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    codes = torch.where(scale == 0, 0.0, (w - offset) / scale)
    return codes.round_().clamp_(0, 15)
