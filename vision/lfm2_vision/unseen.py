"""What the tower must not conclude from pairs of shape and colour that it never sees.

A tower that never sees a blue star learns that what is blue is no star, and then takes every blue
star for something else. So the auxiliary losses leave out the names that the split withholds,
neither rewarded nor punished, and level what was learnt against them before: a withheld name is to
be as unlikely as the other wrong names are. No picture of a withheld pair is drawn for either.
Words that answer for shapes are lifted where they sink below the others, but never left out nor
held at a level: the one lets withheld names rise, the other pins them (docs/LOG.md). Knows scenes,
no model.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lfm2_vision.scenes import ALL_COLOURS, ALL_SHAPES, HELD_OUT_PAIRS

__all__ = ["level_loss", "lift_loss", "unseen_pairs"]


@cache
def unseen_pairs() -> Bool[Tensor, "colours shapes"]:
    """Whether a pair is withheld, by `[1 + colour, 1 + shape]`; class 0 and the last shape none.

    Classes count from 1 in the order of `ALL_COLOURS` and `ALL_SHAPES`; shape class 0 is the
    ground, the last one a sign.
    """
    table = torch.zeros(len(ALL_COLOURS) + 1, len(ALL_SHAPES) + 2, dtype=torch.bool)
    for shape, colour in HELD_OUT_PAIRS:
        table[ALL_COLOURS.index(colour) + 1, ALL_SHAPES.index(shape) + 1] = True
    return table


def level_loss(
    logits: Float[Tensor, "k n"], unseen: Bool[Tensor, "k n"], wanted: Int[Tensor, " k"]
) -> Float[Tensor, ""]:
    """How far withheld names are from the mean of the other wrong names, smooth L1 in nats.

    Both sides move: names that run after a mean which stands still are brought nearer to it by
    larger rows, which move it on, without end.

    Args:
        logits: Of every name.
        unseen: Which names are withheld.
        wanted: The right name; rows that withhold nothing count nothing.
    """
    logits = logits.float()
    wrong = ~unseen & ~F.one_hot(wanted, logits.shape[1]).bool()
    mean = (logits * wrong).sum(1, keepdim=True) / wrong.sum(1, keepdim=True).clamp(min=1)
    gaps = F.smooth_l1_loss(logits, mean.expand_as(logits), reduction="none")
    return (gaps * unseen).sum() / unseen.sum().clamp(min=1)


def lift_loss(
    logits: Float[Tensor, "k n"], unseen: Bool[Tensor, "k n"], wanted: Int[Tensor, " k"]
) -> Float[Tensor, ""]:
    """How far withheld names lie below the mean of the other wrong names, in nats.

    Arguments as for `level_loss`; names above that mean count nothing.
    """
    logits = logits.float()
    wrong = ~unseen & ~F.one_hot(wanted, logits.shape[1]).bool()
    mean = (logits * wrong).sum(1, keepdim=True) / wrong.sum(1, keepdim=True).clamp(min=1)
    below = F.relu(mean.detach() - logits)
    return (below * unseen).sum() / unseen.sum().clamp(min=1)
