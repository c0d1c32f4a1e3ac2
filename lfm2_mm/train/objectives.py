"""Training objectives that every modality shares."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["IGNORE", "next_token_loss"]

IGNORE = -100
"""The target of positions that carry no loss."""


def next_token_loss(
    hidden: Float[Tensor, "*t d"], head: Float[Tensor, "v d"], targets: Int[Tensor, "*t"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over positions whose target is not `IGNORE`.

    `targets[..., t]` is the token that follows position t. Logits are computed only where they
    count; without any such position the loss is 0.
    """
    chosen = targets != IGNORE
    logits = F.linear(hidden[chosen], head).float()
    total = F.cross_entropy(logits, targets[chosen], reduction="sum")
    return total / chosen.sum().clamp(min=1)
