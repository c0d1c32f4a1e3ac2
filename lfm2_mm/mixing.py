"""How positions see each other: the one thing that differs between training and generation.

Blocks are written once, position by position; where they must look along time they ask a
`Mixing`. `Whole` serves rectangular batches without a cache (training, scoring); `Packed` serves
complete sequences of any lengths behind each other, without a cache (encoding); `Ragged` serves
packed rows, each run of rows continuing the cache of one sequence. There is no padding in the last
two, so a batch equals each sequence alone. This module knows caches, and nothing of layers or
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lfm2_mm.cache import SequenceCache, Snapshot

__all__ = ["Mixing", "Packed", "Ragged", "Whole", "short_convolution"]


@runtime_checkable
class Mixing(Protocol):
    """What a block asks for. `...` is `b t` in a rectangle and `n` in packed rows."""

    positions: Int[Tensor, "..."]

    def convolve(
        self, layer: int, u: Float[Tensor, "... d"], taps: Float[Tensor, "d k"]
    ) -> Float[Tensor, "... d"]:
        """Depthwise convolution along time."""
        ...

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "... h e"],
        k: Float[Tensor, "... g e"],
        v: Float[Tensor, "... g e"],
    ) -> Float[Tensor, "... h e"]:
        """Scaled dot-product attention, query heads grouped over key/value heads."""
        ...


def short_convolution(
    window: Float[Tensor, "*b s d"], taps: Float[Tensor, "d k"]
) -> Float[Tensor, "*b t d"]:
    """Depthwise convolution as shifted multiply-adds; `t = s - k + 1`, the last tap is now."""
    k = taps.shape[1]
    t = window.shape[-2] - k + 1
    rows = taps.T.contiguous()  # several times faster than columns, which lie k apart
    out = window[..., :t, :] * rows[0]
    for j in range(1, k):
        out = torch.addcmul(out, window[..., j : j + t, :], rows[j])
    return out


class Whole:
    """A rectangular batch `[b, t, d]`, complete, without a cache.

    Args:
        batch: Number of sequences.
        time: Number of positions.
        mask: True at real positions, `[b, t]`; None if all are. Padding may stand on either side;
            its outputs mean nothing.
        causal: False lets attention and convolutions see both sides.
        mask_convs: False keeps masked positions visible to the convolutions (the `keep` rule of
            late-interaction query expansion).
        device: Where positions and masks live.
    """

    def __init__(
        self,
        batch: int,
        time: int,
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        causal: bool = True,
        mask_convs: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.causal = causal
        self._seen = mask[..., None] if mask is not None and mask_convs else None
        self.positions = torch.arange(time, device=device).expand(batch, time)
        self._bias: Tensor | None = None
        if mask is not None:
            self.positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            allowed = mask[:, None, None, :]
            if causal:
                allowed = allowed & torch.ones(time, time, dtype=torch.bool, device=device).tril()
            # a row of padding sees only itself, so that no softmax is over nothing
            self._bias = allowed | torch.eye(time, dtype=torch.bool, device=device)

    def convolve(
        self, layer: int, u: Float[Tensor, "b t d"], taps: Float[Tensor, "d k"]
    ) -> Float[Tensor, "b t d"]:
        """See `Mixing.convolve`; padding counts as zeros."""
        if self._seen is not None:
            u = u * self._seen.to(u.dtype)
        k = taps.shape[1]
        before = k - 1 if self.causal else k // 2
        return short_convolution(F.pad(u, (0, 0, before, k - 1 - before)), taps)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "b t h e"],
        k: Float[Tensor, "b t g e"],
        v: Float[Tensor, "b t g e"],
    ) -> Float[Tensor, "b t h e"]:
        """See `Mixing.attend`."""
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self._bias,
            is_causal=self.causal and self._bias is None,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)


class Packed:
    """Packed rows `[n, d]` of complete sequences, one behind the other, without a cache.

    Neighbours of equal length share one attention call, so hand the sequences in by length.

    Args:
        lengths: Rows of each sequence in turn, each at least 1.
        causal: False lets attention and convolutions see both sides.
        hidden: True at rows that no row may attend to, `[n]`: the expansion of late-interaction
            queries. They attend to the others themselves, also not to each other; the first row
            of a sequence must not be hidden. None if there are none.
        mask_convs: True also takes hidden rows out of the convolutions, and sets the output of a
            convolution there to zero (what transformers 5.23 makes of masked positions); False
            keeps them visible.
        device: Where positions and masks live.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        causal: bool = True,
        hidden: Bool[Tensor, " n"] | None = None,
        mask_convs: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.causal = causal
        self._lengths = tuple(lengths)
        ramp = torch.arange(max(self._lengths, default=0), device=device)
        self.positions = torch.cat([ramp[:t] for t in self._lengths]) if self._lengths else ramp
        self._seen = ~hidden[:, None] if hidden is not None and mask_convs else None
        self._edges: tuple[Tensor, Tensor, Tensor] | None = None
        self._runs: list[tuple[int, int, int, Tensor | None]] = []
        start = 0
        for time, same in groupby(self._lengths):
            count = len(list(same))
            mask = None
            if hidden is not None:
                mask = ~hidden[start : start + count * time].view(count, 1, 1, time)
                if causal:
                    mask = mask & torch.ones(time, time, dtype=torch.bool, device=device).tril()
            self._runs.append((start, count, time, mask))
            start += count * time

    def convolve(
        self, layer: int, u: Float[Tensor, "n d"], taps: Float[Tensor, "d k"]
    ) -> Float[Tensor, "n d"]:
        """See `Mixing.convolve`; what lies beyond the ends of a sequence counts as zeros."""
        n, k = len(u), taps.shape[1]
        before = k - 1 if self.causal else k // 2
        if self._seen is not None:
            u = u * self._seen
        out = u * taps[:, before]
        for j in range(k):  # as if all were one sequence; the rows near ends are put right below
            shift = j - before
            if shift < 0:
                out[-shift:].addcmul_(u[:shift], taps[:, j])
            elif shift > 0:
                out[:-shift].addcmul_(u[shift:], taps[:, j])
        if k > 1 and n:
            rows, sources, real = self._near_ends(k, before, u.device)
            window = u[sources] * real[..., None]
            out[rows] = torch.einsum("mkd,dk->md", window, taps)
        return out if self._seen is None else out * self._seen

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "n h e"],
        k: Float[Tensor, "n g e"],
        v: Float[Tensor, "n g e"],
    ) -> Float[Tensor, "n h e"]:
        """See `Mixing.attend`; no row sees another sequence."""
        outs = []
        for start, count, time, mask in self._runs:
            queries, keys, values = (
                x[start : start + count * time].view(count, time, *x.shape[1:]).transpose(1, 2)
                for x in (q, k, v)
            )
            out = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=self.causal and mask is None,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _near_ends(
        self, k: int, before: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows whose taps reach over an end, the row each tap reads, and whether that is theirs."""
        if self._edges is None:
            rows, sources = [], []
            start = 0
            for time in self._lengths:
                after = k - 1 - before
                ends = {*range(min(before, time)), *range(max(0, time - after), time)}
                for t in sorted(ends):
                    window = range(t - before, t - before + k)
                    rows.append(start + t)
                    sources.append([start + s if 0 <= s < time else -1 for s in window])
                start += time
            table = torch.tensor(sources, device=device)
            self._edges = torch.tensor(rows, device=device), table.clamp(min=0), table >= 0
        return self._edges


class Ragged:
    """Packed rows `[n, d]`: for each sequence in turn, its next rows, continuing its cache.

    Always causal. Call `commit` after the forward; until then the caches count nothing as done.

    Args:
        runs: Per sequence its cache and how many of the rows are its own (at least 1).
        marks: Per sequence the numbers of its rows after which a snapshot is wanted (see
            `boundaries`), each less than the rows it has.
    """

    def __init__(
        self,
        runs: Sequence[tuple[SequenceCache, int]],
        marks: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.runs = tuple(runs)
        wanted = marks if marks is not None else [() for _ in self.runs]
        # per run and mark the state of each convolution there, by layer
        self._marked: list[dict[int, dict[int, Tensor]]] = [{m: {} for m in ms} for ms in wanted]
        self._bounds: list[tuple[int, int]] = []
        start = 0
        for cache, n in self.runs:
            cache.reserve(n)
            self._bounds.append((start, start + n))
            start += n
        self._single = all(n == 1 for _, n in self.runs) and not any(wanted)
        self.positions = torch.cat([torch.arange(c.length, c.length + n) for c, n in self.runs])
        if self.runs:
            self.positions = self.positions.to(self.runs[0][0].device)
        self._masks: dict[int, Tensor] = {}

    @property
    def plain(self) -> bool:
        """Whether all caches are in fp32 or bf16, which is what native calls know."""
        return all(cache.dtype in (torch.float32, torch.bfloat16) for cache, _ in self.runs)

    @property
    def marks(self) -> list[tuple[int, ...]]:
        """Per sequence the numbers of its rows after which a snapshot is wanted."""
        return [tuple(kept) for kept in self._marked]

    def keep(self, states: Sequence[Mapping[int, Mapping[int, Tensor]]]) -> None:
        """Take what `convolve` would have kept: per sequence, mark and layer the state there."""
        for kept, found in zip(self._marked, states, strict=True):
            for mark, layers in found.items():
                kept[mark] |= layers

    def commit(self) -> None:
        """Accept the rows into every cache."""
        for cache, n in self.runs:
            cache.advance(n)

    def boundaries(self, run: int) -> list[Snapshot]:
        """After `commit`: a snapshot at each mark of a run."""
        cache, n = self.runs[run]
        return [
            cache.boundary(cache.length - n + mark, states)
            for mark, states in self._marked[run].items()
        ]

    def convolve(
        self, layer: int, u: Float[Tensor, "n d"], taps: Float[Tensor, "d k"]
    ) -> Float[Tensor, "n d"]:
        """See `Mixing.convolve`; reads and replaces each cache's last columns."""
        if self._single:
            states = [cache.conv_state(layer) for cache, _ in self.runs]
            window = torch.cat([torch.stack(states), u[:, None]], dim=1)
            for (cache, _), rows in zip(self.runs, window[:, 1:].unbind(), strict=True):
                cache.set_conv_state(layer, rows)
            return short_convolution(window, taps)[:, 0]
        pieces, k = [], taps.shape[1]
        for i, ((cache, n), (start, end)) in enumerate(zip(self.runs, self._bounds, strict=True)):
            window = torch.cat([cache.conv_state(layer), u[start:end]])
            cache.set_conv_state(layer, window[n:].clone())
            for mark, kept in self._marked[i].items():
                kept[layer] = window[mark : mark + k - 1].clone()
            pieces.append(short_convolution(window, taps))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "n h e"],
        k: Float[Tensor, "n g e"],
        v: Float[Tensor, "n g e"],
    ) -> Float[Tensor, "n h e"]:
        """See `Mixing.attend`; appends to each cache."""
        outs = []
        for i, ((cache, n), (start, end)) in enumerate(zip(self.runs, self._bounds, strict=True)):
            keys, values = cache.write(
                layer, k[start:end].transpose(0, 1), v[start:end].transpose(0, 1)
            )
            outs.append(self._attend_one(i, q[start:end], keys, values, past=cache.length, n=n))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend_one(
        self, run: int, q: Tensor, keys: Tensor, values: Tensor, *, past: int, n: int
    ) -> Tensor:
        """One sequence: q `[n, h, e]` over keys and values `[g, past + n, e]`."""
        groups, heads = keys.shape[0], q.shape[1]
        if n == 1:  # the heads of a group become the rows of one small matrix product
            grouped = q.view(1, groups, heads // groups, -1)
            out = F.scaled_dot_product_attention(grouped, keys[None], values[None])
            return out.reshape(1, heads, -1)
        mask = None
        if past:
            if run not in self._masks:
                ones = torch.ones(n, past + n, dtype=torch.bool, device=q.device)
                self._masks[run] = ones.tril(past)
            mask = self._masks[run]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=heads != groups,
        )
        return out[0].transpose(0, 1)
