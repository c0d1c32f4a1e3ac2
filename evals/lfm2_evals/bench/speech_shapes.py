"""Audio checkpoints of random weights at released shapes, and how many bytes their speech reads.

Speed does not depend on what weights say, so a benchmark needs shapes only: those of
LFM2.5-Audio-1.5B as liquid-audio 1.3.0 builds it. torch is imported when a checkpoint is written.
Knows no clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lfm2_audio.config import AudioConfig, ConformerConfig, DepthformerConfig, MelConfig
from lfm2_mm.config import BackboneConfig, LayerType

__all__ = ["SHAPES", "Reading", "SpeechShapes", "write_checkpoint"]

_ATTENTION = (2, 5, 8, 10, 12, 14)
_DRAWN = 1_000_003  # numbers of a weight that are drawn, again and again
_SLIDING: tuple[LayerType, ...] = ("conv", "conv", *(("full_attention", "conv") * 3))


@dataclass(frozen=True, kw_only=True)
class SpeechShapes:
    """All shapes of one audio model.

    Attributes:
        name: What the command line calls them.
        audio: The model.
        codec: Stack of the detokenizer.
    """

    name: str
    audio: AudioConfig
    codec: BackboneConfig


def _backbone(
    hidden: int, ffn: int, heads: int, kinds: tuple[LayerType, ...], vocabulary: int = 65536
) -> BackboneConfig:
    return BackboneConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        ffn_size=ffn,
        layer_types=kinds,
        n_heads=heads,
        n_kv_heads=8,
        head_dim=hidden // heads,
        max_positions=32768,
        eos_ids=(7,),
    )


SHAPES: Mapping[str, SpeechShapes] = {
    "1.5b": SpeechShapes(
        name="1.5b",
        audio=AudioConfig(
            preprocessor=MelConfig(),
            encoder=ConformerConfig(),
            backbone=_backbone(
                2048,
                8192,
                32,
                tuple("full_attention" if i in _ATTENTION else "conv" for i in range(16)),
            ),
            depthformer=DepthformerConfig(),
        ),
        codec=_backbone(512, 2304, 16, _SLIDING),
    ),
    "tiny": SpeechShapes(
        name="tiny",
        audio=AudioConfig(
            preprocessor=MelConfig(),
            encoder=ConformerConfig(
                hidden_size=32, ffn_size=128, n_layers=2, n_heads=4, channels=16
            ),
            backbone=_backbone(128, 192, 8, ("conv", "full_attention", "conv"), 2048),
            depthformer=DepthformerConfig(layers=2, dim=64),
        ),
        codec=_backbone(512, 192, 16, ("conv", "full_attention")),  # liquid-audio takes no other
    ),
}
"""`1.5b` is LFM2.5-Audio-1.5B; `tiny` tries the benchmark itself out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Bytes of weights that one step of each kind reads, as they lie in memory.

    Attributes:
        backbone: A step of the backbone.
        head: Choosing a text token.
        depth: One frame: the depthformer eight times, every codebook's classes once.
        codec: Turning a run of frames into sound.
    """

    backbone: int
    head: int
    depth: int
    codec: int

    def per_second(self, *, n_text: int, n_audio: int, frame_rate: float, run: int) -> float:
        """Bytes for one second of interleaved speech.

        Args:
            n_text: Text tokens of a round.
            n_audio: Frames of a round.
            frame_rate: Frames a second.
            run: Frames that the codec is given at a time.
        """
        text = frame_rate * n_text / n_audio
        steps = (frame_rate + text) * self.backbone + text * self.head
        return steps + frame_rate * self.depth + frame_rate / run * self.codec


def write_checkpoint(
    shapes: SpeechShapes, folder: str | Path, *, quantize: str = "none", seed: int = 0
) -> None:
    """Write a checkpoint of random weights in the official layout, with tokenizer and codec.

    The tokenizer is that of nano-audio; the model has more rows than it has tokens, as released
    models have, too. What is not packed is bf16.

    Args:
        shapes: What to write.
        folder: A new or empty folder.
        quantize: A recipe whose packed weights are drawn as they are stored, or "none".
        seed: Names the weights.
    """
    import torch

    from lfm2_audio.adapter import Adapter
    from lfm2_audio.checkpoint import (
        ADAPTER,
        AUDIO_EMBEDDING,
        CONFORMER,
        DEPTHFORMER,
        official_state,
    )
    from lfm2_audio.conformer import Conformer
    from lfm2_audio.depthformer import Depthformer
    from lfm2_audio.detokenizer import FOLDER, Detokenizer, DetokenizerConfig, DetokenizerNet
    from lfm2_audio.frames import FrameEmbedding
    from lfm2_audio.speech.tokenizer import tokenizer_files
    from lfm2_evals.bench.drawn import draw_module
    from lfm2_mm.backbone import Backbone
    from lfm2_mm.quantize.recipes import recipe
    from lfm2_mm.saving import save_checkpoint

    config = shapes.audio
    generator = torch.Generator().manual_seed(seed)
    chosen = None if quantize == "none" else recipe(quantize)
    body, encoder = (None, None) if chosen is None else (chosen.backbone, chosen.encoder)

    def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values: torch.Tensor = _filled(name, shape, generator)
        return values

    with torch.device("meta"):
        backbone = Backbone(config.backbone)
        width = config.encoder.hidden_size
        parts: dict[str, tuple[torch.nn.Module, Any]] = {
            CONFORMER: (Conformer(config.encoder), encoder),
            ADAPTER: (Adapter(width, config.backbone.hidden_size), encoder),
            AUDIO_EMBEDDING: (FrameEmbedding(config), None),
            DEPTHFORMER: (Depthformer(config), body),
        }
        codec = DetokenizerNet(DetokenizerConfig(backbone=shapes.codec, codebooks=config.codebooks))
    state = official_state(
        draw_module(backbone, body, generator, fill),
        {
            part: draw_module(module, schemes, generator, fill)
            for part, (module, schemes) in parts.items()
        },
    )
    generation = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}
    files = {**tokenizer_files(), "generation_config.json": json.dumps(generation)}
    save_checkpoint(folder, state, config.to_dict(), extra_files=files)
    values = {name: fill(name, tuple(empty.shape)) for name, empty in codec.state_dict().items()}
    values["istft.window"] = torch.hann_window(codec.config.n_fft)
    codec.load_state_dict(values, assign=True)
    Detokenizer(codec).save(Path(folder) / FOLDER)


def _filled(name: str, shape: tuple[int, ...], generator: Any) -> Any:
    """Values that keep activations near 1: norms about one, matrices by their width."""
    import torch

    if len(shape) < 2:
        scale = name.endswith(("norm.weight", "var")) or ("norm" in name and "weight" in name)
        return torch.full(shape, 1.0 if scale else 0.0, dtype=torch.bfloat16)
    count = prod(shape)
    std = 0.02 if "emb" in name else 0.7 * (count / shape[0]) ** -0.5
    some = torch.randn(min(count, _DRAWN), generator=generator).mul_(std).bfloat16()
    return some.repeat(-(-count // len(some)))[:count].view(shape)
