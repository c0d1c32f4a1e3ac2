"""How positions see each other: the one thing that differs between training and generation.

Blocks are written once, position by position; where they must look along time they ask a
`Mixing`. `Whole` serves rectangular batches without a cache (training, scoring, encoding);
`Ragged` serves packed rows, each run of rows continuing the cache of one sequence. There is no
padding in a `Ragged` step, so a batch equals each sequence alone. This module knows caches, and
nothing of layers or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lfm2_mm.cache import SequenceCache, Snapshot

__all__ = ["Mixing", "Ragged", "Whole", "short_convolution"]


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
    out = window[..., :t, :] * taps[:, 0]
    for j in range(1, k):
        out = torch.addcmul(out, window[..., j : j + t, :], taps[:, j])
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
        self._single = all(n == 1 for _, n in self.runs)
        self.positions = torch.cat([torch.arange(c.length, c.length + n) for c, n in self.runs])
        if self.runs:
            self.positions = self.positions.to(self.runs[0][0].device)
        self._masks: dict[int, Tensor] = {}

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
