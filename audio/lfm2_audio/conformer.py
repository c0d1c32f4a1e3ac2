"""FastConformer encoder over packed recordings: only real frames are ever computed.

Recordings of any lengths stand behind each other as rows `[n, d]`; attention runs per recording
(those of equal length in one call), convolutions over all rows with gaps of zeros between
recordings, everything else over all rows at once. Parameter names equal the official `conformer.`.
Source: Conformer (arXiv 2005.08100), FastConformer (arXiv 2305.05084), relative positions of
Transformer-XL (arXiv 1901.02860, section 3.3). Knows neither waveforms nor the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_audio.config import ConformerConfig
from lfm2_audio.subsampling import Subsampling
from lfm2_mm.fused import linear

__all__ = ["Conformer", "relative_positions"]

_SCORES = 2**24  # numbers of one block of relative scores at most, so that memory stays bounded


def relative_positions(n: int, width: int, like: Tensor) -> Float[Tensor, "p d"]:
    """Sinusoids of the distances `n - 1` down to `-(n - 1)`, sines and cosines in turn.

    Args:
        n: Rows of the longest recording.
        width: An even number of columns.
        like: Gives dtype and device.

    Returns:
        `[2 n - 1, width]`; row `n - 1 - k` belongs to a key `k` rows before the query.
    """
    distance = torch.arange(n - 1, -n, -1, dtype=torch.float32, device=like.device)
    pace = torch.arange(0, width, 2, dtype=torch.float32, device=like.device)
    angle = distance[:, None] * torch.exp(pace * -(math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(like.dtype)


class FeedForward(nn.Module):
    """Two linear layers with SiLU between."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.linear2 = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Apply to every row."""
        return linear(F.silu(linear(x, self.linear1)), self.linear2)


class RelativeAttention(nn.Module):
    """Bidirectional multi-head attention within each recording, by content and distance."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        d, heads = config.hidden_size, config.n_heads
        self.linear_q = nn.Linear(d, d)
        self.linear_k = nn.Linear(d, d)
        self.linear_v = nn.Linear(d, d)
        self.linear_out = nn.Linear(d, d)
        self.linear_pos = nn.Linear(d, d, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, d // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, d // heads))

    def forward(
        self, x: Float[Tensor, "n d"], lengths: Sequence[int], positions: Float[Tensor, "p d"]
    ) -> Float[Tensor, "n d"]:
        """`lengths` are the rows of each recording, in order; `positions` serve the longest."""
        heads = len(self.pos_bias_u)
        q, k, v = (linear(x, part) for part in (self.linear_q, self.linear_k, self.linear_v))
        far = linear(positions, self.linear_pos).view(len(positions), heads, -1).transpose(0, 1)
        outs, start = [], 0
        for length, run in groupby(lengths):
            count = len(list(run))
            end = start + count * length
            mine, keys, values = (
                part[start:end].view(count, length, heads, -1).transpose(1, 2) for part in (q, k, v)
            )
            spare = (far.shape[1] + 1) // 2 - length
            out = self._attend(mine, keys, values, far[:, spare : far.shape[1] - spare])
            outs.append(out.transpose(1, 2).reshape(end - start, -1))
            start = end
        return linear(outs[0] if len(outs) == 1 else torch.cat(outs), self.linear_out)

    def _attend(
        self,
        q: Float[Tensor, "b h t e"],
        k: Float[Tensor, "b h t e"],
        v: Float[Tensor, "b h t e"],
        far: Float[Tensor, "h p e"],
    ) -> Float[Tensor, "b h t e"]:
        """Attention in blocks of queries; `far` are the projected distances, `p = 2 t - 1`."""
        count, heads, length, width = q.shape
        by_content = q + self.pos_bias_u[:, None]
        by_distance = (q + self.pos_bias_v[:, None]) / math.sqrt(width)
        block = max(1, min(length, _SCORES // (count * heads * far.shape[1])))
        outs = []
        for start in range(0, length, block):
            end = min(length, start + block)
            near = far[:, length - end : 2 * length - 1 - start]
            scores = _slide(by_distance[:, :, start:end] @ near.transpose(1, 2), length)
            outs.append(
                F.scaled_dot_product_attention(by_content[:, :, start:end], k, v, attn_mask=scores)
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _slide(scores: Float[Tensor, "b h r p"], length: int) -> Float[Tensor, "b h r t"]:
    """Scores by distance to scores by key: row `i` of `r` begins `r - 1 - i` columns in.

    `p = length + r - 1`. Read in rows of `p - 1` from `r - 1` on, every row begins where it should.
    """
    rows, wide = scores.shape[-2:]
    if rows == 1:
        return scores
    flat = scores.flatten(-2)[..., rows - 1 : rows * wide - 1]
    return flat.reshape(*scores.shape[:-1], wide - 1)[..., :length]


class BatchNorm(nn.Module):
    """Batch normalisation of rows; while training, by the statistics of the real rows alone."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Normalise every column."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )


