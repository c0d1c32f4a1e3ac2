"""The codec of LFM2.5-Audio: a small LFM2 turns frames of codes into spectra, those into samples.

Reads and writes the official `audio_detokenizer/` folder. Knows nothing of the model that makes
the codes; the backbone is the core's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lfm2_audio.istft import inverse_stft
from lfm2_audio.sliding import Windowed
from lfm2_audio.streaming import DetokenizerStream
from lfm2_mm.backbone import Backbone
from lfm2_mm.checkpoint import Checkpoint
from lfm2_mm.config import BackboneConfig
from lfm2_mm.errors import CheckpointError
from lfm2_mm.mixing import Mixing
from lfm2_mm.saving import save_checkpoint
from lfm2_mm.weights import load_weights

__all__ = ["ENTRIES", "FOLDER", "Detokenizer", "DetokenizerConfig", "DetokenizerNet"]

FOLDER = "audio_detokenizer"
"""Where a checkpoint keeps it."""

ENTRIES = 2048
"""Codes of one codebook; the config of a checkpoint does not say it."""

_RATE, _UPSAMPLING = 24_000, 6
_DEAD = "lfm.embed_tokens."  # stored in every official file, used by nothing
_SLIDING = "sliding_attention"
_OWN = ("sliding_window", "output_size")  # keys that the backbone does not know


@dataclass(frozen=True, kw_only=True, slots=True)
class DetokenizerConfig:
    """Shapes of one detokenizer.

    Attributes:
        backbone: The stack; its `full_attention` layers look back over `window` rows only.
        window: Rows of spectrum that attention sees.
        codebooks: Codes of one frame.
        n_fft: Samples of one transform and its window; rows lie a quarter of it apart.
    """

    backbone: BackboneConfig
    window: int = 30
    codebooks: int = 8
    n_fft: int = 1280

    @property
    def hop(self) -> int:
        """Samples from one row of spectrum to the next."""
        return self.n_fft // 4

    @property
    def output_size(self) -> int:
        """Width of a row of spectrum: magnitudes and phases."""
        return self.n_fft + 2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, codebooks: int = 8) -> DetokenizerConfig:
        """Read `audio_detokenizer/config.json`.

        Its `intermediate_size` (3328) is wider than the weights (2304): the 2/3 rule of the
        backbone's own config holds here too, unless `block_auto_adjust_ff_dim` is false.

        Args:
            config: The file as a dict.
            codebooks: The file does not say it.

        Raises:
            CheckpointError: if a value makes no sense.
            UnsupportedArchitecture: if the stack is no LFM2.
        """
        kinds = config.get("layer_types")
        known = [
            "full_attention" if kind == _SLIDING else kind
            for kind in (kinds if isinstance(kinds, list | tuple) else ())
        ]
        rest = {key: value for key, value in config.items() if key not in _OWN}
        backbone = BackboneConfig.from_dict({**rest, "layer_types": known or kinds})
        try:
            window = int(config.get("sliding_window") or 30)
            width = int(config.get("output_size") or 1282)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the config of the detokenizer holds a value of the wrong kind ({error}); "
                "download the checkpoint again"
            ) from error
        if window < 1 or width < 10 or (width - 2) % 8:
            raise CheckpointError(
                f"the config of the detokenizer gives sliding_window {window} and output_size "
                f"{width}; the first must be at least 1, the second two more than a multiple of 8"
            )
        return cls(backbone=backbone, window=window, codebooks=codebooks, n_fft=width - 2)

    def to_dict(self) -> dict[str, Any]:
        """The official form."""
        raw = self.backbone.to_dict()
        kinds = [_SLIDING if kind == "full_attention" else kind for kind in raw["layer_types"]]
        return raw | {
            "layer_types": kinds,
            "sliding_window": self.window,
            "output_size": self.output_size,
        }


class _CodeEmbedding(nn.Module):
    """One table for all codebooks, behind each other."""

    def __init__(self, config: DetokenizerConfig) -> None:
        super().__init__()
        self.emb = nn.Embedding(config.codebooks * ENTRIES, config.backbone.hidden_size)


class _Window(nn.Module):
    window: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(size))


class DetokenizerNet(nn.Module):
    """Codes in, rows of spectrum out; parameter names equal those of the official file."""

    def __init__(self, config: DetokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.emb = _CodeEmbedding(config)
        self.lfm = Backbone(replace(config.backbone, vocab_size=1))
        del self.lfm.embed_tokens
        self.lin = nn.Linear(config.backbone.hidden_size, config.output_size)
        self.istft = _Window(config.n_fft)

    def embed(self, codes: Int[Tensor, "*t k"]) -> Float[Tensor, "*n d"]:
        """Mean of the codes' embeddings, each frame repeated six times: `n = 6 t`."""
        offsets = torch.arange(self.config.codebooks, device=codes.device) * ENTRIES
        frames: Tensor = self.emb.emb(codes + offsets).mean(dim=-2)
        return frames.repeat_interleave(_UPSAMPLING, dim=-2)

    def spectrum(self, x: Float[Tensor, "*n d"], mixing: Mixing) -> Float[Tensor, "*n w"]:
        """Log magnitudes and phases of rows that `embed` made."""
        rows: Tensor = self.lin(self.lfm(x, mixing))
        return rows

    def forward(self, codes: Int[Tensor, "b t k"]) -> Float[Tensor, "b m"]:
        """Samples of complete utterances of one length; differentiable."""
        x = self.embed(codes)
        mixing = Windowed(x.shape[0], x.shape[1], self.config.window, device=x.device)
        return inverse_stft(self.spectrum(x, mixing), self.istft.window, self.config.hop)


