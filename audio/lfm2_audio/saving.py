"""A speech model is written back in the official layout, its codec beside it.

Knows which part lies under which name; nothing of how the parts work together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lfm2_audio.checkpoint import official_state
from lfm2_mm.saving import save_checkpoint

__all__ = ["CODECS", "save_model"]

CODECS = ("audio_detokenizer", "audio_griffin_lim", "tokenizer-*.safetensors")
"""Glob patterns of the codecs that travel with a model."""


def save_model(
    folder: Path | str,
    *,
    backbone: nn.Module,
    parts: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    copy_from: Path | None = None,
) -> None:
    """Write what this package and the official code load.

    Tied copies, counters and the audio head that nothing reads are left out; the official code
    does not miss them.

    Args:
        folder: Where to write; missing, empty, or an older checkpoint.
        backbone: The text backbone.
        parts: Key of `lfm2_audio.checkpoint.RULES` -> the module with that part's weights.
        config: What becomes `config.json`; the official code refuses keys it does not know.
        copy_from: The checkpoint folder that tokenizer, template and codecs are taken from.

    Raises:
        InputError: if the folder holds something else.
        CheckpointError: if writing fails.
    """
    state = official_state(
        backbone.state_dict(), {name: part.state_dict() for name, part in parts.items()}
    )
    save_checkpoint(folder, state, config, copy_from=copy_from, beside=CODECS)
