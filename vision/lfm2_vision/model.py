"""An LFM2-VL as one module: vision tower, connector, backbone, head; and its stored names.

Attribute names equal the official ones, so that parameter names are checkpoint names. Used by
loading, saving and training; generation takes its parts and knows nothing of this container.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lfm2_mm.backbone import Backbone
from lfm2_mm.config import BackboneConfig
from lfm2_vision.config import ConnectorConfig, TowerConfig
from lfm2_vision.connector import Connector
from lfm2_vision.encoder import Siglip2Tower, ViewShape

__all__ = ["VisionLanguageModel", "config_dict"]


class VisionLanguageModel(nn.Module):
    """The parts of an LFM2-VL."""

    def __init__(
        self, tower: TowerConfig, connector: ConnectorConfig, backbone: BackboneConfig
    ) -> None:
        super().__init__()
        self.vision_tower = Siglip2Tower(tower)
        self.multi_modal_projector = Connector(connector, tower.hidden_size, backbone.hidden_size)
        self.language_model = Backbone(backbone)
        self.lm_head = (
            None
            if backbone.tied
            else nn.Linear(backbone.hidden_size, backbone.vocab_size, bias=False)
        )

    @property
    def head_weight(self) -> Tensor:
        """The matrix that turns hidden states into logits, `[v, d]`."""
        if self.lm_head is None:
            return self.language_model.embed_tokens.weight
        return self.lm_head.weight

    def image_features(
        self, patches: Float[Tensor, "n p"], shapes: Sequence[ViewShape]
    ) -> Float[Tensor, "m d"]:
        """Embeddings of packed views, all views' positions behind each other."""
        rows: Tensor = self.multi_modal_projector(self.vision_tower(patches, shapes), shapes)
        return rows


def config_dict(
    tower: TowerConfig,
    connector: ConnectorConfig,
    backbone: BackboneConfig,
    *,
    image_token_id: int,
    dtype: str,
) -> dict[str, Any]:
    """The official `config.json` of these shapes."""
    text: Mapping[str, Any] = backbone.to_dict()
    return {
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "model_type": "lfm2_vl",
        "dtype": dtype,
        "image_token_id": image_token_id,
        "tie_word_embeddings": backbone.tied,
        "text_config": dict(text),
        "vision_config": tower.to_dict(),
        **connector.to_dict(),
    }
