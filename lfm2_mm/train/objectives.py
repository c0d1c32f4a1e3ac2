"""Training objectives that every modality shares."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["IGNORE", "next_token_loss"]

IGNORE = -100
"""The target of positions that carry no loss."""


def next_token_loss(
    hidden: Float[Tensor, "b t d"],
    head: Float[Tensor, "v d"],
    targets: Int[Tensor, "b t"],
    *,
    barred: Int[Tensor, "j 2"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over positions whose target is not `IGNORE`.

    `targets[b, t]` is the token that follows position t. Logits are computed only where they count;
    without any such position the loss is 0.

    Args:
        hidden: Final hidden states.
        head: The output matrix.
        targets: Next tokens.
        barred: Flat positions `b * t + t` and token ids that take no part there: their logits are
            neither raised nor lowered. A target is never barred.
    """
    chosen = targets != IGNORE
    logits = F.linear(hidden[chosen], head).float()
    wanted = targets[chosen]
    if barred is not None and len(barred):
        row_of = chosen.flatten().cumsum(0) - 1
        rows, tokens = row_of[barred[:, 0]], barred[:, 1]
        free = chosen.flatten()[barred[:, 0]] & (wanted[rows] != tokens)
        places = (rows[free], tokens[free])
        logits = logits.index_put(places, logits.new_tensor(float("-inf")))
    total = F.cross_entropy(logits, wanted, reduction="sum")
    return total / chosen.sum().clamp(min=1)
