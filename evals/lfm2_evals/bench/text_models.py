"""Text models of random weights at released shapes, written once in every form that is compared.

bf16 in the official layout, packed by us, and as GGUF files with the very same bits: 4 bits in
the body are beside 8 in the head on both sides. Speed does not depend on what weights say. Knows
no clock and no side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2_evals.bench.shapes import SHAPES
from lfm2_mm.config import BackboneConfig
from lfm2_mm.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BITS",
    "TEXT_SHAPES",
    "bytes_per_token",
    "weights_per_token",
    "write_forms",
    "write_random",
]

BITS: Mapping[str, float] = {"int4": 4.5, "int8": 8.5, "bf16": 16.0}
"""Bits of a weight of the body, scales included."""
_HEAD_BITS: Mapping[str, float] = {"int4": 8.5, "int8": 8.5, "bf16": 16.0}
_350M = replace(SHAPES["450m"].backbone, eos_ids=(), max_positions=8192)
_8B_ATTENTION = (2, 6, 10, 14, 18, 21)

TEXT_SHAPES: Mapping[str, BackboneConfig] = {
    "tiny": replace(SHAPES["tiny"].backbone, eos_ids=()),
    "350m": _350M,
    "1.2b": replace(_350M, hidden_size=2048, ffn_size=8192, n_heads=32),
    "8b-a1b": replace(
        _350M,
        hidden_size=2048,
        ffn_size=7168,
        n_heads=32,
        layer_types=tuple("full_attention" if i in _8B_ATTENTION else "conv" for i in range(24)),
        n_experts=32,
        n_experts_per_token=4,
        expert_size=1792,
        n_dense_layers=2,
    ),
}
"""Sources: the released configs of LFM2-350M, LFM2-1.2B and LFM2-8B-A1B; `tiny` tries it out."""


def weights_per_token(config: BackboneConfig) -> tuple[int, int]:
    """Weights of the body and of the head that one token is multiplied with."""
    d, e = config.hidden_size, config.head_dim
    body = 0
    for layer, kind in enumerate(config.layer_types):
        attends = kind == "full_attention"
        body += 2 * d * (config.n_heads + config.n_kv_heads) * e if attends else 4 * d * d
        if config.is_sparse(layer):
            body += 3 * d * config.expert_size * config.n_experts_per_token
        else:
            body += 3 * d * config.ffn_size
    return body, config.vocab_size * d


def bytes_per_token(config: BackboneConfig, form: str) -> float:
    """Bytes of weights that decoding one token reads at least."""
    body, head = weights_per_token(config)
    return (body * BITS[form] + head * _HEAD_BITS[form]) / 8


def write_forms(
    config: BackboneConfig,
    folder: Path,
    forms: tuple[str, ...],
    *,
    gguf: bool,
    told: Callable[[str], None] = lambda text: None,
) -> dict[str, Path]:
    """Write what is missing, and give the place of each form.

    Args:
        config: The shape.
        folder: Missing, empty, or what an earlier call wrote for this shape.
        forms: Some of `BITS`; bf16 is written in any case, since the others are made of it.
        gguf: Whether to write GGUF files, too.
        told: Told what is being written.

    Returns:
        `int4`, `int8`, `bf16` -> folders; the same with `.gguf` behind -> files.

    Raises:
        SettingError: if the folder holds something else.
    """
    import lfm2_mm

    note, wanted = folder / "shape.json", json.dumps(config.to_dict(), indent=1)
    if folder.exists() and any(folder.iterdir()) and not _says(note, wanted):
        raise SettingError(
            f"{str(folder)!r} holds something else than this benchmark's models; name an empty "
            "or a new folder with --models"
        )
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(wanted, "utf-8")
    places = {"bf16": folder / "bf16"}
    if not (places["bf16"] / "config.json").is_file():
        told("random weights")
        write_random(config, places["bf16"])
    for form in forms:
        places[form] = folder / form
        if not (places[form] / "config.json").is_file():
            told(f"packing {form}")
            lfm2_mm.load(places["bf16"], device="cpu", quantize=form).save(places[form])
        if gguf:
            places[f"{form}.gguf"] = folder / f"{form}.gguf"
            if not places[f"{form}.gguf"].is_file():
                told(f"GGUF {form}")
                _write_gguf(config, places["bf16"], places[f"{form}.gguf"], form)
    return places


def _says(path: Path, wanted: str) -> bool:
    try:
        return path.read_text("utf-8") == wanted
    except OSError:
        return False


def write_random(
    config: BackboneConfig,
    folder: Path,
    draw: Callable[[Sequence[int], float], Tensor] | None = None,
) -> None:
    """Write a text model of random bf16 weights, with the tokenizer of the scene world.

    Args:
        config: The shape; at least as many rows as that tokenizer has tokens.
        folder: A new or empty folder.
        draw: Gives numbers of a shape and a standard deviation; normal ones by default.
    """
    import tempfile

    import torch

    from lfm2_mm.backbone import Backbone
    from lfm2_mm.saving import official_names, save_checkpoint
    from lfm2_vision.scenes import build_tokenizer

    chance = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        empty = Backbone(config).state_dict()

    def normal(shape: Sequence[int], std: float) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(0.0, std, generator=chance)

    def fill(name: str, shape: Sequence[int]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.full(tuple(shape), 0.0 if "bias" in name else 1.0, dtype=torch.bfloat16)
        std = 0.5 if len(shape) == 3 else 0.02 if "embed" in name else 0.7 * shape[-1] ** -0.5
        return (draw or normal)(shape, std).bfloat16()

    with tempfile.TemporaryDirectory() as scratch:
        build_tokenizer(scratch)
        files = {path.name: path.read_text("utf-8") for path in Path(scratch).iterdir()}
    kind = "Lfm2MoeForCausalLM" if config.n_experts else "Lfm2ForCausalLM"
    state = {name: fill(name, tensor.shape) for name, tensor in empty.items()}
    save_checkpoint(
        folder,
        official_names(state, "text"),
        {**config.to_dict(), "architectures": [kind], "dtype": "bfloat16"},
        extra_files=files,
    )


def _write_gguf(config: BackboneConfig, source: Path, path: Path, form: str) -> None:
    from lfm2_evals.bench.gguf_writer import write_gguf
    from lfm2_mm.checkpoint import Checkpoint

    kinds = {"int4": ("Q4_0", "Q8_0"), "int8": ("Q8_0", "Q8_0"), "bf16": ("BF16", "BF16")}
    scratch = path.with_name(f".{path.name}.writing")
    write_gguf(Checkpoint.open(source), config, scratch, *kinds[form])
    scratch.rename(path)
