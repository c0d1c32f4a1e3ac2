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
_SCALE = 100.0  # rows are large: so do Adam's small steps reach them


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
    """An additive account of the rows that show a thing: share times (shape and colour).

    Args:
        size: Width of the rows.
        shapes: Number of shapes; their classes count from 1.
        colours: Number of colours; likewise.
    """

    def __init__(self, size: int, shapes: int, colours: int) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.zeros(size))
        self.shape = nn.Parameter(torch.zeros(shapes, size))
        self.colour = nn.Parameter(torch.zeros(colours, size))

    def loss(
        self,
        rows: Float[Tensor, "m d"],
        share: Float[Tensor, " m"],
        shape: Int[Tensor, " m"],
        colour: Int[Tensor, " m"],
    ) -> Float[Tensor, ""]:
        """Mean squared error of the account; the rows themselves learn nothing from it."""
        named = (shape >= 1) & (shape <= len(self.shape)) & (colour >= 1)
        if not named.any():
            return rows.new_zeros((), dtype=torch.float32)
        what = self.shape[shape[named] - 1] + self.colour[colour[named] - 1]
        told = self.base + share[named, None] * what
        return (rows[named].detach().float() / _SCALE - told).square().mean()

    def exchanged(
        self,
        rows: Float[Tensor, "m d"],
        share: Float[Tensor, " m"],
        shape: Int[Tensor, " m"],
        colour: Int[Tensor, " m"],
        how: Exchange,
    ) -> Float[Tensor, "m d"]:
        """The rows with one factor exchanged; those without a name of it stay as they are."""
        classes, told = (shape, self.shape) if how.factor == "shape" else (colour, self.colour)
        table = _SCALE * told.detach()
        known = (classes >= 1) & (classes <= len(table))
        which = torch.where(known, classes - 1, 0)
        change = (how.mixture.to(table) @ table - table)[which]
        return rows + (change * (share * known)[:, None]).to(rows.dtype)
