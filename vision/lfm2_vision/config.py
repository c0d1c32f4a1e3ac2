"""`config.json` of an LFM2-VL checkpoint: the vision tower's and the connector's shapes.

Preprocessing values are not here but in `image_config`; the backbone's are the core's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfm2_mm.errors import CheckpointError

__all__ = ["MODEL_TYPES", "ConnectorConfig", "TowerConfig", "is_vision_language"]

MODEL_TYPES = frozenset({"lfm2_vl", "lfm2-vl"})


def is_vision_language(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is an LFM2-VL's."""
    return config.get("model_type") in MODEL_TYPES


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """Shapes of a SigLIP2 NaFlex vision tower.

    Attributes:
        grid: Side of the learnt square table of positions (`sqrt(num_patches)`).
    """

    hidden_size: int = 768
    ffn_size: int = 3072
    n_layers: int = 12
    n_heads: int = 12
    patch_size: int = 16
    n_channels: int = 3
    grid: int = 16
    norm_eps: float = 1e-6

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.n_channels * self.patch_size**2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TowerConfig:
        """Read the `vision_config` section of a `config.json`."""
        raw = config.get("vision_config") or {}
        patch = raw.get("patch_size", 16)
        built = cls(
            hidden_size=int(raw.get("hidden_size", 768)),
            ffn_size=int(raw.get("intermediate_size", 3072)),
            n_layers=int(raw.get("num_hidden_layers", 12)),
            n_heads=int(raw.get("num_attention_heads", 12)),
            patch_size=int(patch if isinstance(patch, int) else patch[0]),
            n_channels=int(raw.get("num_channels", 3)),
            grid=int(raw.get("num_patches", 256) ** 0.5),
            norm_eps=float(raw.get("layer_norm_eps", 1e-6)),
        )
        if built.hidden_size % built.n_heads:
            raise CheckpointError(
                f"the vision config gives width {built.hidden_size} over {built.n_heads} heads; "
                "the first must be a multiple of the second"
            )
        return built

    def to_dict(self) -> dict[str, Any]:
        """The official form: what `Siglip2VisionConfig` of transformers reads."""
        return {
            "model_type": "siglip2_vision_model",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "patch_size": self.patch_size,
            "num_channels": self.n_channels,
            "num_patches": self.grid**2,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": False,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorConfig:
    """Shapes of the connector between the tower and the backbone.

    Attributes:
        factor: Side of the square of patches that becomes one position (`downsample_factor`).
        layer_norm: Whether the stored tensors hold a LayerNorm (the config alone is not reliable).
    """

    factor: int = 2
    hidden_size: int = 2560
    bias: bool = True
    layer_norm: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, layer_norm: bool) -> ConnectorConfig:
        """Read the connector's keys of a `config.json`."""
        activation = config.get("projector_hidden_act", "gelu")
        if activation != "gelu":
            raise CheckpointError(
                f"the config asks for connector activation {activation!r}; every LFM2-VL uses "
                "'gelu', so the file is damaged or of another family"
            )
        return cls(
            factor=int(config.get("downsample_factor", 2)),
            hidden_size=int(config.get("projector_hidden_size", 2560)),
            bias=bool(config.get("projector_bias", True)),
            layer_norm=layer_norm,
        )

    def to_dict(self) -> dict[str, Any]:
        """The official keys, at the top level of a `config.json`."""
        return {
            "downsample_factor": self.factor,
            "projector_hidden_size": self.hidden_size,
            "projector_bias": self.bias,
            "projector_use_layernorm": self.layer_norm,
            "projector_hidden_act": "gelu",
        }
