"""Attention over the last few positions only, as two more kinds of `Mixing`.

`Windowed` serves complete rectangular batches (training, and what tests compare with); `Sliding`
serves the next rows of one sequence, over a state that never grows. Knows no codes and no sound;
the backbone knows nothing of windows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from lfm2_mm.mixing import Whole, short_convolution

__all__ = ["Sliding", "SlidingState", "Windowed"]


class Windowed(Whole):
    """Like `Whole`, always causal: each position sees itself and the `window - 1` before it.

    Args:
        batch: Number of sequences.
        time: Number of positions.
        window: Positions that attention sees, at least 1.
        mask: True at real positions, `[b, t]`; None if all are.
        device: Where positions and masks live.
    """

    def __init__(
        self,
        batch: int,
        time: int,
        window: int,
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(batch, time, mask=mask, device=device)
        if time <= window:
            return
        near = _band(time, 0, window, device)
        self._bias = near if self._bias is None else self._bias & near


class SlidingState:
    """What the next rows of one sequence need: the last keys, values and convolution inputs."""

    def __init__(self) -> None:
        self.length = 0
        self.conv: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}


class Sliding:
    """The next rows `[n, d]` of one sequence.

    Call `commit` after the forward; until then the state is as it was.

    Args:
        state: Where the sequence stands; fresh at its beginning.
        n: Number of rows.
        window: Positions that attention sees, at least 1.
        device: Where positions live.
    """

    def __init__(
        self, state: SlidingState, n: int, window: int, device: torch.device | str = "cpu"
    ) -> None:
        self.state, self.window, self._n = state, window, n
        self.positions = torch.arange(state.length, state.length + n, device=device)
        self._next = SlidingState()
        self._next.length = state.length + n
        self._mask: Tensor | None = None

    def commit(self) -> None:
        """Accept the rows."""
        vars(self.state).update(vars(self._next))

    def convolve(
        self, layer: int, u: Float[Tensor, "n d"], taps: Float[Tensor, "d k"]
    ) -> Float[Tensor, "n d"]:
        """See `lfm2_mm.mixing.Mixing.convolve`; before the beginning lie zeros."""
        past = self.state.conv.get(layer)
        if past is None:
            past = u.new_zeros(taps.shape[1] - 1, u.shape[1])
        rows = torch.cat([past, u])
        self._next.conv[layer] = rows[len(u) :].clone()
        return short_convolution(rows, taps)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "n h e"],
        k: Float[Tensor, "n g e"],
        v: Float[Tensor, "n g e"],
    ) -> Float[Tensor, "n h e"]:
        """See `lfm2_mm.mixing.Mixing.attend`."""
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        if layer in self.state.keys:
            keys = torch.cat([self.state.keys[layer], keys], dim=1)
            values = torch.cat([self.state.values[layer], values], dim=1)
        first = max(keys.shape[1] - (self.window - 1), 0)
        self._next.keys[layer] = keys[:, first:].clone()
        self._next.values[layer] = values[:, first:].clone()
        if self._mask is None:
            self._mask = _band(self._n, keys.shape[1] - self._n, self.window, q.device)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=self._mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)


def _band(n: int, past: int, window: int, device: torch.device | str) -> Tensor:
    """True where a row may look, `[n, past + n]`."""
    ones = torch.ones(n, past + n, dtype=torch.bool, device=device)
    return ones.tril(past).triu(past - window + 1)
