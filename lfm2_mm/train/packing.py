"""Several continuations of one prefix in one row, each exactly as if it stood alone.

A picture's positions are long and its questions are short, so a training row holds the prefix
once and its branches behind it. Branches see the prefix and themselves, never each other, and
count positions from the end of the prefix. Knows no modality and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.train.attention import plain_attention

__all__ = ["Branched"]


_FORBIDDEN = -1e4  # a score no softmax notices; finite, so that bf16 stays exact


class Branched:
    """A `Mixing` for rows `[prefix | branch | branch | …| padding]`, causal, without a cache.

    Args:
        rows: For each row the length of its prefix and of each of its branches.
        time: Length of every row; the rest is padding.
        taps: Taps of the short convolutions.
    """

    def __init__(
        self, rows: Sequence[tuple[int, Sequence[int]]], time: int, *, taps: int = 3
    ) -> None:
        n = len(rows)
        self.positions = torch.zeros(n, time, dtype=torch.long)
        branch = torch.full((n, time), -1, dtype=torch.long)
        # where the input of each tap but the last comes from; row `time` is the zero before all
        sources = torch.full((n, time, taps - 1), time, dtype=torch.long)
        for i, (prefix, lengths) in enumerate(rows):
            history = [time] * (taps - 1) + list(range(prefix))
            self._place(i, 0, prefix, 0, history, branch, sources)
            start = prefix
            for b, length in enumerate(lengths, 1):
                self._place(i, start, length, b, history, branch, sources)
                start += length
        # [b, 1, t, t]: earlier rows of the prefix or of the same branch, and oneself
        earlier = torch.ones(time, time, dtype=torch.bool).tril()
        related = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        allowed = earlier & related & (branch[:, None, :] >= 0)
        allowed = allowed | torch.eye(time, dtype=torch.bool)
        self._bias = torch.where(allowed, 0.0, _FORBIDDEN)[:, None]
        offsets = torch.arange(n)[:, None] * (time + 1)
        self._sources = [(sources[..., j] + offsets).flatten() for j in range(taps - 1)]

    def _place(
        self,
        row: int,
        start: int,
        length: int,
        branch_id: int,
        history: list[int],
        branch: Tensor,
        sources: Tensor,
    ) -> None:
        """Fill positions, branch ids and tap sources of one run of a row."""
        taps = sources.shape[2] + 1
        own = list(range(start, start + length))
        before = history if branch_id else history[: taps - 1]
        past = len(before) - (taps - 1)
        line = torch.tensor([*before[past:], *own])
        self.positions[row, start : start + length] = torch.arange(length) + past
        branch[row, start : start + length] = branch_id
        for j in range(taps - 1):
            sources[row, start : start + length, j] = line[j : j + length]

    def convolve(
        self, layer: int, u: Float[Tensor, "b t d"], taps: Float[Tensor, "d k"]
    ) -> Float[Tensor, "b t d"]:
        """See `lfm2_mm.mixing.Mixing.convolve`."""
        rows = F.pad(u, (0, 0, 0, 1)).flatten(0, 1)
        out = u * taps[:, -1]
        for j, source in enumerate(self._sources):
            out = out + rows.index_select(0, source).view_as(u) * taps[:, j]
        return out

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "b t h e"],
        k: Float[Tensor, "b t g e"],
        v: Float[Tensor, "b t g e"],
    ) -> Float[Tensor, "b t h e"]:
        """See `lfm2_mm.mixing.Mixing.attend`."""
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out = plain_attention(*heads, bias=self._bias)
        return out.transpose(1, 2)

    def to(self, device: torch.device | str) -> Branched:
        """Move the tables; returns itself."""
        self.positions = self.positions.to(device)
        self._bias = self._bias.to(device)
        self._sources = [source.to(device) for source in self._sources]
        return self
