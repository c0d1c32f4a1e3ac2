"""Is this speech? A probability for each window of 32 ms, and the spans of speech in a recording.

silero-vad runs from the file inside its package, on onnxruntime alone; where either is missing, an
energy detector of our own stands in. Knows samples at 16 kHz; nothing of turns, devices or models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float

from lfm2_mm.errors import MissingExtra, SettingError

__all__ = [
    "RATE",
    "WINDOW",
    "EnergyVad",
    "SileroVad",
    "Span",
    "Vad",
    "open_vad",
    "probabilities",
    "spans",
    "speech_spans",
]

RATE = 16000
"""Samples in a second of everything a detector hears."""

WINDOW = 512
"""Samples in one window, 32 ms: the only length that silero-vad takes at this rate."""

_CONTEXT = 64  # samples of the window before that silero-vad wants in front of each
_BAND = slice(4, 129)  # bins of a window's spectrum, 125 Hz to 4 kHz
_FLAT = 0.3  # spectral flatness from which a window is hiss: white noise has about 0.5


class Vad(Protocol):
    """A voice activity detector that is fed window by window.

    Attributes:
        name: What is at work, for a person.
    """

    name: str

    def __call__(self, window: Float[np.ndarray, " w"]) -> float:
        """How likely the next `WINDOW` samples, fp32 within -1 and 1, hold speech: 0 to 1."""
        ...

    def reset(self) -> None:
        """Forget what was heard."""
        ...


class SileroVad:
    """The detector of the package silero-vad (MIT), run by onnxruntime on one thread.

    Input and output of the network, as its file declares them: `[1, 64 + 512]` samples, the first
    64 from the window before, a state `[2, 1, 128]` and the rate; a probability and the next state.

    Raises:
        MissingExtra: if silero-vad or onnxruntime is not installed.
    """

    name = "silero-vad"

    def __init__(self) -> None:
        spec = find_spec("silero_vad")  # importing it would import torch, and look for torchaudio
        if spec is None or spec.origin is None or find_spec("onnxruntime") is None:
            raise MissingExtra(
                "silero-vad or onnxruntime is not installed; run pip install 'lfm2-mm[audio]'"
            )
        onnxruntime = import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            str(Path(spec.origin).parent / "data" / "silero_vad.onnx"),
            sess_options=options,
            providers=["CPUExecutionProvider"],
        )
        self._rate = np.array(RATE, dtype=np.int64)
        self._input = np.zeros((1, _CONTEXT + WINDOW), dtype=np.float32)
        self._state: Any = np.zeros((2, 1, 128), dtype=np.float32)

    def __call__(self, window: Float[np.ndarray, " w"]) -> float:
        """See `Vad`."""
        self._input[0, :_CONTEXT] = self._input[0, -_CONTEXT:].copy()
        self._input[0, _CONTEXT:] = window
        feed = {"input": self._input, "state": self._state, "sr": self._rate}
        out, self._state = self._session.run(None, feed)
        return float(out[0, 0])

    def reset(self) -> None:
        """See `Vad`."""
        self._input = np.zeros_like(self._input)
        self._state = np.zeros((2, 1, 128), dtype=np.float32)


class EnergyVad:
    """Speech is what is louder than the quietest of late, and not spread evenly like noise.

    Coarser than a network: music and slamming doors count as speech. The floor follows quiet
    windows at once and rises slowly; spectral flatness (Johnston 1988: the geometric over the
    arithmetic mean of the power spectrum) tells hiss from voices.

    Args:
        margin: Decibels above the floor at which speech is as likely as not.
        quietest: Level in dBFS below which nothing is speech.
    """

    name = "energy"

    def __init__(self, *, margin: float = 8.0, quietest: float = -52.0) -> None:
        self._margin, self._quietest = margin, quietest
        self._floor: float | None = None
        self._taper = np.hanning(WINDOW).astype(np.float32)
        # by Parseval a full-scale square wave has 0 dBFS
        self._scale = WINDOW * float(np.square(self._taper).sum()) / 2

    def __call__(self, window: Float[np.ndarray, " w"]) -> float:
        """See `Vad`."""
        power = np.abs(np.fft.rfft(window * self._taper)[_BAND]).astype(np.float64) ** 2 + 1e-10
        level = 10 * float(np.log10(power.sum() / self._scale))
        flatness = float(np.exp(np.mean(np.log(power))) / np.mean(power))
        if self._floor is None:
            self._floor = level
        # up by 3 dB a second, or a long vowel would become the floor; hiss moves it at once
        rise = 0.1 if flatness < _FLAT else 1.0
        self._floor = min(level, self._floor + rise) if level < self._floor + 40 else self._floor
        self._floor = max(self._floor, self._quietest - self._margin)
        if flatness > _FLAT:
            return 0.0
        return 1 / (1 + float(np.exp(-(level - self._floor - self._margin) / 2)))

    def reset(self) -> None:
        """See `Vad`."""
        self._floor = None


def open_vad(kind: Literal["auto", "silero", "energy"] = "auto") -> Vad:
    """A detector: silero-vad, or with `auto` the energy detector where that is not installed.

    Raises:
        MissingExtra: if silero is asked for by name and is not installed.
        SettingError: if there is no such kind.
    """
    if kind not in ("auto", "silero", "energy"):
        raise SettingError(f"vad is {kind!r}; it must be auto, silero or energy")
    if kind == "energy":
        return EnergyVad()
    try:
        return SileroVad()
    except MissingExtra:
        if kind == "silero":
            raise
        return EnergyVad()


@dataclass(frozen=True, slots=True)
class Span:
    """Samples `start` to `end` (exclusive) of a recording, in which somebody speaks."""

    start: int
    end: int


def probabilities(samples: Float[np.ndarray, " n"], vad: Vad | None = None) -> list[float]:
    """One probability for each window of a recording at 16 kHz, the last one padded with zeros."""
    vad = vad or open_vad()
    vad.reset()
    found = []
    for at in range(0, len(samples), WINDOW):
        window = np.zeros(WINDOW, dtype=np.float32)
        piece = samples[at : at + WINDOW]
        window[: len(piece)] = piece
        found.append(vad(window))
    return found


def speech_spans(
    samples: Float[np.ndarray, " n"],
    *,
    threshold: float = 0.5,
    release: float = 0.35,
    min_speech_ms: int = 250,
    min_silence_ms: int = 100,
    pad_ms: int = 30,
    vad: Vad | None = None,
) -> list[Span]:
    """Where somebody speaks in a recording at 16 kHz.

    The defaults are silero-vad's own.

    Args:
        samples: Mono, fp32 within -1 and 1.
        threshold: Probability from which speech begins.
        release: Probability below which it may end.
        min_speech_ms: Shorter bursts are no speech.
        min_silence_ms: Shorter pauses do not end it.
        pad_ms: Added on each side; neighbours never overlap.
        vad: The detector; silero-vad where installed by default.
    """
    found = spans(
        probabilities(samples, vad),
        threshold=threshold,
        release=release,
        min_speech=min_speech_ms * RATE // 1000,
        min_silence=min_silence_ms * RATE // 1000,
    )
    pad, total = pad_ms * RATE // 1000, len(samples)
    out: list[Span] = []
    for i, span in enumerate(found):
        before = found[i - 1].end if i else 0
        after = found[i + 1].start if i + 1 < len(found) else total
        start = max(span.start - pad, (before + span.start) // 2 if i else 0)
        end = min(span.end + pad, (span.end + after) // 2 if i + 1 < len(found) else total)
        out.append(Span(start, end))
    return out


def spans(
    chances: Iterable[float],
    *,
    threshold: float = 0.5,
    release: float = 0.35,
    min_speech: int = 4000,
    min_silence: int = 1600,
) -> list[Span]:
    """Windows' probabilities become spans of samples, with hysteresis; lengths in samples."""
    found: list[Span] = []
    start, quiet, at = -1, -1, 0
    for chance in chances:
        if chance >= threshold:
            start, quiet = (at if start < 0 else start), -1
        elif start >= 0 and chance < release and quiet < 0:
            quiet = at
        at += WINDOW
        if start >= 0 and quiet >= 0 and at - quiet >= min_silence:
            found.append(Span(start, quiet))
            start = quiet = -1
    if start >= 0:
        found.append(Span(start, quiet if quiet >= 0 else at))
    return [span for span in found if span.end - span.start >= min_speech]
