"""Several continuations of one prefix, each exactly as if it stood alone.

A picture's positions are many and its questions are short, so a batch holds each prefix once and
its branches after all prefixes, rows behind each other without padding. Branches see their prefix
and themselves, never each other, and count positions from the end of the prefix. Knows no modality
and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.train.attention import FORBIDDEN, plain_attention

__all__ = ["Branched"]


_GROUP = 64  # branches attended to at once, each padded to the longest of them


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring branches that are attended to in one call.

    Attributes:
        rows: Their rows, padded to the longest, `[k, q]`.
        seen: Rows of prefix and branch that each may see, padded, `[k, s]`.
        real: Which of `rows` are no padding, `[k, q]`.
        bias: Scores to add, `[k, 1, q, s]`.
    """

    rows: Tensor
    seen: Tensor
    real: Tensor
    bias: Tensor


class Branched:
    """A `Mixing` for packed rows `[n, d]`: every prefix, then every branch; causal, no cache.

    Args:
        prefixes: Length of each prefix.
        branches: For each branch the number of its prefix and its length; neighbours should be of
            like length, as each group of them is padded to its longest.
        taps: Taps of the short convolutions.

    Attributes:
        positions: Of every row in its sequence, `[n]`.
        branch_starts: First row of each branch.
        sources: For each tap but the last the row that it reads, `[n]`; row `n` is zero.
    """

    def __init__(
        self, prefixes: Sequence[int], branches: Sequence[tuple[int, int]], *, taps: int = 3
    ) -> None:
        starts = list(accumulate(prefixes, initial=0))
        self.branch_starts = list(accumulate((n for _, n in branches), initial=starts[-1]))[:-1]
        runs = [(start, n, range(0)) for start, n in zip(starts, prefixes, strict=False)]
        runs += [
            (start, n, range(starts[p], starts[p + 1]))
            for start, (p, n) in zip(self.branch_starts, branches, strict=True)
        ]
        n = sum(length for _, length, _ in runs)
        positions, sources = [], []
        for start, length, before in runs:
            line = [*([n] * (taps - 1)), *before, *range(start, start + length)]
            line = line[len(before) :]  # row n is the zero before all
            sources.append(torch.tensor([line[j : j + length] for j in range(taps - 1)]))
            positions.append(torch.arange(len(before), len(before) + length))
        self.positions = torch.cat(positions)
        self.sources = list(torch.cat(sources, dim=1).long().unbind())
        self._prefixes: list[tuple[int, int, int, Tensor]] = []
        start = 0
        for length, same in groupby(prefixes):
            count = len(list(same))
            bias = torch.full((length, length), FORBIDDEN).triu(1)[None, None]
            self._prefixes.append((start, count, length, bias))
            start += count * length
        whole = runs[len(prefixes) :]
        self._groups = [_group(whole[i : i + _GROUP]) for i in range(0, len(whole), _GROUP)]

    def convolve(
        self, layer: int, u: Float[Tensor, "n d"], taps: Float[Tensor, "d k"]
    ) -> Float[Tensor, "n d"]:
        """See `lfm2_mm.mixing.Mixing.convolve`."""
        rows = F.pad(u, (0, 0, 0, 1))
        out = u * taps[:, -1]
        for j, source in enumerate(self.sources):
            out = torch.addcmul(out, rows.index_select(0, source), taps[:, j])
        return out

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "n h e"],
        k: Float[Tensor, "n g e"],
        v: Float[Tensor, "n g e"],
    ) -> Float[Tensor, "n h e"]:
        """See `lfm2_mm.mixing.Mixing.attend`."""
        outs = []
        for start, count, time, bias in self._prefixes:
            own = (
                x[start : start + count * time].view(count, time, *x.shape[1:]) for x in (q, k, v)
            )
            out = plain_attention(*(x.transpose(1, 2) for x in own), bias=bias)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        for group in self._groups:
            heads = [
                x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)
                for x, rows in ((q, group.rows), (k, group.seen), (v, group.seen))
            ]
            out = plain_attention(*heads, bias=group.bias).transpose(1, 2)
            outs.append(out.flatten(0, 1)[group.real.flatten()])
        return torch.cat(outs)

    def to(self, device: torch.device | str) -> Branched:
        """Move the tables; returns itself."""
        self.positions = self.positions.to(device)
        self.sources = [source.to(device) for source in self.sources]
        self._prefixes = [(a, n, t, bias.to(device)) for a, n, t, bias in self._prefixes]
        self._groups = [
            _Group(g.rows.to(device), g.seen.to(device), g.real.to(device), g.bias.to(device))
            for g in self._groups
        ]
        return self


def _group(runs: Sequence[tuple[int, int, range]]) -> _Group:
    """Tables of branches, each given by its start, its length and the rows of its prefix."""
    width = max(length for _, length, _ in runs)
    past = max(len(before) for _, _, before in runs)
    rows = torch.zeros(len(runs), width, dtype=torch.long)
    seen = torch.zeros(len(runs), past + width, dtype=torch.long)
    real = torch.zeros(len(runs), width, dtype=torch.bool)
    bias = torch.full((len(runs), 1, width, past + width), FORBIDDEN)
    causal = torch.full((width, width), FORBIDDEN).triu(1)
    bias[:, 0, :, past:] = causal
    for i, (start, length, before) in enumerate(runs):
        rows[i, :length] = torch.arange(start, start + length)
        rows[i, length:] = start
        seen[i, : len(before)] = torch.arange(before.start, before.stop)
        seen[i, past:] = rows[i]
        real[i, :length] = True
        bias[i, 0, :, : len(before)] = 0.0
    return _Group(rows, seen, real, bias)
