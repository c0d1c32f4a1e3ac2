"""Packed weights take their places in modules: read as they are, or packed on the way.

Linear layers and the token embedding are replaced, whoever's they are; every other module gets
its numbers back. Knows names of tensors and modules; nothing of files or of how a module computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from lfm2_mm.errors import InputError, TensorMismatch
from lfm2_mm.kernels.linear import (
    SCHEMES,
    PackedWeight,
    Scheme,
    dequantize,
    fits,
    from_buffers,
    quantize,
)
from lfm2_mm.pages import CleanPages
from lfm2_mm.quantize.layers import Packed, PackedEmbedding, PackedLinear
from lfm2_mm.quantize.recipes import Schemes

__all__ = ["fit", "packed_weight", "place", "scheme_for"]

_PARTS = (".codes", ".scales", ".minimums")
_EMBEDDINGS = ("embed_tokens", "embedding")  # the only tables nobody reads as a matrix


def scheme_for(shape: Sequence[int], wanted: Scheme) -> Scheme | None:
    """The scheme nearest to the one wanted that fits a matrix; None where none does."""
    rows, cols = shape
    order: list[Scheme] = [wanted, "int4-g32"] if wanted.startswith("int4") else [wanted]
    if cols != SCHEMES["int8-g32"].group:  # one group a row is no group
        order.append("int8-g32")
    elif wanted == "int8-g32":
        order = []
    return next((one for one in (*order, "int8") if fits(one, rows, cols)), None)


def packed_weight(
    name: str, parts: Mapping[str, Tensor], shape: Sequence[int], where: str
) -> PackedWeight:
    """The packed matrix of one weight, of its stored parts (`codes`, `scales`, …).

    Raises:
        TensorMismatch: if a part is missing or of another shape.
    """
    try:
        rows, cols = shape
        return from_buffers(parts, rows, cols)
    except InputError as error:
        why = str(error).partition(";")[0]
    raise TensorMismatch(
        f"the packed weight {name} of {where} cannot be used ({why}); pack the model anew with "
        "`lfm2-mm quantize`"
    )


def fit(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    schemes: Schemes | None,
    *,
    dtype: torch.dtype | None,
    where: str,
    rounding: Callable[[Tensor, Scheme], PackedWeight] = quantize,
) -> dict[str, Tensor]:
    """Replace modules by packed ones, where their weights are packed or shall be.

    Args:
        module: Built, on any device; changed in place.
        tensors: Own name -> tensor; packed weights as `NAME.codes`, `NAME.scales`, ….
        schemes: How to pack what is not; None packs nothing.
        dtype: Number format of what is computed; None stands for fp32.
        where: What the user calls the source; used in messages.
        rounding: Packs one weight.

    Returns:
        Own name -> tensor, of everything that is still to be loaded.

    Raises:
        TensorMismatch: if parts of a packed weight are missing or do not fit.
    """
    stored: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, str] = {}
    for name in tensors:
        stem = _stem(name)
        if stem is None:
            plain[name] = name
        else:
            stored.setdefault(stem, {})[name.removeprefix(stem + ".")] = tensors[name]
    left = {name: tensors[name] for name in plain}
    pages = CleanPages.find() if stored else None
    kind = dtype or torch.float32
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name, parts in stored.items():
        if name not in shapes:
            left[name] = next(iter(parts.values()))  # unknown, as the caller will say
            continue
        packed = packed_weight(name, parts, _matrix(shapes[name]), where)
        if not place(module, name, Packed(packed, pages, kind)):
            left[name] = dequantize(packed).view(shapes[name])
    if schemes is not None:
        for name, scheme in _wanted(module, schemes, left).items():
            source = left.pop(name)
            packed = rounding(source.detach(), scheme)
            place(module, name, Packed(packed, None, kind))
            if schemes.report is not None:
                schemes.report(name)
    return left


def _stem(name: str) -> str | None:
    """`a.weight` of `a.weight.codes`; None for the name of no part."""
    for part in _PARTS:
        if name.endswith(".weight" + part):
            return name.removesuffix(part)
    return None


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _wanted(
    module: nn.Module, schemes: Schemes, tensors: Mapping[str, Tensor]
) -> dict[str, Scheme]:
    """Names of weights to pack, and how; only of those whose shape is right."""
    found: dict[str, Scheme] = {}
    for name, part in module.named_modules():
        weight = f"{name}.weight"
        if schemes.keeps(name) or weight not in tensors:
            continue
        wanted: Scheme | None = None
        if type(part) is nn.Linear:
            wanted = schemes.linear
        elif type(part) is nn.Embedding and name.rpartition(".")[2] in _EMBEDDINGS:
            wanted = schemes.embedding
        if wanted is None or tensors[weight].shape != part.weight.shape:
            continue
        scheme = scheme_for(tensors[weight].shape, wanted)
        if scheme is not None:
            found[weight] = scheme
    return found


def place(module: nn.Module, name: str, packed: Packed) -> bool:
    """Put a packed weight where a module stands; False where that one wants numbers."""
    owner, _, last = name.removesuffix(".weight").rpartition(".")
    parent = module.get_submodule(owner)
    old = getattr(parent, last)
    new: nn.Module
    if type(old) is nn.Linear:
        new = PackedLinear(packed, old.bias)
    elif type(old) is nn.Embedding and last in _EMBEDDINGS:
        new = PackedEmbedding(packed)
    else:
        return False
    setattr(parent, last, new.train(old.training))
    return True
