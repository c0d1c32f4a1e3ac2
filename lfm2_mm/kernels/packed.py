"""Quantised weights as files hold them: schemes, codes and scales, the same on every machine.

Knows neither how the codes were chosen nor how products are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from lfm2_mm.errors import InputError

__all__ = [
    "SCHEMES",
    "Format",
    "PackedWeight",
    "Scheme",
    "check_shape",
    "dequantize",
    "dequantize_rows",
    "fits",
    "from_buffers",
    "pack_codes",
    "unpack_codes",
]

Scheme = Literal["int8", "int8-g32", "int4-g32", "int4-g128"]


@dataclass(frozen=True, slots=True)
class Format:
    """What a scheme means.

    Attributes:
        bits: Of a code.
        group: Columns that share a scale; 0 for the whole row.
        zero: The code that stands for zero where there is no minimum.
    """

    bits: int
    group: int
    zero: int

    @property
    def activation_group(self) -> int:
        """Inputs that share a scale when activations are quantised."""
        return self.group or 64

    def groups(self, cols: int) -> int:
        """Scales of a row."""
        return cols // self.group if self.group else 1


SCHEMES: Mapping[str, Format] = {
    "int8": Format(8, 0, 128),
    "int8-g32": Format(8, 32, 128),
    "int4-g32": Format(4, 32, 8),
    "int4-g128": Format(4, 128, 8),
}


@dataclass(frozen=True)
class PackedWeight:
    """A quantised weight as files hold it.

    `weight = scale * (code - zero)`, or `scale * code + minimum` where there are minimums.

    Attributes:
        scheme: See `SCHEMES`.
        rows: Outputs.
        cols: Inputs; a multiple of the group.
        buffers: "codes" uint8 (`[rows, cols]` of 8 bits; `[rows, cols / 2]` of 4 bits, see
            `pack_codes`), "scales" fp16 `[rows, groups]`, and for 4 bits perhaps "minimums"
            like the scales.

    Raises:
        InputError: the scheme is unknown, or the buffers do not fit it.
    """

    scheme: Scheme
    rows: int
    cols: int
    buffers: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_shape(self.scheme, self.rows, self.cols)
        form = self.format
        groups = (self.rows, form.groups(self.cols))
        wanted = {
            "codes": (torch.uint8, (self.rows, self.cols * form.bits // 8)),
            "scales": (torch.float16, groups),
        }
        if "minimums" in self.buffers:
            if form.bits != 4:
                raise InputError(
                    f"{self.scheme} was given minimums, which only schemes of 4 bits have; "
                    "leave them out"
                )
            wanted["minimums"] = (torch.float16, groups)
        if set(self.buffers) != set(wanted):
            raise InputError(
                f"a packed weight holds {', '.join(sorted(self.buffers)) or 'nothing'}; "
                f"{self.scheme} needs {', '.join(wanted)}"
            )
        for name, (dtype, shape) in wanted.items():
            found = self.buffers[name]
            if found.dtype != dtype or tuple(found.shape) != shape:
                raise InputError(
                    f"{name} of a packed {self.scheme} weight of {self.rows} x {self.cols} is "
                    f"{found.dtype} {list(found.shape)}; it must be {dtype} {list(shape)}"
                )

    @property
    def format(self) -> Format:
        """What the scheme means."""
        return SCHEMES[self.scheme]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())


def check_shape(scheme: str, rows: int, cols: int) -> Format:
    """The scheme's format, if such a weight can exist.

    Raises:
        InputError: the scheme is unknown, or the columns are no multiple of the group.
    """
    if scheme not in SCHEMES:
        raise InputError(
            f"there is no quantisation scheme {scheme!r}; use one of {', '.join(get_args(Scheme))}"
        )
    form = SCHEMES[scheme]
    if rows < 1 or cols < 1 or (form.group and cols % form.group):
        raise InputError(
            f"a weight of {rows} x {cols} cannot be {scheme}: its columns must be a positive "
            f"multiple of {form.group or 1}; choose another scheme for it, such as int8"
        )
    return form


def fits(scheme: str, rows: int, cols: int) -> bool:
    """Whether a weight of this shape can have the scheme."""
    try:
        check_shape(scheme, rows, cols)
    except InputError:
        return False
    return True


def from_buffers(buffers: Mapping[str, Tensor], rows: int, cols: int) -> PackedWeight:
    """The packed weight of this shape whose scheme the buffers' own shapes tell.

    Raises:
        InputError: the buffers fit no scheme.
    """
    codes, scales = buffers.get("codes"), buffers.get("scales")
    for scheme in get_args(Scheme):
        form = SCHEMES[scheme]
        if codes is None or scales is None or not fits(scheme, rows, cols):
            continue
        if not codes.dim() or not scales.dim():
            continue
        seen = (codes.shape[-1], scales.shape[-1])
        if seen == (cols * form.bits // 8, form.groups(cols)):
            return PackedWeight(scheme, rows, cols, buffers)
    shapes = {name: list(buffer.shape) for name, buffer in sorted(buffers.items())}
    raise InputError(
        f"no quantisation scheme has the buffers {shapes} for a weight of {rows} x {cols}; "
        "the file is damaged or of another version"
    )


def pack_codes(codes: Integer[Tensor, "w c"]) -> Integer[Tensor, "w half"]:
    """Codes of 4 bits, two in a byte: of 8 neighbours, the first 4 fill the low halves of 4 bytes.

    The number of columns must be a multiple of 8.
    """
    rows, cols = codes.shape
    low, high = codes.to(torch.uint8).view(rows, cols // 8, 2, 4).unbind(2)
    return (low | high << 4).view(rows, cols // 2)


def unpack_codes(packed: Integer[Tensor, "w half"]) -> Integer[Tensor, "w c"]:
    """The inverse of `pack_codes`, as uint8."""
    rows, half = packed.shape
    four = packed.view(rows, half // 4, 1, 4)
    return torch.cat([four & 15, four >> 4], dim=2).view(rows, 2 * half)


def dequantize(packed: PackedWeight) -> Float[Tensor, "w c"]:
    """The weight that the codes stand for, fp32."""
    return dequantize_rows(packed, 0, packed.rows)


def dequantize_rows(packed: PackedWeight, first: int, last: int) -> Float[Tensor, "some c"]:
    """Rows `first` to `last`, exclusive, of `dequantize`."""
    form, buffers = packed.format, packed.buffers
    codes = buffers["codes"][first:last]
    codes = unpack_codes(codes) if form.bits == 4 else codes
    scales = buffers["scales"][first:last, :, None].float()
    wide = codes.float().view(last - first, scales.shape[1], -1)
    if "minimums" in buffers:
        wide = wide * scales + buffers["minimums"][first:last, :, None].float()
    else:
        wide = (wide - form.zero) * scales
    return wide.view(last - first, packed.cols)
