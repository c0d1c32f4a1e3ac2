"""The state of one sequence: keys and values of attention layers, last columns of conv layers.

Keys and values live in a preallocated buffer that is only ever appended to. A snapshot or a fork
shares the buffer and remembers a length; whoever appends behind another's rows first copies the
shared prefix. So a snapshot costs the convolution state only (a few dozen KB), and restoring is
exact at any boundary whatever was generated in between. Keys and values may be kept in int8, each
row of a head with a scale of its own (symmetric, as KIVI's per-token scheme, arXiv 2402.02750,
without its zero point). This module knows no prompt and no layer arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from lfm2_mm.config import BackboneConfig

__all__ = ["KVCacheDtype", "SequenceCache", "Snapshot"]

KVCacheDtype = Literal["auto", "int8"]
"""How keys and values are kept: in the number format of the computation, or in bytes."""

_GROWTH = 256  # rows; capacity is rounded up to a multiple and at least doubled when it grows
_LEAST = 1e-30  # rows whose numbers are all smaller count as zero


@dataclass(slots=True)
class _Buffer:
    """Append-only rows shared by caches and snapshots.

    parts: Keys and values, `[attention layers, g, capacity, e]`; where those are int8, also a
    scale for each row of both, fp32 `[attention layers, g, capacity, 1]`. Rows below `filled` are
    taken: whoever took them writes them once.
    """

    parts: tuple[Tensor, ...]
    filled: int = 0

    @property
    def capacity(self) -> int:
        return int(self.parts[0].shape[2])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A boundary of a sequence to come back to; taken by `SequenceCache.snapshot`.

    Attributes:
        length: Positions before the boundary.
    """

    length: int
    _buffer: _Buffer
    _conv: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that belong to this snapshot alone."""
        return sum(state.nbytes for state in self._conv)

    @property
    def buffer_id(self) -> int:
        """Equal for snapshots that share their rows."""
        return id(self._buffer)

    @property
    def buffer_nbytes(self) -> int:
        """Bytes of the shared rows that the snapshot keeps alive."""
        return sum(part.nbytes for part in self._buffer.parts)


class SequenceCache:
    """KV and convolution state of one sequence, preallocated and growing by doubling.

    Args:
        config: Of the backbone.
        capacity: Positions to make room for at once.
        dtype: Number format of the computation, and of the convolution state.
        device: Where the state lives.
        kv_cache_dtype: "int8" keeps keys and values in bytes with a scale for each row of a head;
            a quarter of fp32's memory, about half of bf16's.

    Example:
        >>> cache = SequenceCache(config)              # doctest: +SKIP
        >>> backbone(x, Ragged([(cache, len(x))]))     # doctest: +SKIP
        >>> boundary = cache.snapshot()                # doctest: +SKIP
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        capacity: int = _GROWTH,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv_cache_dtype: KVCacheDtype = "auto",
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.length = 0
        self._slot = {layer: i for i, layer in enumerate(config.attention_layers)}
        self._conv_slot = {layer: i for i, layer in enumerate(config.conv_layers)}
        shape = (len(self._slot), config.n_kv_heads, _round_up(capacity), config.head_dim)
        kinds = [(shape, dtype)] * 2
        if kv_cache_dtype == "int8":
            kinds = [(shape, torch.int8)] * 2 + [((*shape[:3], 1), torch.float32)] * 2
        self._buffer = _Buffer(tuple(torch.empty(s, dtype=d, device=device) for s, d in kinds))
        start = torch.zeros(config.conv_taps - 1, config.hidden_size, dtype=dtype, device=device)
        self._conv: list[Tensor] = [start for _ in self._conv_slot]
        self._pending: dict[int, Tensor] = {}

    @property
    def capacity(self) -> int:
        """Positions that fit before the buffer grows."""
        return self._buffer.capacity

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._buffer.parts[0].device

    @property
    def kv_cache_dtype(self) -> KVCacheDtype:
        """How keys and values are kept."""
        return "int8" if len(self._buffer.parts) > 2 else "auto"

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Keys and values, `[attention layers, g, capacity, e]`, for kernels that write in place.

        Where those are int8, also the scales of their rows, fp32 `[attention layers, g, capacity,
        1]`. Kernels may write only the rows that `reserve` has made room for.
        """
        return self._buffer.parts

    def reserve(self, n: int) -> None:
        """Make room for `n` more positions, and own the rows they will be written to."""
        needed, buffer = self.length + n, self._buffer
        if needed > buffer.capacity or buffer.filled != self.length:
            self._move(needed)
        self._buffer.filled = needed  # claimed: whoever shares the buffer no longer may

    def _move(self, needed: int) -> None:
        """Continue in a buffer of its own."""
        buffer = self._buffer
        capacity = buffer.capacity
        if needed > capacity:
            capacity = _round_up(max(needed, 2 * capacity))
        grown = []
        for part in buffer.parts:
            grown.append(part.new_empty((*part.shape[:2], capacity, part.shape[3])))
            grown[-1][:, :, : self.length] = part[:, :, : self.length]
        self._buffer = _Buffer(tuple(grown))

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values `[g, n, e]` behind the sequence; all rows so far `[g, t + n, e]`.

        `reserve(n)` must have been called; the rows count only after `advance(n)`. What was kept
        in int8 comes back in the number format of the computation.
        """
        slot, end = self._slot[layer], self.length + keys.shape[1]
        new: tuple[Tensor, ...] = (keys, values)
        if self.kv_cache_dtype == "int8":
            new = tuple(part for pair in zip(*map(_in_bytes, new), strict=True) for part in pair)
        for part, rows in zip(self._buffer.parts, new, strict=True):
            part[slot, :, self.length : end] = rows
        kept = [part[slot, :, :end] for part in self._buffer.parts]
        if len(kept) > 2:
            kept = [(kept[i] * kept[i + 2]).to(self.dtype) for i in (0, 1)]
        return kept[0], kept[1]

    def conv_state(self, layer: int) -> Tensor:
        """The last `k - 1` inputs of a convolution, `[k - 1, d]`, oldest first."""
        return self._conv[self._conv_slot[layer]]

    def set_conv_state(self, layer: int, state: Tensor) -> None:
        """Propose the next state of a convolution; it counts after `advance`."""
        self._pending[self._conv_slot[layer]] = state

    def advance(self, n: int) -> None:
        """Accept `n` positions that every layer has written.

        A step that fails before this call leaves the sequence as it was.
        """
        for slot, state in self._pending.items():
            self._conv[slot] = state
        self._pending.clear()
        self.length += n
        self._buffer.filled = self.length

    def snapshot(self) -> Snapshot:
        """Remember this boundary; copies the small convolution states only."""
        # a state may be a view of a whole step's window, which would stay alive with it
        return Snapshot(self.length, self._buffer, tuple(state.clone() for state in self._conv))

    def boundary(self, length: int, conv: Mapping[int, Tensor]) -> Snapshot:
        """A snapshot of an earlier place of this sequence.

        Args:
            length: Positions before it; at most the sequence's own.
            conv: State of each convolution there, by layer; kept, not copied.
        """
        assert length <= self.length
        return Snapshot(length, self._buffer, tuple(conv[layer] for layer in self._conv_slot))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back (or forward) to a boundary of this model's state."""
        self.length = snapshot.length
        self._buffer = snapshot._buffer
        self._conv = list(snapshot._conv)
        self._pending.clear()

    def fork(self) -> SequenceCache:
        """A second sequence that shares everything so far."""
        twin = object.__new__(SequenceCache)
        twin.config, twin._slot, twin._conv_slot = self.config, self._slot, self._conv_slot
        twin.dtype = self.dtype
        twin._pending = {}
        twin.restore(self.snapshot())
        return twin


def _in_bytes(
    rows: Float[Tensor, "*n e"],
) -> tuple[Int8[Tensor, "*n e"], Float[Tensor, "*n 1"]]:
    """Rows as codes from -127 to 127, and what those are multiplied with.

    The scale of a row with a number that is not finite is NaN, so that its results are.
    """
    x = rows.detach().float()
    most = x.abs().amax(-1, keepdim=True)
    some = most.isfinite() & (most >= _LEAST)
    codes = (x * torch.where(some, 127.0 / most, 0.0)).round()
    scales = torch.where(some, most / 127.0, torch.where(most.isfinite(), 0.0, torch.nan))
    return torch.where(some, codes, 0.0).to(torch.int8), scales


def _round_up(n: int) -> int:
    return -(-max(n, 1) // _GROWTH) * _GROWTH
