"""Text to sound with the program espeak-ng, for training and evaluation data only.

The program (GPL-3.0-or-later) is called, never linked or shipped. Knows nothing of sentences or
features.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from lfm2_audio.speech.voices import Voice
from lfm2_mm.errors import MissingExtra

__all__ = ["PROGRAM", "RATE", "phonemes", "synthesise"]

PROGRAM = "espeak-ng"
RATE = 16_000
"""Samples per second of what comes back."""


def synthesise(text: str, voice: Voice, *, rate: int = RATE) -> NDArray[np.float32]:
    """Speak a text; mono samples within ±1, the silence at both ends kept.

    Args:
        text: Plain words.
        voice: Who speaks.
        rate: Samples per second of the result.

    Raises:
        MissingExtra: if espeak-ng or soxr is not installed.
    """
    call = [PROGRAM, "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "--stdout"]
    return resampled(*parse_wave(_run(call, text)), rate)


def phonemes(word: str, accent: str = "en-us") -> list[str]:
    """The sounds of a word, in order, without stress.

    Raises:
        MissingExtra: if espeak-ng is not installed.
    """
    made = _run([PROGRAM, "-q", "-v", accent, "--ipa", "--sep=_"], word).decode()
    return [sound for part in made.replace("\n", "_").split("_") if (sound := part.strip(" ˈˌ"))]


def _run(call: list[str], text: str) -> bytes:
    if shutil.which(PROGRAM) is None:
        raise MissingExtra(
            f"speech for training is made by the program {PROGRAM}, which is not installed; "
            f"install it, as with apt-get install {PROGRAM}"
        )
    # the text on standard input, so that none is read as an option
    return subprocess.run(call, input=text.encode(), capture_output=True, check=True).stdout


def parse_wave(data: bytes) -> tuple[NDArray[np.float32], int]:
    """Samples and rate of 16-bit mono RIFF data as espeak-ng writes it: no length in its header."""
    rate: int = struct.unpack_from("<I", data, 24)[0]
    start = data.index(b"data") + 8
    whole = (len(data) - start) // 2 * 2
    samples: NDArray[np.float32] = np.frombuffer(data[start : start + whole], "<i2").astype(
        np.float32
    )
    samples /= 32768
    return samples, rate


def resampled(samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """At another rate."""
    if rate == wanted:
        return samples
    try:
        soxr = import_module("soxr")
    except ImportError:
        raise MissingExtra(
            "the package soxr is needed to resample speech and is not installed; "
            "run pip install 'lfm2-mm[audio]'"
        ) from None
    result: NDArray[np.float32] = soxr.resample(samples, rate, wanted, quality="HQ")
    return result