class Convolution(nn.Module):
    """Gated product, depthwise convolution over time, normalisation, product.

    The products are stored as convolutions of one tap, see `lfm2_audio.checkpoint`.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.pointwise_conv1 = nn.Linear(d, 2 * d)
        self.depthwise_conv = nn.Conv1d(d, d, config.kernel, padding=config.kernel // 2, groups=d)
        self.batch_norm = BatchNorm(d)
        self.pointwise_conv2 = nn.Linear(d, d)

    def forward(self, x: Float[Tensor, "n d"], lengths: Sequence[int]) -> Float[Tensor, "n d"]:
        """`lengths` are the rows of each recording, in order."""
        x = F.glu(linear(x, self.pointwise_conv1), -1)
        x = F.silu(self.batch_norm(self._along_time(x, lengths)))
        return linear(x, self.pointwise_conv2)

    def _along_time(self, x: Float[Tensor, "n d"], lengths: Sequence[int]) -> Float[Tensor, "n d"]:
        if len(lengths) == 1:
            alone: Tensor = self.depthwise_conv(x.T[None])[0].T
            return alone
        gap = self.depthwise_conv.kernel_size[0] // 2
        place = torch.cat([torch.arange(n) for n in lengths])
        offsets = torch.repeat_interleave(
            torch.tensor([0, *lengths[:-1]]).cumsum(0) + gap * torch.arange(len(lengths)),
            torch.tensor(lengths),
        )
        place = (place + offsets).to(x.device)
        spread = x.new_zeros(sum(lengths) + gap * (len(lengths) - 1), x.shape[1])
        spread = spread.index_copy(0, place, x)
        out: Tensor = self.depthwise_conv(spread.T[None])[0].T[place]
        return out


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward; each pre-norm, residual."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.norm_feed_forward1 = nn.LayerNorm(d)
        self.feed_forward1 = FeedForward(config)
        self.norm_self_att = nn.LayerNorm(d)
        self.self_attn = RelativeAttention(config)
        self.norm_conv = nn.LayerNorm(d)
        self.conv = Convolution(config)
        self.norm_feed_forward2 = nn.LayerNorm(d)
        self.feed_forward2 = FeedForward(config)
        self.norm_out = nn.LayerNorm(d)

    def forward(
        self, x: Float[Tensor, "n d"], lengths: Sequence[int], positions: Float[Tensor, "p d"]
    ) -> Float[Tensor, "n d"]:
        """One layer over packed recordings."""
        x = x + 0.5 * self.feed_forward1(self.norm_feed_forward1(x))
        x = x + self.self_attn(self.norm_self_att(x), lengths, positions)
        x = x + self.conv(self.norm_conv(x), lengths)
        x = x + 0.5 * self.feed_forward2(self.norm_feed_forward2(x))
        out: Tensor = self.norm_out(x)
        return out


class Conformer(nn.Module):
    """Mel features of recordings in, packed rows out: one row for every `factor` frames."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.pre_encode = Subsampling(config)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.n_layers))

    def forward(self, mels: Sequence[Float[Tensor, "m _"]]) -> list[Float[Tensor, "_ d"]]:
        """Encode recordings of any lengths.

        Args:
            mels: Features of each recording, of `n_mels` rows and at least one frame.

        Returns:
            `[ceil(t / factor), d]` of each.
        """
        rows = [self.pre_encode(mel) for mel in mels]
        lengths = [len(part) for part in rows]
        x = torch.cat(rows)
        positions = relative_positions(max(lengths), x.shape[1], x)
        for layer in self.layers:
            x = layer(x, lengths, positions)
        return list(torch.split(x, lengths))