class Detokenizer:
    """The codec of LFM2.5-Audio; see `lfm2_audio.codec.Codec`.

    1920 samples of 24 kHz per frame, each of which depends on the 17 frames before it at most.
    """

    rate, entries = _RATE, ENTRIES

    def __init__(self, net: DetokenizerNet) -> None:
        self.net = net.eval()
        self.codebooks = net.config.codebooks
        self.samples_per_frame = _UPSAMPLING * net.config.hop

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Detokenizer:
        """Read an `audio_detokenizer/` folder, or a checkpoint's folder that holds one.

        Raises:
            ModelNotFound: if there is no such folder.
            CheckpointError: if its config cannot be used.
            TensorMismatch: if tensors are missing, unknown or of another shape; names them.
        """
        folder = Path(folder)
        if (folder / FOLDER).is_dir():
            folder = folder / FOLDER
        checkpoint = Checkpoint.open(folder)
        names = [name for name in checkpoint.names if not name.startswith(_DEAD)]
        rows = checkpoint.shape("emb.emb.weight")[0]
        if rows % ENTRIES or not rows:
            raise CheckpointError(
                f"the codebooks of {checkpoint.name} have {rows} entries in all, which is no "
                f"multiple of {ENTRIES}; download the checkpoint again"
            )
        config = DetokenizerConfig.from_dict(checkpoint.config, codebooks=rows // ENTRIES)
        with torch.device("meta"):
            net = DetokenizerNet(config)
        tensors = {name: checkpoint.tensor(name) for name in names}
        load_weights(
            net,
            tensors,
            dtype=dtype,
            device=device,
            where=checkpoint.name,
            keep_dtype=("istft.window",),
        )
        return cls(net)

    def save(self, folder: Path | str) -> None:
        """Write the official layout; the dead token embedding, which it needs, as one row.

        Raises:
            InputError, CheckpointError: see `lfm2_mm.saving.save_checkpoint`.
        """
        backbone = replace(self.net.config.backbone, vocab_size=1, bos_id=0, eos_ids=(0,), pad_id=0)
        config = replace(self.net.config, backbone=backbone)
        width = config.backbone.hidden_size
        dead = {_DEAD + "weight": torch.zeros(1, width, dtype=self.net.lin.weight.dtype)}
        save_checkpoint(folder, {**self.net.state_dict(), **dead}, config.to_dict())

    def decode(self, codes: Int[Tensor, "t k"]) -> Float[Tensor, " n"]:
        """See `Codec.decode`; in steps, so that memory does not grow with the square of time."""
        stream = self.stream()
        return torch.cat([stream.push(codes), stream.flush()])

    def stream(self) -> DetokenizerStream:
        """See `Codec.stream`; the first 480 samples after the last frame pushed are held back."""
        return DetokenizerStream(self.net, self.entries)
