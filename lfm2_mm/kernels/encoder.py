"""All layers of a bidirectional pre-norm transformer, such as SigLIP's, in one native call.

Products are int8 times int8, one scale for each row of weights and of activations; attention within
each view is bf16. Written for AMX only: elsewhere a tower computes layer by layer. Knows neither
pictures nor what comes before and behind the layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lfm2_mm.kernels import native
from lfm2_mm.kernels.linear import Ready, dequantize
from lfm2_mm.kernels.packed import PackedWeight

__all__ = ["EncoderLayer", "EncoderStack", "encode_twin"]

_ENCODE = (
    [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    + [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int]
)  # fmt: skip
_SCHEME = "int8"
_WEIGHTS = ("query", "key", "value", "out", "up", "down")


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """`x += out(attention(norm1(x)))`, then `x += down(gelu(up(norm2(x))))`.

    Weights are `Ready` for the native call, `PackedWeight` for the twin; norms are LayerNorms, the
    GELU is the one approximated with tanh, every product has a bias.
    """

    norm1: tuple[Float[Tensor, " d"], Float[Tensor, " d"]]
    query: Ready | PackedWeight
    key: Ready | PackedWeight
    value: Ready | PackedWeight
    out: Ready | PackedWeight
    attention_biases: tuple[
        Float[Tensor, " d"], Float[Tensor, " d"], Float[Tensor, " d"], Float[Tensor, " d"]
    ]
    norm2: tuple[Float[Tensor, " d"], Float[Tensor, " d"]]
    up: Ready | PackedWeight
    down: Ready | PackedWeight
    biases: tuple[Float[Tensor, " f"], Float[Tensor, " d"]]


class EncoderStack:
    """The layers of one encoder, where `can_run` says so.

    Args:
        layers: In order, of one width.
        heads: Of attention.
        eps: Of the norms.
    """

    def __init__(self, layers: Sequence[EncoderLayer], heads: int, eps: float) -> None:
        self.width, self.heads, self.eps = len(layers[0].norm1[0]), heads, eps
        self._keep: list[Tensor] = []
        self._weights = [getattr(layer, name) for layer in layers for name in _WEIGHTS]
        self._layers = torch.tensor([self._row(layer) for layer in layers], dtype=torch.int64)

    def __deepcopy__(self, memo: object) -> EncoderStack:
        return self  # the table points into `_keep`

    def __getstate__(self) -> None:
        raise TypeError("a native encoder cannot be pickled; save the packed weights")

    @staticmethod
    def can_run(layers: Sequence[EncoderLayer], heads: int) -> bool:
        """Whether there is such a call: on AMX, for weights of 8 bits with one scale a row."""
        if not layers or native.function("lfm2_encode", _ENCODE, ctypes.c_int) is None:
            return False
        width = len(layers[0].norm1[0])
        weights = [getattr(layer, name) for layer in layers for name in _WEIGHTS]
        fit = all(
            isinstance(weight, Ready) and weight.native and weight.scheme == _SCHEME
            for weight in weights
        )
        even = width % heads == 0 and width // heads % 2 == 0
        return fit and even and native.status().path == "amx"

    def __call__(self, x: Float[Tensor, "n d"], lengths: Sequence[int]) -> Float[Tensor, "n d"]:
        """The rows behind the last layer, in the dtype of `x`.

        Args:
            x: Rows of all views behind each other.
            lengths: Rows of each view; they add up to `n`.

        Raises:
            ValueError: shapes do not fit, or the kernels were switched to another path meanwhile.
            MemoryError: there is no memory for what lies between the products.
        """
        call = native.function("lfm2_encode", _ENCODE, ctypes.c_int)
        if (
            call is None
            or x.shape[1] != self.width
            or sum(lengths) != len(x)
            or min(lengths, default=0) < 0
        ):
            raise ValueError(
                f"a native encoder of width {self.width} cannot take {list(x.shape)} in views of "
                f"{list(lengths)}; hand in rows of that width, as many as the views have"
            )
        rows = x.detach().to(torch.float32, copy=True).contiguous()
        views = (ctypes.c_int64 * len(lengths))(*lengths)
        place, count = self._layers.data_ptr(), len(self._layers)
        failed = call(
            place, count, rows.data_ptr(), len(rows), self.width, self.heads,
            ctypes.addressof(views), len(lengths), self.eps, native.threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("there is no memory left for the layers of an encoder")
        return rows.to(x.dtype)

    def _place(self, tensor: Tensor) -> int:
        self._keep.append(tensor.detach().float().contiguous())
        return self._keep[-1].data_ptr()

    def _row(self, layer: EncoderLayer) -> list[int]:
        """`lfm2_encoder_layer` of src/encoder_amx.cpp."""
        first = [self._place(one) for one in layer.norm1]
        second = [self._place(one) for one in layer.norm2]
        q, k, v, out, up, down = (_table(getattr(layer, name)) for name in _WEIGHTS)
        own = [self._place(one) for one in layer.attention_biases]
        biases = [self._place(one) for one in layer.biases]
        return [*first, q, k, v, out, *own, *second, up, down, *biases]


def encode_twin(
    x: Float[Tensor, "n d"],
    lengths: Sequence[int],
    layers: Sequence[EncoderLayer],
    heads: int,
    eps: float,
) -> Float[Tensor, "n d"]:
    """What an `EncoderStack` computes, by torch in fp32, attention included."""
    size = x.shape[1]
    for layer in layers:
        h = F.layer_norm(x, (size,), *layer.norm1, eps)
        q, k, v = (
            _product(h, weight, bias)
            for weight, bias in zip(
                (layer.query, layer.key, layer.value), layer.attention_biases[:3], strict=True
            )
        )
        views = [
            [part.view(len(part), heads, size // heads).transpose(0, 1) for part in view]
            for view in zip(*(torch.split(one, list(lengths)) for one in (q, k, v)), strict=True)
        ]
        mixed = [F.scaled_dot_product_attention(*view).transpose(0, 1) for view in views]
        seen = torch.cat(mixed).flatten(1)
        x = x + _product(seen, layer.out, layer.attention_biases[3])
        h = F.layer_norm(x, (size,), *layer.norm2, eps)
        wide = F.gelu(_product(h, layer.up, layer.biases[0]), approximate="tanh")
        x = x + _product(wide, layer.down, layer.biases[1])
    return x


def _product(x: Tensor, weight: Ready | PackedWeight, bias: Tensor) -> Tensor:
    """Rows rounded to 8 bits, each by its own largest magnitude, times a weight."""
    assert isinstance(weight, PackedWeight)
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, x / scale, 0.0).round()
    return F.linear(codes, dequantize(weight)) * scale + bias


def _table(weight: Ready | PackedWeight) -> int:
    assert isinstance(weight, Ready) and weight.table is not None
    return weight.table.data_ptr()
