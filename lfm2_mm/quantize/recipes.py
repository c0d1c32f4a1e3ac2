"""Which weights are stored in how many bits: one recipe for each word that `quantize=` takes.

The schemes were chosen by measurement (`lfm2-mm eval quantization`, docs/LOG.md): the body of the
backbone bears 4 bits, 32 weights to a scale; the head, which is the embedding, gets 8, and so do
encoders, which are bound by arithmetic and not by the bytes of their weights. Norms, convolution
taps and routers keep their numbers. Knows names and shapes; no tensor and no file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lfm2_mm.errors import SettingError

if TYPE_CHECKING:
    from lfm2_mm.kernels.linear import Scheme

__all__ = ["RECIPES", "Quantize", "Recipe", "Schemes", "recipe"]

Quantize = Literal["int4", "int8"]
"""What `lfm2_mm.load(quantize=)` takes beside None."""


@dataclass(frozen=True, kw_only=True)
class Schemes:
    """How the weights of one tree of modules are stored.

    Attributes:
        linear: Scheme of linear layers.
        embedding: Scheme of embeddings that also serve as heads.
        keep: Ends of names of modules that stay as they are.
        report: Told the name of every weight that was packed.
    """

    linear: Scheme
    embedding: Scheme
    keep: tuple[str, ...] = ()
    report: Callable[[str], None] | None = None

    def keeping(self, *names: str) -> Schemes:
        """The same with further modules left alone."""
        return replace(self, keep=(*self.keep, *names))

    def keeps(self, name: str) -> bool:
        """Whether a module of this name stays."""
        return any(name == end or name.endswith("." + end) for end in self.keep)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Schemes for all parts of a model.

    Attributes:
        name: What `quantize=` takes.
        backbone: For the text backbone and its head.
        encoder: For everything before and behind it.
    """

    name: str
    backbone: Schemes
    encoder: Schemes

    def reporting(self, report: Callable[[str], None] | None) -> Recipe:
        """The same, telling what was packed."""
        return replace(
            self,
            backbone=replace(self.backbone, report=report),
            encoder=replace(self.encoder, report=report),
        )


_ROUTERS = ("feed_forward.gate",)
_EIGHT = Schemes(linear="int8-g32", embedding="int8-g32", keep=_ROUTERS)
_ENCODER = Schemes(linear="int8", embedding="int8-g32")  # a scale a row: what int8 units multiply

RECIPES: dict[str, Recipe] = {
    "int4": Recipe(
        name="int4",
        backbone=Schemes(linear="int4-g32", embedding="int8-g32", keep=_ROUTERS),
        encoder=_ENCODER,
    ),
    "int8": Recipe(name="int8", backbone=_EIGHT, encoder=_ENCODER),
}
"""All recipes by name."""


def recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        SettingError: if there is none.
    """
    if name not in RECIPES:
        raise SettingError(f"quantize is {name!r}; use one of {', '.join(RECIPES)}, or none")
    return RECIPES[name]
