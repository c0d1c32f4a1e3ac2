"""The conformer as it trains fast on a CPU: equal lengths, convolutions as products and sums.

PyTorch's backward of strided and depthwise convolutions is slow there; this computes what
`lfm2_audio.conformer.Conformer` does, for recordings of one length, with the same parameters. Batch
normalisation is what it is at inference: a scale and an offset. Knows no loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_audio.conformer import (
    Conformer,
    ConformerLayer,
    Convolution,
    RelativeAttention,
    relative_positions,
)
from lfm2_audio.subsampling import Subsampling

__all__ = ["equal_rows", "subsampled"]


def equal_rows(conformer: Conformer, mel: Float[Tensor, "b m t"]) -> Float[Tensor, "b n d"]:
    """Rows of recordings of one length, `n = ceil(t / factor)`."""
    x = subsampled(conformer.pre_encode, mel)
    positions = relative_positions(x.shape[1], x.shape[2], x)
    for layer in conformer.layers:
        assert isinstance(layer, ConformerLayer)
        h = layer.norm_feed_forward1(x).flatten(0, 1)
        x = x + 0.5 * layer.feed_forward1(h).view_as(x)
        x = x + _attended(layer.self_attn, layer.norm_self_att(x), positions)
        x = x + _convolved(layer.conv, layer.norm_conv(x))
        h = layer.norm_feed_forward2(x).flatten(0, 1)
        x = x + 0.5 * layer.feed_forward2(h).view_as(x)
        x = layer.norm_out(x)
    return x


def subsampled(layer: Subsampling, mel: Float[Tensor, "b m t"]) -> Float[Tensor, "b n d"]:
    """What `Subsampling` makes of each recording."""
    x = mel.transpose(1, 2)[..., None]  # [b, t, m, c], channels last
    for part in layer.conv:
        if isinstance(part, nn.ReLU):
            x = F.relu(x)
        elif isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1):
            x = F.linear(x, part.weight[:, :, 0, 0], part.bias)
        elif isinstance(part, nn.Conv2d):
            x = _strided(x, part)
    # the official order is channels before mels
    rows: Tensor = layer.out(x.transpose(2, 3).flatten(2))
    return rows


def _strided(x: Float[Tensor, "b t m c"], layer: nn.Conv2d) -> Float[Tensor, "b u k w"]:
    """A 3x3 convolution of stride 2, over one channel or depthwise."""
    time, mels = -(-x.shape[1] // 2), -(-x.shape[2] // 2)
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    places = [
        (slice(None), slice(i, i + 2 * time - 1, 2), slice(j, j + 2 * mels - 1, 2))
        for i in range(3)
        for j in range(3)
    ]
    if layer.groups == 1:
        views = torch.cat([x[place] for place in places], -1)
        return F.linear(views, layer.weight.flatten(1), layer.bias)
    assert layer.bias is not None
    return _summed(x, layer.weight.flatten(1), places) + layer.bias.to(x.dtype)


Places = Sequence[tuple[slice, ...]]


class _Shifted(torch.autograd.Function):
    """Depthwise convolution: a sum of shifted views, each scaled per channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Places) -> Tensor:
        """Sum of `x[place] * row`."""
        ctx.save_for_backward(x, rows)
        ctx.places = places
        out = x[places[0]] * rows[0]
        for place, row in zip(places[1:], rows[1:], strict=True):
            out.addcmul_(x[place], row)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Both gradients, without a buffer for each view."""
        x, rows = ctx.saved_tensors
        (grad,) = grads
        back, flat = torch.zeros_like(x), grad.flatten(0, -2)
        of_rows = torch.empty_like(rows)
        for i, place in enumerate(ctx.places):
            back[place].addcmul_(grad, rows[i])
            of_rows[i] = (x[place].flatten(0, -2) * flat).sum(0)
        return back, of_rows, None


def _summed(
    x: Float[Tensor, "b *n c"], taps: Float[Tensor, "c k"], places: Places
) -> Float[Tensor, "b *u c"]:
    """Sum over `k` of the view at each place times its tap."""
    out: Tensor = _Shifted.apply(  # type: ignore[no-untyped-call]
        x, taps.T.to(x.dtype).contiguous(), places
    )
    return out


def _attended(
    layer: RelativeAttention, x: Float[Tensor, "b t d"], positions: Float[Tensor, "p d"]
) -> Float[Tensor, "b t d"]:
    heads = len(layer.pos_bias_u)
    size, time, width = x.shape
    q, k, v = (
        part(x).view(size, time, heads, -1).transpose(1, 2)
        for part in (layer.linear_q, layer.linear_k, layer.linear_v)
    )
    far = layer.linear_pos(positions).view(len(positions), heads, -1).permute(1, 2, 0)
    by_content = (q + layer.pos_bias_u[:, None].to(q.dtype)) @ k.transpose(-1, -2)
    distances = (q + layer.pos_bias_v[:, None].to(q.dtype)) @ far
    flat = distances.flatten(-2)[..., time - 1 : time * (2 * time - 1) - 1]
    by_distance = flat.view(size, heads, time, 2 * time - 2)[..., :time]
    scores = (by_content + by_distance) / math.sqrt(width // heads)
    out = scores.softmax(-1, dtype=scores.dtype) @ v
    mixed: Tensor = layer.linear_out(out.transpose(1, 2).flatten(2))
    return mixed


def _convolved(layer: Convolution, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    first, second = layer.pointwise_conv1, layer.pointwise_conv2
    x = F.glu(first(x), -1)
    norm = layer.batch_norm
    scale = norm.weight * (norm.running_var + 1e-5).rsqrt()
    offset = norm.bias - norm.running_mean * scale
    taps = layer.depthwise_conv.weight[:, 0] * scale[:, None]
    assert layer.depthwise_conv.bias is not None
    offset = offset + layer.depthwise_conv.bias * scale
    k, time = taps.shape[1], x.shape[1]
    places = [(slice(None), slice(j, j + time)) for j in range(k)]
    out = _summed(F.pad(x, (0, 0, k // 2, k // 2)), taps, places)
    out = F.silu(out + offset.to(x.dtype))
    mixed: Tensor = second(out)
    return mixed
