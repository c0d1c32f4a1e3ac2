"""Products with weights of 4 and 8 bits: laid out for this CPU, activations quantised on the fly.

`prepare` lays a packed weight out, `matmul` multiplies. Where there is no library, the twin in
torch computes the same. Knows single weights, and nothing of models or files.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lfm2_mm.errors import InputError
from lfm2_mm.kernels import native
from lfm2_mm.kernels.memory import huge
from lfm2_mm.kernels.packed import (
    SCHEMES,
    PackedWeight,
    Scheme,
    dequantize,
    dequantize_rows,
    fits,
    from_buffers,
)
from lfm2_mm.kernels.rounding import quantize

__all__ = [
    "SCHEMES",
    "PackedWeight",
    "Ready",
    "Scheme",
    "dequantize",
    "fits",
    "from_buffers",
    "matmul",
    "matmul_twin",
    "prepare",
    "quantize",
    "quantize_rows",
]

_TINY = 1e-30  # as in src/linear.h
_CHUNK = 2**22  # numbers of a weight that a twin widens at a time


@dataclass(frozen=True)
class Ready:
    """A weight laid out for this CPU; made by `prepare`.

    Attributes:
        scheme: As of the packed weight.
        rows: Outputs.
        cols: Inputs.
        table: Eight words that the library reads (`lfm2_weight` in src/linear.h), which point
            into `keep`; None where torch computes.
        keep: Tensors that must stay alive.
        packed: The packed weight, only where torch computes.
    """

    scheme: Scheme
    rows: int
    cols: int
    table: Int[Tensor, "8"] | None
    keep: tuple[Tensor, ...]
    packed: PackedWeight | None

    def __deepcopy__(self, memo: object) -> Ready:
        return self  # the table points into `keep`

    def __getstate__(self) -> None:
        raise TypeError("a weight made ready for one CPU cannot be pickled; save the packed one")

    @property
    def native(self) -> bool:
        """Whether the library computes."""
        return self.table is not None

    @property
    def nbytes(self) -> int:
        """Bytes of weights read for one row of activations."""
        if self.packed is not None:
            return self.packed.nbytes
        return sum(tensor.nbytes for tensor in self.keep)


def prepare(packed: PackedWeight) -> Ready:
    """Lay a weight out for this CPU; a copy, so that the packed one may be let go.

    Where torch computes, the packed weight itself is kept.
    """
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = [pointer, pointer, number, number, number, ctypes.c_uint32, ctypes.c_int]
    pack = native.function("lfm2_linear_pack", arguments)
    if pack is None or native.function("lfm2_linear", _LINEAR, ctypes.c_int) is None:
        return Ready(packed.scheme, packed.rows, packed.cols, None, (), packed)
    form, rows = packed.format, packed.rows
    cols = _round_up(packed.cols, form.activation_group)
    words, blocks = cols * form.bits // 32, -(-rows // 16)
    source = packed.buffers["codes"].contiguous()
    if source.shape[1] % 4:  # rows of 8 bits whose columns are no multiple of 4
        source = F.pad(source, (0, -source.shape[1] % 4), value=form.zero)
    codes = huge(blocks * words * 64)
    fill = 0x80808080 if form.bits == 8 else 0x88888888
    given = source.shape[1] // 4
    pack(source.data_ptr(), codes.data_ptr(), rows, given, words, fill, native.threads())
    scales = _blocked(packed.buffers["scales"])
    keep = [codes, scales]
    if "minimums" in packed.buffers:
        keep.append(_blocked(packed.buffers["minimums"]))
    places = [tensor.data_ptr() for tensor in keep] + [0] * (3 - len(keep))
    shape = [rows, cols, form.bits, form.activation_group, int(form.group == 0)]
    table = torch.tensor(places + shape, dtype=torch.int64)
    return Ready(packed.scheme, rows, packed.cols, table, tuple(keep), None)


def _blocked(scales: Tensor) -> Tensor:
    """Numbers `[rows, groups]` as `[blocks, groups, 16]`, zeros at rows that do not exist."""
    rows, groups = scales.shape
    padded = F.pad(scales, (0, 0, 0, -rows % 16))
    blocked = padded.view(-1, 16, groups).transpose(1, 2)
    room = huge(2 * blocked.numel()).view(torch.float16)
    return room.view(blocked.shape).copy_(blocked)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


_LINEAR = (
    [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    + [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
)  # fmt: skip
_NATIVE = (torch.float32, torch.bfloat16)


def matmul(x: Float[Tensor, "*n c"], ready: Ready) -> Float[Tensor, "*n w"]:
    """`x` times the transposed weight, in the dtype of `x`.

    Activations are rounded to 8 bits in groups (see `quantize_rows`), each row for itself, except
    many rows on AMX, which are rounded to bf16: so results differ between few and many rows by
    that rounding. A row that holds a number that is not finite gives such numbers.

    Raises:
        InputError: `x` has another number of columns, or lies elsewhere than on the CPU.
        MemoryError: there is no memory for the rounded activations.
    """
    if x.shape[-1] != ready.cols or x.device.type != "cpu":
        raise InputError(
            f"a product wants rows of {ready.cols} numbers on the cpu, not {list(x.shape)} on "
            f"{x.device}; hand in the hidden states that this weight was made for"
        )
    rows = x.reshape(-1, ready.cols)
    if ready.table is None:
        assert ready.packed is not None
        return matmul_twin(rows, ready.packed).view(*x.shape[:-1], ready.rows)
    dtype = x.dtype if x.dtype in _NATIVE else torch.float32
    rows = rows.detach().to(dtype).contiguous()
    out = torch.empty(len(rows), ready.rows, dtype=dtype)
    call = native.function("lfm2_linear", _LINEAR, ctypes.c_int)
    if call is None:  # it was switched off meanwhile
        raise InputError(
            "the weight was made ready for the native kernels, which are switched off now; "
            "load the model again"
        )
    if len(rows):
        half = int(dtype == torch.bfloat16)
        place, source, target = ready.table.data_ptr(), rows.data_ptr(), out.data_ptr()
        used = native.threads()
        if call(place, source, len(rows), ready.cols, half, target, half, used):
            raise MemoryError("there is no memory left for the activations of a product")
    return out.to(x.dtype).view(*x.shape[:-1], ready.rows)


def quantize_rows(
    x: Float[Tensor, "n c"], group: int
) -> tuple[Float[Tensor, "n g e"], Float[Tensor, "n g 1"]]:
    """Activations rounded to 8 bits: codes in [-127, 127] (as fp32) and the scale of each group.

    Columns are filled up with zeros to a multiple of `group`. A group with a number that is not
    finite has the scale NaN.
    """
    wide = F.pad(x.float(), (0, -x.shape[1] % group))
    wide = wide.view(len(x), wide.shape[1] // group, group)
    largest = wide.abs().amax(-1, keepdim=True)
    finite, some = largest.isfinite(), largest >= _TINY
    inverse = torch.where(finite & some, 127.0 / largest, 0.0)
    codes = torch.where(finite & some, (wide * inverse).round(), 0.0)
    scales = torch.where(some, largest / 127.0, 0.0)
    return codes, torch.where(finite, scales, torch.nan)


def matmul_twin(x: Float[Tensor, "n c"], packed: PackedWeight) -> Float[Tensor, "n w"]:
    """What `matmul` gives for few rows, computed by torch in fp32; the dtype is that of `x`."""
    codes, scales = quantize_rows(x, packed.format.activation_group)
    rounded = (codes * scales).flatten(1)[:, : packed.cols]
    step = max(1, _CHUNK // packed.cols)
    parts = [
        F.linear(rounded, dequantize_rows(packed, first, min(first + step, packed.rows)))
        for first in range(0, packed.rows, step)
    ]
    return torch.cat(parts, dim=1).to(x.dtype)
