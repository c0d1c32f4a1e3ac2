"""What a microphone or socket brings becomes windows of 32 ms at 16 kHz, and is kept for a while.

Takes any chunk size, rate and number of channels; what is no number becomes silence. Knows nothing
of speech.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from lfm2_audio.voice.vad import RATE, WINDOW
from lfm2_audio.waveform import Audio
from lfm2_mm.errors import InputError, MissingExtra

__all__ = ["Hearing", "as_audio"]

_RATES = (1_000, 384_000)


def as_audio(heard: Float[np.ndarray, " n"]) -> Audio:
    """Samples at 16 kHz as what a conversation holds."""
    return Audio(torch.from_numpy(np.ascontiguousarray(heard, dtype=np.float32)), RATE)


class Hearing:
    """A buffer of what was heard lately.

    Attributes:
        level: Loudness of the last window, in dBFS.
    """

    def __init__(self) -> None:
        self.level = -100.0
        self._rate: int | None = None
        self._resampler: Any = None
        self._rest = np.zeros(0, dtype=np.float32)  # less than a window
        self._kept: list[np.ndarray] = []
        self._base = 0  # sample at which the kept windows begin
        self._broken = False

    @property
    def kept(self) -> int:
        """Samples that are kept."""
        return len(self._kept) * WINDOW

    def take(self, frames: np.ndarray, rate: int) -> tuple[list[np.ndarray], str]:
        """The windows that are complete now, and a sentence if the frames are newly broken.

        Raises:
            InputError: if this is no sound, or the rate changed.
        """
        mono, sentence = self._mono(frames), ""
        if self._rate is None:
            self._open(rate)
        elif rate != self._rate:
            raise InputError(
                f"the frames have {rate} Hz, those before had {self._rate} Hz; keep one rate"
            )
        sound = np.isfinite(mono)
        if not sound.all():
            n, mono = int((~sound).sum()), np.where(sound, mono, 0).astype(np.float32)
            if not self._broken:
                sentence = (
                    f"{n} of {len(mono)} samples heard are no numbers (NaN or infinite) and count "
                    "as silence; check the microphone or the program that sends them"
                )
        self._broken = not sound.all() if len(mono) else self._broken
        if self._resampler is not None and len(mono):
            mono = np.asarray(self._resampler.resample_chunk(mono), dtype=np.float32)
        heard = np.concatenate([self._rest, mono])
        whole = len(heard) // WINDOW * WINDOW
        windows = [heard[at : at + WINDOW] for at in range(0, whole, WINDOW)]
        self._rest = heard[whole:]
        self._kept += windows
        if windows:
            power = float(np.mean(np.square(windows[-1], dtype=np.float64)))
            self.level = 10 * float(np.log10(power + 1e-10))
        return windows, sentence

    def piece(self, start: int, end: int) -> Float[np.ndarray, " n"]:
        """The samples from `start` to `end`, counted from the first ever heard."""
        first = max(0, (start - self._base) // WINDOW)
        last = (end - self._base + WINDOW - 1) // WINDOW
        found = self._kept[first:last]
        if not found:
            return np.zeros(0, dtype=np.float32)
        begin = self._base + first * WINDOW
        whole = np.concatenate(found)
        return whole[max(0, start - begin) : max(0, end - begin)].copy()

    def forget(self, before: int) -> None:
        """Let go of what was heard before this sample."""
        n = min(len(self._kept), max(0, (before - self._base) // WINDOW))
        if n:
            del self._kept[:n]
            self._base += n * WINDOW

    def _open(self, rate: int) -> None:
        if not isinstance(rate, int) or not _RATES[0] <= rate <= _RATES[1]:
            raise InputError(
                f"the frames have {rate} Hz; give a rate from {_RATES[0]} to {_RATES[1]}"
            )
        if rate != RATE:
            try:
                soxr = import_module("soxr")
            except ImportError:
                raise MissingExtra(
                    f"the frames have {rate} Hz, and soxr, which would resample them, is not "
                    "installed; run pip install 'lfm2-mm[audio]'"
                ) from None
            self._resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="MQ")
        self._rate = rate

    @staticmethod
    def _mono(frames: np.ndarray) -> np.ndarray:
        array = np.asarray(frames)
        if array.ndim not in (1, 2) or array.dtype.kind not in "fi":
            raise InputError(
                f"the frames are an array of shape {array.shape} and type {array.dtype}; give "
                "[n] or [n, channels] of floats within -1 and 1, or of 16-bit integers"
            )
        if array.dtype.kind == "i":
            array = array.astype(np.float32) / float(np.iinfo(array.dtype).max + 1)
        if array.ndim == 2:
            array = array.mean(axis=1) if array.shape[1] else array.reshape(-1)
        return np.ascontiguousarray(array, dtype=np.float32)
