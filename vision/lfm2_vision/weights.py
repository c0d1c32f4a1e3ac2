"""Stored names of vision tower and connector: which prefix in a file means which of our modules.

Three layouts exist in the wild (official Hub files, files saved by transformers 5, MLX and old
remote code); all are read, the official one is written. Knows names only.
"""

from __future__ import annotations

from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.weights import BACKBONE_RULES, HEAD_RULES, Rule, rename

__all__ = [
    "ALL_RULES",
    "CONNECTOR_RULES",
    "OFFICIAL_CONNECTOR",
    "OFFICIAL_TOWER",
    "TOWER_RULES",
    "has_layer_norm",
]

OFFICIAL_TOWER = "model.vision_tower.vision_model."
OFFICIAL_CONNECTOR = "model.multi_modal_projector."

TOWER_RULES = tuple(
    Rule(prefix, "")
    for prefix in (
        OFFICIAL_TOWER,
        "model.vision_tower.",
        "vision_tower.vision_model.",
        "vision_tower.",
    )
)
CONNECTOR_RULES = (Rule(OFFICIAL_CONNECTOR, ""), Rule("multi_modal_projector.", ""))
ALL_RULES = (*TOWER_RULES, *CONNECTOR_RULES, *BACKBONE_RULES, *HEAD_RULES)


def has_layer_norm(checkpoint: Checkpoint) -> bool:
    """Whether the connector's LayerNorm is stored; configs are wrong about it in both ways."""
    return "layer_norm.weight" in rename(checkpoint.names, CONNECTOR_RULES)
