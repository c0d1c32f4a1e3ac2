"""Packed weights that were drawn packed: all a benchmark needs, and nothing has to be rounded.

Speed does not depend on what weights say. Knows modules and schemes; no file and no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Generator, Tensor, nn

    from lfm2_mm.kernels.packed import PackedWeight, Scheme
    from lfm2_mm.quantize.recipes import Schemes

__all__ = ["draw_module", "draw_weight"]

_SPREAD = {8: 73.6, 4: 4.61}  # standard deviation of codes that are all equally likely


def draw_weight(
    scheme: Scheme, rows: int, cols: int, std: float, generator: Generator
) -> PackedWeight:
    """A packed weight of random codes whose numbers have about this standard deviation."""
    import torch

    from lfm2_mm.kernels.packed import SCHEMES, PackedWeight

    form = SCHEMES[scheme]
    width = cols * form.bits // 8
    words = torch.empty(-(-rows * width // 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    codes = words.view(torch.uint8)[: rows * width].view(rows, width)
    scales = torch.full((rows, form.groups(cols)), std / _SPREAD[form.bits], dtype=torch.float16)
    return PackedWeight(scheme, rows, cols, {"codes": codes, "scales": scales})


def draw_module(
    module: nn.Module,
    schemes: Schemes | None,
    generator: Generator,
    fill: Callable[[str, tuple[int, ...]], Tensor],
) -> Mapping[str, Tensor]:
    """The state of a module of random weights, packed where a recipe packs.

    Args:
        module: Built on the meta device; packed layers take their places in it.
        schemes: Which weights are packed, and how; None packs nothing.
        generator: Draws the codes.
        fill: The numbers of what is not packed, by name and shape.
    """
    import torch

    from lfm2_mm.quantize.fitting import fit

    def drawn(weight: torch.Tensor, scheme: Scheme) -> PackedWeight:
        rows, cols = weight.shape
        return draw_weight(scheme, rows, cols, 0.7 * cols**-0.5, generator)

    empty = {name: tensor for name, tensor in module.state_dict().items()}
    left = fit(module, empty, schemes, dtype=None, where="the drawn model", rounding=drawn)
    state = dict(module.state_dict())
    return {
        name: fill(name, tuple(tensor.shape)) if name in left else tensor
        for name, tensor in state.items()
    }
