"""What makes a checkpoint folder a packed one: an entry in its `config.json`, and part names.

Weights lie in safetensors as always; a packed one is several tensors, `NAME.codes`, `NAME.scales`
and so on, in a layout that no processor prefers, so that a folder can be carried elsewhere. The
entry stands under `quantization_config`, where other libraries look for what they cannot read.
Knows configs; no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lfm2_mm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ENTRY",
    "GGUF_RECIPE",
    "METHOD",
    "VERSION",
    "config_entry",
    "has_four_bits",
    "packed_as",
]

ENTRY, METHOD, VERSION = "quantization_config", "lfm2_mm", 1
GGUF_RECIPE = "gguf"
"""What a GGUF file with quantised weights says of how it was packed."""


def config_entry(recipe: str) -> dict[str, Any]:
    """What `config.json` of a packed checkpoint says under `quantization_config`."""
    return {"quant_method": METHOD, "version": VERSION, "recipe": recipe}


def has_four_bits(state: Mapping[str, Tensor]) -> bool:
    """Whether any packed weight of a state has two codes in a byte.

    Those have 16 bytes of codes for each scale, or 64; of 8 bits there are 32, or a whole row.
    """
    for name, codes in state.items():
        scales = state.get(name.removesuffix("codes") + "scales")
        if not name.endswith(".weight.codes") or scales is None:
            continue
        per_scale = codes.shape[1] // max(scales.shape[1], 1)
        if per_scale == 16 or (per_scale == 64 and scales.shape[1] > 1):
            return True
    return False


def packed_as(config: Mapping[str, Any], where: str) -> str | None:
    """The recipe by which a checkpoint was packed; None where it is an ordinary one.

    Raises:
        CheckpointError: if another library packed it, or another version of this one.
    """
    entry = config.get(ENTRY)
    if entry is None:
        return None
    method = entry.get("quant_method") if isinstance(entry, Mapping) else entry
    if not isinstance(entry, Mapping) or method != METHOD:
        raise CheckpointError(
            f"the weights of {where} are quantised by {method!r}, which is not read here; use the "
            "checkpoint they were made of and quantize='int4' or 'int8'"
        )
    if entry.get("version") != VERSION:
        raise CheckpointError(
            f"{where} is packed in format version {entry.get('version')!r}, but this release reads "
            f"version {VERSION}; pack the original anew with `lfm2-mm quantize`"
        )
    return str(entry.get("recipe"))
