"""The state of one sequence: keys and values of attention layers, last columns of conv layers.

Keys and values live in a preallocated buffer that is only ever appended to. A snapshot or a fork
shares the buffer and remembers a length; whoever appends behind another's rows first copies the
shared prefix. So a snapshot costs the convolution state only (a few dozen KB), and restoring is
exact at any boundary whatever was generated in between. This module knows no prompt and no layer
arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lfm2_mm.config import BackboneConfig

__all__ = ["SequenceCache", "Snapshot"]

_GROWTH = 256  # rows; capacity is rounded up to a multiple and at least doubled when it grows


@dataclass(slots=True)
class _Buffer:
    """Append-only rows shared by caches and snapshots.

    keys, values: `[attention layers, g, capacity, e]`; rows below `filled` are taken: whoever took
    them writes them once.
    """

    keys: Tensor
    values: Tensor
    filled: int = 0

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])


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
        return self._buffer.keys.nbytes + self._buffer.values.nbytes


class SequenceCache:
    """KV and convolution state of one sequence, preallocated and growing by doubling.

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
    ) -> None:
        self.config = config
        self.length = 0
        self._slot = {layer: i for i, layer in enumerate(config.attention_layers)}
        self._conv_slot = {layer: i for i, layer in enumerate(config.conv_layers)}
        shape = (len(self._slot), config.n_kv_heads, _round_up(capacity), config.head_dim)
        self._buffer = _Buffer(
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(shape, dtype=dtype, device=device),
        )
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
        return self._buffer.keys.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the state."""
        return self._buffer.keys.dtype

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values, `[attention layers, g, capacity, e]`, for kernels that write in place.

        They may write only the rows that `reserve` has made room for.
        """
        return self._buffer.keys, self._buffer.values

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
        shape = (*buffer.keys.shape[:2], capacity, buffer.keys.shape[3])
        grown = _Buffer(buffer.keys.new_empty(shape), buffer.values.new_empty(shape))
        grown.keys[:, :, : self.length] = buffer.keys[:, :, : self.length]
        grown.values[:, :, : self.length] = buffer.values[:, :, : self.length]
        self._buffer = grown

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values `[g, n, e]` behind the sequence; all rows so far `[g, t + n, e]`.

        `reserve(n)` must have been called; the rows count only after `advance(n)`.
        """
        slot, end = self._slot[layer], self.length + keys.shape[1]
        self._buffer.keys[slot, :, self.length : end] = keys
        self._buffer.values[slot, :, self.length : end] = values
        return self._buffer.keys[slot, :, :end], self._buffer.values[slot, :, :end]

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
        twin._pending = {}
        twin.restore(self.snapshot())
        return twin


def _round_up(n: int) -> int:
    return -(-max(n, 1) // _GROWTH) * _GROWTH
