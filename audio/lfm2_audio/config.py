"""`config.json` of an LFM2-Audio checkpoint: mel front end, conformer, backbone, depthformer.

Reads every size from the file and writes the official form; knows nothing of torch or weights, and
nothing of the codecs, whose configs lie in files of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfm2_mm.config import BackboneConfig
from lfm2_mm.errors import CheckpointError, UnsupportedArchitecture

__all__ = [
    "ARCHITECTURE",
    "AUDIO_VOCAB",
    "END_OF_AUDIO",
    "MODEL_TYPE",
    "AudioConfig",
    "ConformerConfig",
    "DepthformerConfig",
    "MelConfig",
    "is_audio",
]

ARCHITECTURE, MODEL_TYPE = "Lfm2AudioForConditionalGeneration", "lfm2_audio"

END_OF_AUDIO = 2048
"""The code that ends speech; the config of a checkpoint does not say it."""

AUDIO_VOCAB = END_OF_AUDIO + 1
"""Classes of one codebook: its codes and the end."""


def is_audio(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is an LFM2-Audio's; the released files have no `model_type`."""
    return config.get("model_type") == MODEL_TYPE or ARCHITECTURE in (
        config.get("architectures") or ()
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MelConfig:
    """Waveform to log-mel features, as NVIDIA NeMo computes them.

    Attributes:
        window: Samples of the (not periodic) Hann window.
        hop: Samples from one frame to the next.
        preemphasis: The files do not say it; every released model was trained with 0.97.
    """

    rate: int = 16000
    n_mels: int = 128
    n_fft: int = 512
    window: int = 400
    hop: int = 160
    preemphasis: float = 0.97

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MelConfig:
        """Read the `preprocessor` section.

        Raises:
            CheckpointError: if it asks for features that this front end does not compute.
        """
        for key, known in _MEL_RULES.items():
            if (said := raw.get(key, known)) != known:
                raise CheckpointError(
                    f"the preprocessor asks for {key} {said!r}, but this front end computes only "
                    f"{known!r}; use an LFM2-Audio checkpoint"
                )
        rate = int(raw.get("sample_rate", 16000))
        return cls(
            rate=rate,
            n_mels=int(raw.get("features", 128)),
            n_fft=int(raw.get("n_fft") or 512),
            window=_samples(raw.get("window_size", 0.025), rate),
            hop=_samples(raw.get("window_stride", 0.01), rate),
        )

    def to_dict(self) -> dict[str, Any]:
        """The official `preprocessor` section."""
        return {
            "sample_rate": self.rate,
            "normalize": "per_feature",
            "window_size": self.window / self.rate,
            "window_stride": self.hop / self.rate,
            "window": "hann",
            "features": self.n_mels,
            "n_fft": self.n_fft,
            "log": True,
            "frame_splicing": 1,
            "dither": 1e-05,
            "pad_to": 0,
            "pad_value": 0.0,
        }


def _samples(seconds: float, rate: int) -> int:
    """Whole samples in a time, rounded down, but never by an error of the product."""
    return int(seconds * rate + 1e-6)


# What the official front end could do and no LFM2-Audio asks for.
_MEL_RULES = {
    "normalize": "per_feature",
    "window": "hann",
    "log": True,
    "frame_splicing": 1,
    "pad_to": 0,
    "pad_value": 0.0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConformerConfig:
    """Shapes of the FastConformer encoder.

    Attributes:
        channels: Width of the convolutions that shorten the features.
        factor: How many mel frames become one row.
        kernel: Taps of the depthwise convolution in each layer.
    """

    n_mels: int = 128
    hidden_size: int = 512
    ffn_size: int = 2048
    n_layers: int = 17
    n_heads: int = 8
    kernel: int = 9
    channels: int = 256
    factor: int = 8

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ConformerConfig:
        """Read the `encoder` section.

        Raises:
            CheckpointError: if it asks for a conformer of another kind, or makes no sense.
        """
        for key, known in _CONFORMER_RULES.items():
            if (said := raw.get(key, known)) != known:
                raise CheckpointError(
                    f"the encoder config asks for {key} {said!r}, but this encoder computes only "
                    f"{known!r}; use an LFM2-Audio checkpoint"
                )
        width = int(raw.get("d_model", 512))
        built = cls(
            n_mels=int(raw.get("feat_in", 128)),
            hidden_size=width,
            ffn_size=width * int(raw.get("ff_expansion_factor", 4)),
            n_layers=int(raw.get("n_layers", 17)),
            n_heads=int(raw.get("n_heads", 8)),
            kernel=int(raw.get("conv_kernel_size", 9)),
            channels=_channels(raw, width),
            factor=int(raw.get("subsampling_factor", 8)),
        )
        built._check()
        return built

    def to_dict(self) -> dict[str, Any]:
        """The official `encoder` section."""
        return {
            "feat_in": self.n_mels,
            "feat_out": -1,
            "n_layers": self.n_layers,
            "d_model": self.hidden_size,
            "subsampling_factor": self.factor,
            "subsampling_conv_channels": self.channels,
            "ff_expansion_factor": self.ffn_size // self.hidden_size,
            "n_heads": self.n_heads,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": self.kernel,
            "dropout": 0.1,
            "dropout_pre_encoder": 0.1,
            "dropout_emb": 0.0,
            "dropout_att": 0.1,
            **_CONFORMER_RULES,
        }

    def _check(self) -> None:
        if min(self.n_mels, self.hidden_size, self.n_layers, self.n_heads, self.channels) < 1:
            raise CheckpointError(
                f"the encoder config gives the sizes {self}; every one must be at least 1"
            )
        if self.hidden_size % self.n_heads or self.hidden_size % 2:
            raise CheckpointError(
                f"the encoder config gives width {self.hidden_size} over {self.n_heads} heads; "
                "the width must be even and a multiple of the heads"
            )
        if self.kernel % 2 == 0:
            raise CheckpointError(
                f"the encoder config gives conv_kernel_size {self.kernel}; it must be odd"
            )
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise CheckpointError(
                f"the encoder config gives subsampling_factor {self.factor}; it must be a power "
                "of two"
            )


# What NeMo's conformer could be and no LFM2-Audio is.
_CONFORMER_RULES: dict[str, Any] = {
    "subsampling": "dw_striding",
    "causal_downsampling": False,
    "reduction": None,
    "reduction_position": None,
    "reduction_factor": 1,
    "self_attention_model": "rel_pos",
    "att_context_size": [-1, -1],
    "xscaling": False,
    "untie_biases": True,
    "conv_norm_type": "batch_norm",
    "conv_context_size": None,
}


def _channels(raw: Mapping[str, Any], width: int) -> int:
    """Convolution channels; as in NeMo -1 stands for the width of the model."""
    channels = int(raw.get("subsampling_conv_channels", 256))
    return width if channels == -1 else channels


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthformerConfig:
    """Shapes of the depthformer, as far as the file says them.

    Attributes:
        tie: Whether each codebook's embedding is also its output matrix.
    """

    layers: int = 6
    dim: int = 1024
    tie: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DepthformerConfig:
        """Read the `depthformer` section."""
        return cls(
            layers=int(raw.get("layers", 6)),
            dim=int(raw.get("dim", 1024)),
            tie=bool(raw.get("tie", True)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The official `depthformer` section."""
        return {"layers": self.layers, "dim": self.dim, "tie": self.tie}


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig:
    """One LFM2-Audio model.

    Attributes:
        codebooks: Codes in one frame of speech.
        interleaved_n_text: Text tokens in one round of an interleaved answer.
        interleaved_n_audio: Frames of speech in one round.
        tie_audio_embeddings: Whether the (unused) audio head shares the audio embedding.
        audio_vocab: Classes of one codebook, the end of speech included.
    """

    preprocessor: MelConfig
    encoder: ConformerConfig
    backbone: BackboneConfig
    depthformer: DepthformerConfig
    codebooks: int = 8
    interleaved_n_text: int = 6
    interleaved_n_audio: int = 12
    tie_audio_embeddings: bool = False
    audio_vocab: int = AUDIO_VOCAB

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AudioConfig:
        """Read a whole `config.json`.

        Source: `LFM2AudioConfig` of liquid-audio 1.3.0. `model_type` and the training-time values
        may be missing or null.

        Raises:
            UnsupportedArchitecture: if it is no LFM2-Audio's.
            CheckpointError: if a section is missing or a value makes no sense.
        """
        if not is_audio(config):
            raise UnsupportedArchitecture(
                f"the config names the architectures {config.get('architectures')!r}, not "
                f"{ARCHITECTURE}; use an LFM2-Audio checkpoint"
            )
        for name in ("preprocessor", "encoder", "lfm", "depthformer"):
            if not isinstance(config.get(name), Mapping):
                raise CheckpointError(
                    f"the config of an LFM2-Audio has no section {name!r}; download the "
                    "checkpoint again"
                )
        try:
            built = cls(
                preprocessor=MelConfig.from_dict(config["preprocessor"]),
                encoder=ConformerConfig.from_dict(config["encoder"]),
                # the text head of an LFM2-Audio is always its embedding
                backbone=BackboneConfig.from_dict(
                    {"lfm": config["lfm"], "tie_word_embeddings": True}
                ),
                depthformer=DepthformerConfig.from_dict(config["depthformer"]),
                codebooks=int(config.get("codebooks", 8)),
                interleaved_n_text=int(config.get("interleaved_n_text", 6)),
                interleaved_n_audio=int(config.get("interleaved_n_audio", 12)),
                tie_audio_embeddings=bool(config.get("tie_audio_embeddings", False)),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"the config holds a value of the wrong kind ({error}); "
                "download the checkpoint again"
            ) from error
        built._check()
        return built

    def to_dict(self) -> dict[str, Any]:
        """The official form; what `LFM2AudioConfig` of liquid-audio reads."""
        return {
            "architectures": [ARCHITECTURE],
            "codebooks": self.codebooks,
            "tie_audio_embeddings": self.tie_audio_embeddings,
            "semantic_codebook_factor": 100,
            "codebook_weight": "log",
            "interleaved_n_text": self.interleaved_n_text,
            "interleaved_n_audio": self.interleaved_n_audio,
            "preprocessor": self.preprocessor.to_dict(),
            "encoder": self.encoder.to_dict(),
            "lfm": self.backbone.to_dict(),
            "depthformer": self.depthformer.to_dict(),
        }

    def _check(self) -> None:
        for name in ("codebooks", "interleaved_n_text", "interleaved_n_audio"):
            if getattr(self, name) < 1:
                raise CheckpointError(
                    f"the config gives {name} = {getattr(self, name)}; it must be at least 1"
                )
        if self.depthformer.layers < 1 or self.depthformer.dim < 1:
            raise CheckpointError(
                f"the config gives a depthformer of {self.depthformer.layers} layers and width "
                f"{self.depthformer.dim}; both must be at least 1"
            )
        if self.encoder.n_mels != self.preprocessor.n_mels:
            raise CheckpointError(
                f"the config computes {self.preprocessor.n_mels} mel features, but its encoder "
                f"takes {self.encoder.n_mels}; use the config.json of one checkpoint"
            )
