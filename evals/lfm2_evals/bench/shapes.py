"""Checkpoints of random weights at released shapes, and how much arithmetic their images take.

Speed does not depend on what weights say, so a benchmark needs shapes only. Shapes and counts
(sources: the released configs, and matrix products counted as two operations a weight) are light;
torch is imported when a checkpoint is written. Knows no clock.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lfm2_mm.config import BackboneConfig
from lfm2_vision.config import ConnectorConfig, TowerConfig
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.tiling import plan

__all__ = ["SHAPES", "Shapes", "Work", "work", "write_checkpoint"]

_ATTENTION = (2, 5, 8, 10, 12, 14)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """All shapes of one vision-language model."""

    name: str
    backbone: BackboneConfig
    tower: TowerConfig
    connector: ConnectorConfig
    images: ImageConfig


_TEXT_350M = BackboneConfig(
    vocab_size=65536,
    hidden_size=1024,
    ffn_size=4608,
    layer_types=tuple("full_attention" if i in _ATTENTION else "conv" for i in range(16)),
    n_heads=16,
    n_kv_heads=8,
    head_dim=64,
    eos_ids=(7,),
)
_450M = Shapes(
    name="450m",
    backbone=_TEXT_350M,
    tower=TowerConfig(),
    connector=ConnectorConfig(hidden_size=2560, layer_norm=True),
    images=ImageConfig(),
)
SHAPES: Mapping[str, Shapes] = {
    shapes.name: shapes
    for shapes in (
        _450M,
        replace(
            _450M, name="450m-2.5", connector=ConnectorConfig(hidden_size=2048, layer_norm=False)
        ),
        Shapes(
            name="tiny",
            backbone=BackboneConfig(
                vocab_size=1024,
                hidden_size=64,
                ffn_size=96,
                layer_types=("conv", "full_attention", "conv"),
                n_heads=4,
                n_kv_heads=2,
                head_dim=16,
                max_positions=8192,
                eos_ids=(7,),
            ),
            tower=TowerConfig(hidden_size=32, ffn_size=64, n_layers=2, n_heads=2),
            connector=ConnectorConfig(hidden_size=48, layer_norm=True),
            images=ImageConfig(),
        ),
    )
}
"""`450m` is LFM2-VL-450M, `450m-2.5` LFM2.5-VL-450M; `tiny` tries the benchmark itself out."""


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic of a first token, in GFLOP (1e9 multiplications and additions).

    Attributes:
        vision: Tower over the patches that exist, and connector.
        prefill: Backbone over the positions of the image, and the head once.
        vision_padded: The same as `vision` when every view is padded to the longest a view can be.
        tokens: Positions that the image fills.
    """

    vision: float
    prefill: float
    vision_padded: float
    tokens: int

    @property
    def total(self) -> float:
        """What must be computed at least."""
        return self.vision + self.prefill


def work(shapes: Shapes, width: int, height: int) -> Work:
    """Count the arithmetic that an image of this size takes."""
    layout = plan(width, height, shapes.images)
    longest = max(
        shapes.images.max_image_tokens * shapes.images.downsample_factor**2,
        (shapes.images.tile_size // shapes.images.patch_size) ** 2,
    )
    connect = _connect(shapes, layout.n_tokens)
    return Work(
        vision=(sum(_tower(shapes.tower, view.n_patches) for view in layout.views) + connect) / 1e9,
        prefill=_prefill(shapes.backbone, layout.n_tokens) / 1e9,
        vision_padded=(layout.n_views * _tower(shapes.tower, longest) + connect) / 1e9,
        tokens=layout.n_tokens,
    )


def _tower(config: TowerConfig, patches: int) -> float:
    d = config.hidden_size
    layer = 2 * patches * (4 * d * d + 2 * d * config.ffn_size) + 4 * patches * patches * d
    return config.n_layers * layer + 2.0 * patches * config.patch_dim * d


def _connect(shapes: Shapes, tokens: int) -> float:
    folded = shapes.tower.hidden_size * shapes.connector.factor**2
    return 2.0 * tokens * shapes.connector.hidden_size * (folded + shapes.backbone.hidden_size)


def _prefill(config: BackboneConfig, tokens: int) -> float:
    d, e = config.hidden_size, config.head_dim
    attention = 2 * d * config.n_heads * e + 2 * d * config.n_kv_heads * e
    convolution = 4 * d * d + config.conv_taps * d
    weights = sum(
        (attention if kind == "full_attention" else convolution) + 3 * d * config.ffn_size
        for kind in config.layer_types
    )
    # causal: half of the square of scores, once for the scores and once for the values
    scores = len(config.attention_layers) * 2.0 * tokens * tokens * config.n_heads * e
    return 2.0 * tokens * weights + scores + 2.0 * config.vocab_size * d


def write_checkpoint(
    shapes: Shapes, folder: str | Path, *, quantize: str = "none", seed: int = 0
) -> None:
    """Write a checkpoint of random weights in the official layout, tokenizer included.

    The tokenizer is that of the scene world; the model has more rows than it has tokens, as
    released models have, too. What is not packed is bf16.

    Args:
        shapes: What to write.
        folder: A new or empty folder.
        quantize: A recipe whose packed weights are drawn as they are stored, or "none".
        seed: Names the weights.
    """
    import torch

    from lfm2_evals.bench.drawn import draw_module
    from lfm2_mm.quantize.recipes import recipe
    from lfm2_mm.saving import save_checkpoint
    from lfm2_vision.model import VisionLanguageModel, config_dict
    from lfm2_vision.scenes import build_tokenizer
    from lfm2_vision.scenes.text import SPECIAL_TOKENS

    with torch.device("meta"):
        model = VisionLanguageModel(shapes.tower, shapes.connector, shapes.backbone)
    generator = torch.Generator().manual_seed(seed)
    chosen = None if quantize == "none" else recipe(quantize)
    body, encoder = (None, None) if chosen is None else (chosen.backbone, chosen.encoder)
    state = {}
    for part, module in model.named_children():
        stored = "vision_tower.vision_model" if part == "vision_tower" else part
        schemes = body if part == "language_model" else encoder
        prefix = f"{part}."

        def fill(name: str, shape: tuple[int, ...], prefix: str = prefix) -> Any:
            return _random(prefix + name, shape, generator)

        for name, tensor in draw_module(module, schemes, generator, fill).items():
            state[f"model.{stored}.{name}"] = tensor
    config = config_dict(
        shapes.tower,
        shapes.connector,
        shapes.backbone,
        image_token_id=SPECIAL_TOKENS.index("<image>"),
        dtype="bfloat16",
    )
    generation = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}
    processor = {
        "image_processor": shapes.images.to_dict(),
        "processor_class": "Lfm2VlProcessor",
    }
    with tempfile.TemporaryDirectory() as scratch:
        build_tokenizer(scratch)
        files = {path.name: path.read_text("utf-8") for path in Path(scratch).iterdir()}
    save_checkpoint(
        folder,
        state,
        config,
        extra_files={
            **files,
            "generation_config.json": json.dumps(generation),
            "processor_config.json": json.dumps(processor, indent=2),
        },
    )


def _random(name: str, shape: tuple[int, ...], generator: Any) -> Any:
    """Values that keep activations near 1: norms about one, matrices by their width."""
    import torch

    values = torch.empty(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return values.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    std = 0.5 if "conv.weight" in name else 0.02 if "embed" in name else 0.7 * shape[-1] ** -0.5
    return values.normal_(0.0, std, generator=generator)
