"""The audio frontend: claims LFM2-Audio checkpoints and puts the parts of the model together.

Everything the core needs to know of speech passes through here; the parts themselves (features,
encoder, depthformer, codecs, heads) are modules of their own.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lfm2_audio.config import AudioConfig, is_audio
from lfm2_mm.errors import CheckpointError, SettingError

if TYPE_CHECKING:
    from torch import nn

    from lfm2_audio.codec import Codec
    from lfm2_audio.model import AudioModel
    from lfm2_mm.checkpoint import Checkpoint
    from lfm2_mm.loading import LoadOptions
    from lfm2_mm.quantize.recipes import Schemes

__all__ = ["AudioFrontend", "frontend", "open_codec"]

_CODECS = ("auto", "detokenizer", "mimi")


class AudioFrontend:
    """Builds LFM2-Audio and LFM2.5-Audio models."""

    name = "audio"
    options = frozenset({"codec", "max_seconds"})

    def claims(self, checkpoint: Checkpoint) -> bool:
        """Whether the `config.json` is an LFM2-Audio's; the released ones have no model_type."""
        return is_audio(checkpoint.config)

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> AudioModel:
        """Build backbone, encoder and depthformer; the codec is opened when it is first needed.

        Raises:
            CheckpointError: if files are missing, damaged or do not fit together.
            SettingError: if an option has an unusable value.
        """
        import torch

        from lfm2_audio.adapter import Adapter
        from lfm2_audio.checkpoint import (
            ADAPTER,
            AUDIO_EMBEDDING,
            CONFORMER,
            DEPTHFORMER,
            LFM_RULES,
            check_names,
            part_tensors,
        )
        from lfm2_audio.conformer import Conformer
        from lfm2_audio.depthformer import Depthformer
        from lfm2_audio.encoder import AudioEncoder
        from lfm2_audio.frames import FrameEmbedding
        from lfm2_audio.model import AudioModel
        from lfm2_audio.waveform import MAX_SECONDS
        from lfm2_mm.loading import build_backbone
        from lfm2_mm.tokenizer import Tokenizer
        from lfm2_mm.weights import load_weights

        which = options.extra.get("codec") or "auto"
        if which not in _CODECS:
            raise SettingError(f"the codec is {which!r}; use one of {', '.join(_CODECS)}")
        check_names(checkpoint)
        config = AudioConfig.from_dict(checkpoint.config)
        backbone, head = build_backbone(checkpoint, options, rules=LFM_RULES)

        with torch.device("meta"):
            conformer = Conformer(config.encoder)
            adapter = Adapter(config.encoder.hidden_size, config.backbone.hidden_size)
            frames = FrameEmbedding(config)
            depthformer = Depthformer(config)
        parts: dict[str, tuple[str, nn.Module, Schemes | None]] = {
            CONFORMER: ("conformer", conformer, options.encoder_schemes),
            ADAPTER: ("adapter", adapter, options.encoder_schemes),
            AUDIO_EMBEDDING: ("audio embedding", frames, None),
            DEPTHFORMER: ("depthformer", depthformer, options.backbone_schemes),
        }
        for part, (noun, module, schemes) in parts.items():
            load_weights(
                module.eval(),
                part_tensors(checkpoint, part, tied=config.depthformer.tie),
                dtype=options.dtype,
                device=options.device,
                where=f"the {noun} of {checkpoint.name}",
                quantize=schemes,
            )
        tokenizer = Tokenizer.load(checkpoint.folder)
        encoder = AudioEncoder(
            conformer,
            adapter,
            config.preprocessor,
            token_id=tokenizer.pad_id or 0,
            identity=f"{checkpoint.folder}:{checkpoint.nbytes}:{options.dtype}",
            max_seconds=options.extra.get("max_seconds") or MAX_SECONDS,
        )
        return AudioModel.assemble(
            checkpoint,
            backbone,
            head,
            tokenizer,
            config=config,
            encoder=encoder,
            frames=frames,
            depthformer=depthformer,
            parts={part: module for part, (_, module, _) in parts.items()},
            open_codec=partial(open_codec, checkpoint, config, which, options.device),
        )


def open_codec(checkpoint: Checkpoint, config: AudioConfig, which: str, device: Any) -> Codec:
    """What turns codes into sound: the detokenizer of LFM2.5 where there is one, else Mimi.

    A model of this project without either has its own, which needs no network.

    Args:
        checkpoint: Where they lie.
        config: How many codebooks there are.
        which: "auto", "detokenizer" or "mimi".
        device: Where it runs.

    Raises:
        CheckpointError: if the checkpoint does not hold it, or it cannot be used.
    """
    from lfm2_audio import griffin_lim
    from lfm2_audio.detokenizer import FOLDER, Detokenizer
    from lfm2_audio.mimi import PATTERN, Mimi

    folder = checkpoint.folder
    codec: Codec
    if which != "mimi" and (folder / FOLDER).is_dir():
        codec = Detokenizer.load(folder, device=device)
    elif which != "detokenizer" and any(folder.glob(PATTERN)):
        codec = Mimi.load(folder, codebooks=config.codebooks, device=device)
    elif which == "auto" and (folder / griffin_lim.FOLDER).is_dir():
        codec = griffin_lim.GriffinLim.load(folder)
    else:
        wanted = {"detokenizer": f"folder {FOLDER}", "mimi": f"file {PATTERN}"}
        lacks = wanted.get(which, " and no ".join(wanted.values()))
        raise CheckpointError(
            f"{checkpoint.name} has no {lacks}, so its speech cannot be made audible; download the "
            "whole checkpoint"
        )
    if codec.codebooks != config.codebooks:
        raise CheckpointError(
            f"the codec of {checkpoint.name} has {codec.codebooks} codebooks, its model "
            f"{config.codebooks}; the files belong to different checkpoints"
        )
    return codec


frontend = AudioFrontend()
