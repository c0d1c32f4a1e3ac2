"""The products and norms of an inference in bf16 on a CPU, in fewer passes over memory.

oneDNN does what follows a product within it, and reads weights laid out for the processor's matrix
units; the operators are those that `torch.compile` uses. Wherever they are missing, or gradients,
another dtype or another device are asked for, this is the plain composition, and the results
differ by rounding at most. It knows linear layers and nothing of what they are part of.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lfm2_mm.pages import CleanPages

__all__ = ["gelu_linear", "linear", "pack", "rms_norm", "swiglu"]

_NARROW, _ALONE = 1024, range(700, 1400)
_MANY = 2**15  # numbers, from which on fewer passes over them count more than calls
_ROWS = 256  # the layout is chosen for about so many rows, and serves one row as well


class _Packed(NamedTuple):
    """A weight in oneDNN's layout, and what it was made of."""

    weight: Tensor
    source: Tensor
    version: int


_packed: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def linear(x: Float[Tensor, "*n c"], layer: nn.Module) -> Float[Tensor, "*n w"]:
    """`layer(x)`.

    oneDNN gives a product of about a thousand rows and few columns to one of two threads (seen
    with torch 2.13 on AMX: 1.05 instead of 1.9 TFLOP/s), so that is done in two halves.
    """
    if not _usable(x, layer):
        plain: Tensor = layer(x)
        return plain
    assert isinstance(layer, nn.Linear)
    ready = _packed_weight(layer)
    if layer.out_features <= _NARROW and x.dim() == 2 and x.shape[0] in _ALONE:
        if torch.get_num_threads() > 1:
            return torch.cat([_product(half, layer, ready) for half in x.chunk(2)])
    return _product(x, layer, ready)


def gelu_linear(x: Float[Tensor, "*n c"], layer: nn.Module) -> Float[Tensor, "*n w"]:
    """`gelu(layer(x))`, approximated with tanh."""
    if not _usable(x, layer):
        plain: Tensor = F.gelu(layer(x), approximate="tanh")
        return plain
    assert isinstance(layer, nn.Linear)
    return _product(x, layer, _packed_weight(layer), "gelu", "tanh")


def swiglu(x: Float[Tensor, "*n c"], gate: nn.Module, up: nn.Module) -> Float[Tensor, "*n w"]:
    """`silu(gate(x)) * up(x)`, both layers without a bias."""
    if not (_usable(x, gate) and _usable(x, up)):
        plain: Tensor = F.silu(gate(x)) * up(x)
        return plain
    assert isinstance(gate, nn.Linear) and isinstance(up, nn.Linear)
    gated = _product(x, gate, _packed_weight(gate), "swish")
    weight = _packed_weight(up)
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
        x, gated, up.weight if weight is None else weight, up.bias, "mul"
    )
    return out


def rms_norm(
    x: Float[Tensor, "*n d"], weight: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*n d"]:
    """`weight * x / rms(x)`, the mean of squares taken in fp32.

    PyTorch composes it of more passes over memory than many rows in bf16 need.
    """
    size = x.shape[-1]
    if not _plain_bf16(x) or weight.dtype != x.dtype or x.numel() < _MANY:
        return F.rms_norm(x, (size,), weight, eps)
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.square_().div_(size).add_(eps).rsqrt_()
    return wide.mul_(scale).mul_(weight).to(x.dtype)


def pack(modules: Iterable[nn.Module]) -> int:
    """Lay out the weights of linear layers anew, those of mapped files only.

    What is mapped can be let go and read again at any time, so this takes no more memory than
    before. The layers and their parameters stay what they are; a parameter that is changed or
    replaced afterwards is used as it then is.

    Returns:
        How many layers were packed.
    """
    layers = [layer for layer in modules if _packable(layer)]
    clean = CleanPages.find() if layers else None
    count = 0
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        source = layer.weight
        if clean is None or not clean.hold(source):
            continue
        with torch.inference_mode():
            weight = torch.ops.mkldnn._reorder_linear_weight(source.detach(), _ROWS)
        _packed[layer] = _Packed(weight, source, source._version)
        clean.release(source)
        count += 1
    return count


def _packable(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or layer in _packed:
        return False
    weight = layer.weight
    fits = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
    return fits and not weight.requires_grad and not weight.is_inference() and _works()


def _packed_weight(layer: nn.Linear) -> Tensor | None:
    found = _packed.get(layer)
    if found is None:
        return None
    if found.source is layer.weight and found.version == found.source._version:
        return found.weight
    del _packed[layer]
    return None


def _product(
    x: Tensor, layer: nn.Linear, ready: Tensor | None, what: str = "none", how: str = ""
) -> Tensor:
    if ready is None and what == "none":
        return F.linear(x, layer.weight, layer.bias)
    weight = layer.weight if ready is None else ready
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, what, [], how)
    return out


def _plain_bf16(x: Tensor) -> bool:
    """Whether these are rows of an inference in bf16 on a CPU."""
    return (
        x.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def _usable(x: Tensor, layer: nn.Module) -> bool:
    return (
        _plain_bf16(x)
        and type(layer) is nn.Linear
        and layer.weight.dtype == torch.bfloat16
        and _works()
    )


@functools.cache
def _works() -> bool:
    """Whether this torch on this processor has the operators, and they mean what we think."""
    ops: Any = torch.ops.mkldnn
    try:
        if not ops._is_mkldnn_bf16_supported():
            return False
        with torch.inference_mode():
            x, w = torch.ones(2, 32).bfloat16(), torch.full((16, 32), 1 / 64).bfloat16()
            ready = ops._reorder_linear_weight(w, _ROWS)
            half = ops._linear_pointwise(x, ready, None, "none", [], "")
            gelu = ops._linear_pointwise(x, w, w[:, 0], "gelu", [], "tanh")
            silu = ops._linear_pointwise(x, w, None, "swish", [], "")
            half_of = ops._linear_pointwise.binary(x, silu, ready, None, "mul")
            wanted = [F.gelu(half + w[:, 0], approximate="tanh"), F.silu(half), F.silu(half) / 2]
            found = [gelu, silu, half_of]
            return bool((half == 0.5).all()) and all(
                torch.allclose(a, b, atol=0.01) for a, b in zip(found, wanted, strict=True)
            )
    except (AttributeError, RuntimeError, TypeError):
        return False
