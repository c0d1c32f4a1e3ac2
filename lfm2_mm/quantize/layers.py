"""Modules whose weights are packed: they stand where a linear layer or an embedding stood.

State names stay what they were: beside `…in_proj.bias` there are `…in_proj.weight.codes` and so
on. Whoever calls a layer, or `lfm2_mm.fused.linear` with it, notices nothing; only code that reads
`.weight` as a matrix would. Knows the kernels' face and nothing of schemes or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm2_mm.kernels.linear import (
    SCHEMES,
    PackedWeight,
    Ready,
    dequantize,
    matmul,
    prepare,
)
from lfm2_mm.pages import CleanPages

__all__ = ["Packed", "PackedEmbedding", "PackedLinear", "restore"]


class Packed(nn.Module):
    """A packed matrix `[w, c]` that multiplies rows from the right: `x @ weight.T`.

    It holds the portable layout, as in files, until the first rows come; then what this processor
    wants is made of it and takes its place. So a matrix that is never used costs nothing: an
    expert that is never chosen stays on disk.

    Args:
        packed: The portable layout.
        pages: Mapped files; buffers that lie there leave memory when they were laid out.
        dtype: Number format of what is computed with it.
    """

    def __init__(
        self,
        packed: PackedWeight,
        pages: CleanPages | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.scheme, self.rows, self.cols = packed.scheme, packed.rows, packed.cols
        self.dtype, self.device = dtype, torch.device("cpu")
        self._packed: PackedWeight | None = packed
        self._pages = pages
        self._ready: Ready | None = None

    @property
    def shape(self) -> torch.Size:
        """Rows and columns of the matrix."""
        return torch.Size((self.rows, self.cols))

    @property
    def packed(self) -> PackedWeight:
        """The portable layout, made again where the processor's has taken its place."""
        if self._packed is None:
            assert self._ready is not None
            return restore(self._ready)
        return self._packed

    @property
    def ready(self) -> Ready:
        """What the processor multiplies with."""
        if self._ready is None:
            packed = self.packed
            self._ready = prepare(packed)
            if self._ready.native:
                for buffer in packed.buffers.values() if self._pages is not None else ():
                    assert self._pages is not None
                    if self._pages.hold(buffer):
                        self._pages.release(buffer)
                self._packed = None
        return self._ready

    def dense(self) -> Float[Tensor, "w c"]:
        """The matrix in fp32."""
        return dequantize(self.packed)

    def take(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n c"]:
        """Some of its rows.

        Raises:
            IndexError: if there is no such row, as in a table of numbers.
        """
        flat = ids.reshape(-1)
        if not len(flat):
            return torch.empty(*ids.shape, self.cols, dtype=self.dtype)
        low, high = (int(one) for one in torch.aminmax(flat))
        if low < 0 or high >= self.rows:  # the laid out table has more, which are nobody's
            raise IndexError(
                f"a table of {self.rows} rows was asked for row {low if low < 0 else high}; use "
                "ids that belong to the model"
            )
        if self._packed is None:
            assert self._ready is not None
            some = restore(self._ready, flat)
        else:
            buffers = {name: buffer[flat] for name, buffer in self._packed.buffers.items()}
            some = PackedWeight(self.scheme, len(flat), self.cols, buffers)
        return dequantize(some).to(self.dtype).view(*ids.shape, self.cols)

    def __getitem__(self, row: int) -> Float[Tensor, " c"]:
        """One row, counted from 0."""
        return self.take(torch.tensor([row]))[0]

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n w"]:
        """Products of rows with the matrix, in the dtype of `x`; the rows are quantised first."""
        return matmul(x, self.ready)

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        return f"{self.rows}, {self.cols}, {self.scheme}"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, buffer in self.packed.buffers.items():
            destination[prefix + name] = buffer

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Nothing: what it is made of, it was given."""


class PackedLinear(nn.Module):
    """A linear layer with a packed weight; the bias stays as it was."""

    bias: Tensor | None

    def __init__(self, weight: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
        )

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n w"]:
        """`x @ weight.T + bias`."""
        out: Tensor = self.weight(x)
        return out if self.bias is None else out.add_(self.bias)


class PackedEmbedding(nn.Module):
    """A table of packed rows, which may also serve as a head."""

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n c"]:
        """Rows of the table."""
        return self.weight.take(ids)


def restore(ready: Ready, ids: Int[Tensor, " n"] | None = None) -> PackedWeight:
    """The portable layout of what `prepare` made, or of some rows; bit for bit.

    Blocks hold 16 rows, words of 4 bytes of each in turn; scales likewise (src/linear.h).
    """
    if ready.packed is not None:
        packed = ready.packed
        if ids is None:
            return packed
        some = {name: buffer[ids] for name, buffer in packed.buffers.items()}
        return PackedWeight(packed.scheme, len(ids), packed.cols, some)
    form = SCHEMES[ready.scheme]
    blocks = -(-ready.rows // 16)
    wide = ready.keep[0].view(torch.int32).view(blocks, -1, 16)
    rows = torch.arange(ready.rows) if ids is None else ids
    block, within = rows // 16, rows % 16
    codes = wide[block, :, within].contiguous().view(torch.uint8)
    buffers = {"codes": codes[:, : ready.cols * form.bits // 8].contiguous()}
    for name, numbers in zip(("scales", "minimums"), ready.keep[1:], strict=False):
        buffers[name] = numbers[block, :, within].contiguous()
    return PackedWeight(ready.scheme, len(rows), ready.cols, buffers)
