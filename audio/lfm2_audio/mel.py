"""Waveforms to log-mel features, as NVIDIA NeMo computes them and LFM2-Audio was trained on.

Source of the steps: `AudioToMelSpectrogramPreprocessor` of NeMo, and `librosa.filters.mel` for the
filters. Knows neither files nor models; samples come at the config's rate.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lfm2_audio.config import MelConfig

__all__ = ["MelFrontend", "mel_filters", "n_frames"]

_FLOOR = 2.0**-24  # added to powers, so that silence has a logarithm
_EPS = 1e-5  # added to standard deviations
_LINEAR_HZ = 200 / 3  # width of a mel below 1 kHz in Slaney's scale
_BREAK_HZ, _LOG_STEP = 1000.0, math.log(6.4) / 27  # and its growth above


def n_frames(n_samples: int, config: MelConfig) -> int:
    """Frames that the features of a recording have: one more than carry speech.

    The transform gives `samples // hop + 1` frames; the last lies over the end and is zero. The
    reference hands it to the encoder all the same, and greedy tokens differ without it.
    """
    return n_samples // config.hop + 1


def mel_filters(config: MelConfig) -> Float[Tensor, "m f"]:
    """Triangular filters on Slaney's mel scale, each of the same area; fp32.

    Source: M. Slaney, Auditory Toolbox (1998), as in `librosa.filters.mel(norm="slaney")`.
    """
    top = _hz_to_mel(config.rate / 2)
    edges = _mel_to_hz(torch.linspace(0, top, config.n_mels + 2, dtype=torch.float64))
    bins = torch.linspace(0, config.rate / 2, config.n_fft // 2 + 1, dtype=torch.float64)
    low, peak, high = (part[:, None] for part in (edges[:-2], edges[1:-1], edges[2:]))
    rising, falling = (bins - low) / (peak - low), (high - bins) / (high - peak)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)).float()


class MelFrontend:
    """Samples to features normalised per mel over the whole recording.

    The normalisation needs the end of the recording, so features cannot be streamed.

    Args:
        config: Sizes and rate.
        device: Where the filters live; samples must be there too.
    """

    def __init__(self, config: MelConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        window = torch.hann_window(config.window, periodic=False, dtype=torch.float32)
        self.window = window.to(device)
        self.filters = mel_filters(config).to(device)

    def __call__(self, samples: Float[Tensor, " n"]) -> Float[Tensor, "m t"]:
        """Features of one recording, `n_frames` of them, in fp32; the last is zero."""
        return self.batch(samples[None], torch.tensor([len(samples)]))[0][0]

    def batch(
        self, samples: Float[Tensor, "b n"], lengths: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b m t"], Int[Tensor, " b"]]:
        """Features of recordings of several lengths; each as if it were alone.

        Args:
            samples: Recordings, padded at the end with anything.
            lengths: How many samples of each are real.

        Returns:
            The features, zero from each recording's last frame on, and how many frames carry
            speech: `lengths // hop`, which is what training uses. Inference uses one more.
        """
        lengths = lengths.to(samples.device)
        counts = lengths // self.config.hop
        return _normalised(self.unnormalised(samples, lengths), counts), counts

    def unnormalised(
        self, samples: Float[Tensor, "b n"], lengths: Int[Tensor, " b"]
    ) -> Float[Tensor, "b m t"]:
        """Logarithms of the mel powers, as `batch` normalises them; for training."""
        config = self.config
        place = torch.arange(samples.shape[1], device=samples.device)
        first, rest = samples[:, :1], samples[:, 1:] - config.preemphasis * samples[:, :-1]
        sharp = torch.cat([first, rest], 1).float() * (place < lengths[:, None])
        spectrum = torch.stft(
            F.pad(sharp, (config.n_fft // 2, config.n_fft // 2)),
            config.n_fft,
            hop_length=config.hop,
            win_length=config.window,
            window=self.window,
            center=False,
            return_complex=True,
        )
        power = torch.view_as_real(spectrum).square().sum(-1)
        return torch.log(self.filters @ power + _FLOOR)


def _normalised(x: Float[Tensor, "b m t"], counts: Int[Tensor, " b"]) -> Float[Tensor, "b m t"]:
    """Mean 0 and deviation 1 per mel over the frames that count; the others become zero."""
    real = (torch.arange(x.shape[-1], device=x.device) < counts[:, None])[:, None]
    n = counts[:, None, None]
    mean = torch.where(real, x, 0.0).sum(-1, keepdim=True) / n.clamp(min=1)
    centred = torch.where(real, x - mean, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (n - 1).clamp(min=1)
    return centred / (variance.sqrt() + _EPS)


def _hz_to_mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz / _LINEAR_HZ
    return _BREAK_HZ / _LINEAR_HZ + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _mel_to_hz(mel: Tensor) -> Tensor:
    start = _BREAK_HZ / _LINEAR_HZ
    high = _BREAK_HZ * torch.exp(_LOG_STEP * (mel - start))
    return torch.where(mel < start, mel * _LINEAR_HZ, high)
