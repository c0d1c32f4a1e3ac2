"""Builds recordings of conversations for tests and benches: speech, silence, noise, coughs.

Everything is drawn from seeds, so that a script gives the same samples every time. Knows samples
at 16 kHz; nothing of loops.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from lfm2_audio.voice.vad import RATE

__all__ = ["Script", "cough", "noise"]


def noise(n: int, *, seed: int = 0, pink: bool = False) -> Float[np.ndarray, " n"]:
    """White noise, or pink (power falls as 1/f), of unit power."""
    white = np.random.default_rng(seed).standard_normal(n)
    if pink and n:
        spectrum = np.fft.rfft(white)
        spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
        white = np.fft.irfft(spectrum, n)
    power = float(np.sqrt(np.mean(white**2))) if n else 1.0
    return np.asarray(white / (power or 1.0), dtype=np.float32)


def cough(*, seed: int = 0, loudness: float = 0.3) -> Float[np.ndarray, " n"]:
    """Something like a cough: two bursts of noise through a throat's resonances, 0.35 s long."""
    n = RATE * 35 // 100
    spectrum = np.fft.rfft(noise(n, seed=seed))
    hertz = np.fft.rfftfreq(n, 1 / RATE)
    throat = sum(1 / (1 + ((hertz - f) / 250) ** 2) for f in (600, 1400, 2600))
    burst = np.fft.irfft(spectrum * throat, n)
    t = np.arange(n) / RATE
    shape = np.exp(-t / 0.05) + 0.5 * np.where(t > 0.18, np.exp(-(t - 0.18) / 0.04), 0)
    out = burst * shape
    return np.asarray(loudness * out / np.abs(out).max(), dtype=np.float32)


class Script:
    """A conversation's one side, piece by piece; every method returns the script itself."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._spoken: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """Samples so far."""
        return sum(map(len, self._pieces))

    @property
    def spoken(self) -> list[tuple[int, int]]:
        """First and last sample of everything that was spoken, in order."""
        return list(self._spoken)

    def say(self, speech: Float[np.ndarray, " n"]) -> Script:
        """Speech at 16 kHz."""
        self._spoken.append((len(self), len(self) + len(speech)))
        return self.sound(speech)

    def sound(self, samples: Float[np.ndarray, " n"]) -> Script:
        """Anything else."""
        self._pieces.append(np.asarray(samples, dtype=np.float32))
        return self

    def wait(self, seconds: float) -> Script:
        """Silence."""
        return self.sound(np.zeros(round(seconds * RATE), dtype=np.float32))

    def samples(
        self, *, snr_db: float | None = None, pink: bool = False, seed: int = 0
    ) -> Float[np.ndarray, " n"]:
        """All of it, fp32; with noise of so many decibels below the speech where asked for."""
        whole = np.concatenate([*self._pieces, np.zeros(0, dtype=np.float32)])
        if snr_db is None:
            return whole
        speech = [whole[start:end] for start, end in self._spoken]
        power = float(np.mean(np.square(np.concatenate(speech)))) if speech else 1e-3
        amplitude = float(np.sqrt(power / 10 ** (snr_db / 10)))
        return np.asarray(
            whole + amplitude * noise(len(whole), seed=seed, pink=pink), dtype=np.float32
        )
