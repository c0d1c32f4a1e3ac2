"""Disturbs log-mel features as a room, a microphone and a speaker would: tempo, size, noise, masks.

Works on features before they are normalised, so that sound needs to be analysed once only. Every
change is a pure function of its random stream. Knows no labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Augmentation", "augment"]

Features = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """How much may change.

    Attributes:
        tempo: Greatest relative change of speed.
        warp: Greatest relative shift of the mel axis, as by another length of the vocal tract.
        noise: Share of utterances with noise.
        snr: Least and greatest distance of the noise to the mean of the speech, in dB.
        tilt: Greatest change of level across the mel axis, in dB.
        time_masks: How many stretches are blanked.
        time_width: Longest of them, in frames.
        mel_masks: How many bands are blanked.
        mel_width: Widest of them, in mels.
    """

    tempo: float = 0.12
    warp: float = 0.06
    noise: float = 0.6
    snr: tuple[float, float] = (8.0, 40.0)
    tilt: float = 6.0
    time_masks: int = 1
    time_width: int = 8
    mel_masks: int = 2
    mel_width: int = 6


_NEPER = np.log(10.0) / 10.0  # dB of power in natural logarithms


def augment(
    mel: Features, rng: np.random.Generator, how: Augmentation, *, frames: int | None = None
) -> Features:
    """Natural-log power features `[t, m]`, disturbed.

    Masks hold the mean of the utterance in each band. Source of the masks: SpecAugment
    (arXiv 1904.08779).

    Args:
        mel: What was heard.
        rng: Where chance comes from.
        how: How much may change.
        frames: Length of the result, which decides the tempo; None for a tempo by chance.
    """
    drawn = 1 + rng.uniform(-how.tempo, how.tempo)
    mel = _resampled(mel, frames or max(9, round(len(mel) * drawn)))
    mel = _warped(mel, 1 + rng.uniform(-how.warp, how.warp))
    time, mels = mel.shape
    slope = np.linspace(-0.5, 0.5, mels, dtype=np.float32) * np.float32(_NEPER)
    mel = mel + slope * np.float32(rng.uniform(-how.tilt, how.tilt))
    if rng.random() < how.noise:
        mel = _noisy(mel, rng, rng.uniform(*how.snr))
    mean = mel.mean(axis=0)
    for _ in range(how.mel_masks):
        width = int(rng.integers(0, how.mel_width + 1))
        start = int(rng.integers(0, max(1, mels - width)))
        mel[:, start : start + width] = mean[start : start + width]
    for _ in range(how.time_masks):
        width = int(rng.integers(0, min(how.time_width, max(1, time // 6)) + 1))
        start = int(rng.integers(0, max(1, time - width)))
        mel[start : start + width] = mean
    return mel


def _resampled(mel: Features, frames: int) -> Features:
    """So many frames, by linear interpolation between those there are."""
    time = len(mel)
    at = np.linspace(0, time - 1, frames)
    low = np.minimum(at.astype(np.int64), max(0, time - 2))
    part = (at - low)[:, None].astype(np.float32)
    high = np.minimum(low + 1, time - 1)
    mixed: Features = mel[low] * (1 - part) + mel[high] * part
    return mixed


def _warped(mel: Features, factor: float) -> Features:
    """Bands moved by `factor` along the mel axis."""
    mels = mel.shape[1]
    at = np.clip(np.arange(mels) * factor, 0, mels - 1)
    low = np.minimum(at.astype(np.int64), mels - 2)
    part = (at - low).astype(np.float32)
    moved: Features = mel[:, low] * (1 - part) + mel[:, low + 1] * part
    return moved


def _noisy(mel: Features, rng: np.random.Generator, snr: float) -> Features:
    """Noise of a random colour on top: its power is added, and it flickers as noise does."""
    time, mels = mel.shape
    level = np.log(np.exp(mel).mean(axis=0).mean() + 1e-12) - snr * _NEPER
    knots = rng.uniform(-10, 10, 5) * _NEPER
    colour = np.interp(np.linspace(0, 4, mels), np.arange(5), knots)
    flicker = rng.gamma(2.0, 0.5, (time, mels)).astype(np.float32)
    noise = np.exp(level + colour).astype(np.float32) * flicker
    result: Features = np.log(np.exp(mel) + noise + np.float32(1e-9))
    return result
