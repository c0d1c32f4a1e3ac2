"""Shape and colour as directions among the connector's rows, and rows whose shape is exchanged.

Who never sees a red square learns that squareness speaks against red, and counts one red thing too
few: measured on withheld pairs, a row's shape, taken out along its direction, brings the counts by
colour back to those of trained pairs, and its colour the counts by shape (docs/LOG.md). So some
questions that do not name the shape are asked with every shape exchanged for a random mixture, and
those that do not name the colour with the colours exchanged; then neither can be leant on. No
picture of a withheld pair is drawn for it, and no pair is treated unlike another. Knows no scene
and no backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["Exchange", "Factor", "Factors"]

Factor = Literal["shape", "colour"]
_KEPT = 0.98  # share of what earlier batches say, kept at each
_RIDGE = 1e-3  # shares of shapes and of colours add up to the same: one of them is free


@dataclass(frozen=True)
class Exchange:
    """What to put in place of a factor.

    Attributes:
        factor: Which one is exchanged.
        mixture: Row c says, for things of class c, of which classes the new value is mixed;
            `[classes, classes]`, rows add up to one.
    """

    factor: Factor
    mixture: Float[Tensor, "n n"]

    @classmethod
    def drawn(cls, factor: Factor, classes: int, rng: Random) -> Exchange:
        """Mixtures from a symmetric Dirichlet distribution of concentration 0.1 each."""
        draws = [
            [rng.gammavariate(0.1, 1.0) + 1e-9 for _ in range(classes)] for _ in range(classes)
        ]
        mixture = torch.tensor(draws, dtype=torch.float32)
        return cls(factor, mixture / mixture.sum(1, keepdim=True))


class Factors(nn.Module):
    """An additive account of the rows that show a thing: base + share times (shape and colour).

    It is the ridge regression of the rows on what they show, over the last batches: kept as moments
    (buffers, so a checkpoint holds them) and solved when asked, it never lags behind the rows as
    weights learnt in small steps do.

    Args:
        size: Width of the rows.
        shapes: Number of shapes; their classes count from 1.
        colours: Number of colours; likewise.
    """

    shown: Tensor
    rows: Tensor

    def __init__(self, size: int, shapes: int, colours: int) -> None:
        super().__init__()
        self.shapes, self.colours = shapes, colours
        terms = 1 + shapes + colours
        self.register_buffer("shown", torch.zeros(terms, terms))
        self.register_buffer("rows", torch.zeros(terms, size))

    @torch.no_grad()
    def watch(
        self,
        rows: Float[Tensor, "m d"],
        share: Float[Tensor, " m"],
        shape: Int[Tensor, " m"],
        colour: Int[Tensor, " m"],
    ) -> None:
        """Take the rows of a batch into account; those without a name of both count nothing."""
        named = (shape >= 1) & (shape <= self.shapes) & (colour >= 1)
        told = rows.new_zeros(int(named.sum()), len(self.shown), dtype=torch.float32)
        if not len(told):
            return
        told[:, 0] = 1
        told.scatter_(1, shape[named, None], share[named, None].float())
        told.scatter_(1, self.shapes + colour[named, None], share[named, None].float())
        self.shown.mul_(_KEPT).addmm_(told.T, told, alpha=(1 - _KEPT) / len(told))
        self.rows.mul_(_KEPT).addmm_(told.T, rows[named].float(), alpha=(1 - _KEPT) / len(told))

    def table(self, factor: Factor) -> Float[Tensor, "n d"]:
        """What each class of a factor adds to a row of share one, up to a term common to all."""
        shown = self.shown.double()
        ridge = _RIDGE * shown.diagonal().mean().clamp(min=1e-6)
        whole = shown + ridge * torch.eye(len(shown)).to(shown)
        told: Tensor = torch.linalg.solve(whole, self.rows.double())
        if factor == "shape":
            return told[1 : 1 + self.shapes].float()
        return told[1 + self.shapes :].float()

    def exchanged(
        self,
        rows: Float[Tensor, "m d"],
        share: Float[Tensor, " m"],
        shape: Int[Tensor, " m"],
        colour: Int[Tensor, " m"],
        how: Exchange,
    ) -> Float[Tensor, "m d"]:
        """The rows with one factor exchanged; those without a name of it stay as they are."""
        classes, table = (shape if how.factor == "shape" else colour), self.table(how.factor)
        known = (classes >= 1) & (classes <= len(table))
        which = torch.where(known, classes - 1, 0)
        change = (how.mixture.to(table) @ table - table)[which]
        return rows + (change * (share * known)[:, None]).to(rows.dtype)
