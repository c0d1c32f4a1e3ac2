"""Drawn documents of given lengths in tokens, and a retriever of random weights to encode them.

Speed does not depend on what words and weights say. torch is imported when a checkpoint is
written. Knows no clock and no side.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lfm2_evals.bench.shapes import SHAPES
from lfm2_mm.config import BackboneConfig
from lfm2_mm.errors import SettingError

__all__ = ["BACKBONES", "LONGEST", "SHORTEST", "draw", "write_retriever"]

SHORTEST, LONGEST = 8, 512
"""Tokens of documents of mixed lengths."""
BACKBONES: Mapping[str, BackboneConfig] = {
    name: replace(SHAPES[shapes].backbone, max_positions=2048)
    for name, shapes in (("350m", "450m"), ("tiny", "tiny"))
}
"""`350m` is LFM2-ColBERT-350M (LFM2-VL-450M has the same backbone); `tiny` tries it all out."""
_DIM = 128


def draw(name: str, documents: int, *, seed: int = 0) -> tuple[list[str], list[int]]:
    """Documents of a set, and the tokens of each, begin token and prefix included."""
    chance = random.Random(f"{name} {seed}")
    if name == "mixed":
        drawn = (int(chance.lognormvariate(4.3, 0.9)) for _ in range(documents))
        lengths = [max(SHORTEST, min(LONGEST, length)) for length in drawn]
    else:
        lengths = [int(name)] * documents
    words = _words()
    return [" ".join(chance.choices(words, k=length - 2)) for length in lengths], lengths


def _words() -> list[str]:
    """Made-up words of 2 to 8 letters; each is one token."""
    chance = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    drawn = ("".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(200))
    return sorted(set(drawn))


def write_retriever(
    config: BackboneConfig, folder: Path, *, quantize: str = "none", seed: int = 0
) -> None:
    """Write a causal late-interaction retriever of random weights in PyLate's layout.

    An earlier one of the same config is left as it is.

    Args:
        config: The backbone.
        folder: Missing, empty, or what an earlier call wrote.
        quantize: A recipe whose packed weights are drawn as they are stored, or "none": bf16.
        seed: Names the weights.

    Raises:
        SettingError: if the folder holds something else.
        CheckpointError: if writing fails.
    """
    import torch

    from lfm2_evals.bench.drawn import draw_module
    from lfm2_mm.backbone import Backbone
    from lfm2_mm.quantize.files import config_entry
    from lfm2_mm.quantize.recipes import recipe
    from lfm2_mm.saving import save_checkpoint
    from lfm2_retrieval.corpus.tokenizer import tokenizer_files, train_tokenizer
    from lfm2_retrieval.layout import DenseSpec, RetrieverSpec
    from lfm2_retrieval.saving import side_files

    wanted = {**config.to_dict(), "architectures": ["Lfm2Model"], "dtype": "bfloat16"}
    schemes = None if quantize == "none" else recipe(quantize).backbone
    if schemes is not None:
        wanted["quantization_config"] = config_entry(quantize)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        try:
            found = json.loads((folder / "config.json").read_text("utf-8"))
        except (OSError, ValueError):
            found = None
        if found != wanted:
            raise SettingError(
                f"{str(folder)!r} holds something else than this benchmark's checkpoint; name an "
                "empty or a new folder with --checkpoint"
            )
        return
    chance = torch.Generator().manual_seed(seed)

    def fill(name: str, shape: Sequence[int]) -> torch.Tensor:
        values = torch.empty(*shape, dtype=torch.bfloat16)
        if len(shape) == 1:
            return values.fill_(1.0)
        std = 0.5 if len(shape) == 3 else 0.02 if "embed" in name else 0.7 * shape[-1] ** -0.5
        return values.normal_(0.0, std, generator=chance)

    with torch.device("meta"):
        backbone = Backbone(config)
    dense = DenseSpec(folder="1_Dense", in_features=config.hidden_size, out_features=_DIM)
    head = {"linear.weight": fill("head", (_DIM, config.hidden_size))}
    spec = RetrieverSpec(dense=(dense,), document_length=LONGEST)
    save_checkpoint(
        folder,
        draw_module(backbone, schemes, chance, fill),
        wanted,
        extra_files={
            **tokenizer_files(train_tokenizer(_words(), 1024)),
            **side_files(spec, [head], hidden=config.hidden_size),
        },
    )
