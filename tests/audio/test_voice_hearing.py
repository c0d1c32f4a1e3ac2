from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_audio.voice import hearing as module
from lfm2_audio.voice.hearing import Hearing
from lfm2_audio.voice.vad import WINDOW
from lfm2_mm.errors import InputError, MissingExtra


def ramp(n: int) -> np.ndarray:
    return np.linspace(-1, 1, n, dtype=np.float32) if n else np.zeros(0, dtype=np.float32)


@given(st.lists(st.integers(0, 3000), max_size=12))
def test_windows_are_the_same_for_every_chunking(cuts: list[int]) -> None:
    sound, hearing, at = ramp(sum(cuts)), Hearing(), 0
    windows: list[np.ndarray] = []
    for n in cuts:
        windows += hearing.take(sound[at : at + n], 16000)[0]
        at += n
    whole = len(sound) // WINDOW
    assert len(windows) == whole
    assert np.array_equal(np.concatenate([ramp(0), *windows]), sound[: whole * WINDOW])


@given(st.integers(0, 6000), st.integers(0, 6000), st.integers(0, 6000))
def test_pieces_are_found_until_they_are_forgotten(start: int, length: int, before: int) -> None:
    sound, hearing = ramp(4096), Hearing()
    hearing.take(sound, 16000)
    hearing.forget(min(before, start))
    assert np.array_equal(hearing.piece(start, start + length), sound[start : start + length])


def test_forgetting_frees_memory() -> None:
    hearing = Hearing()
    for i in range(100):
        hearing.take(ramp(WINDOW), 16000)
        hearing.forget(i * WINDOW)
        assert hearing.kept <= 2 * WINDOW


def test_other_rates_are_resampled_and_channels_mixed() -> None:
    t = np.arange(48000) / 48000
    tone = np.sin(2 * np.pi * 440 * t).astype(np.float32)
    hearing = Hearing()
    windows: list[np.ndarray] = []
    for at in range(0, 48000, 999):
        piece = np.stack([tone, np.zeros_like(tone)], axis=1)[at : at + 999]
        windows += hearing.take(piece, 48000)[0]
    out = np.concatenate(windows)
    assert 15000 < len(out) <= 16000
    spectrum = np.abs(np.fft.rfft(out[-8000:]))
    assert spectrum.argmax() == 220  # of 2 Hz each
    assert abs(np.abs(out[-8000:]).max() - 0.5) < 0.01


def test_integers_are_of_full_scale() -> None:
    (window,), _ = Hearing().take(np.full(WINDOW, -32768, dtype=np.int16), 16000)
    assert np.all(window == -1)


def test_loudness() -> None:
    hearing = Hearing()
    hearing.take(np.full(WINDOW, 0.1, dtype=np.float32), 16000)
    assert abs(hearing.level + 20) < 1e-3


def test_what_is_no_number_is_silence_and_said_once() -> None:
    hearing = Hearing()
    sound = np.full(2 * WINDOW, 0.5, dtype=np.float32)
    sound[[3, 700]] = [np.nan, np.inf]
    windows, said = hearing.take(sound, 16000)
    assert said == (
        "2 of 1024 samples heard are no numbers (NaN or infinite) and count as silence; check the "
        "microphone or the program that sends them"
    )
    assert windows[0][3] == windows[1][700 - WINDOW] == 0
    assert hearing.take(sound, 16000)[1] == ""
    assert hearing.take(np.zeros(0, dtype=np.float32), 16000)[1] == ""
    assert hearing.take(np.zeros(9, dtype=np.float32), 16000)[1] == ""
    assert hearing.take(sound, 16000)[1] != ""


@pytest.mark.parametrize(
    ("frames", "rate", "said"),
    [
        (np.zeros((2, 2, 2)), 16000, r"shape \(2, 2, 2\) and type float64; give \[n\] or \[n, "),
        (np.array(["a"]), 16000, "type <U1; give"),
        (np.zeros(9), 0, "the frames have 0 Hz; give a rate from 1000 to 384000"),
        (np.zeros(9), 16000.5, "the frames have 16000.5 Hz; give a rate"),
    ],
)
def test_what_is_no_sound_is_refused(frames: Any, rate: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Hearing().take(frames, rate)


def test_the_rate_must_not_change() -> None:
    hearing = Hearing()
    hearing.take(ramp(9), 24000)
    with pytest.raises(InputError, match="have 16000 Hz, those before had 24000 Hz; keep one rate"):
        hearing.take(ramp(9), 16000)


def test_without_soxr_16_khz_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(module, "import_module", missing)
    assert len(Hearing().take(ramp(WINDOW), 16000)[0]) == 1
    with pytest.raises(MissingExtra, match=r"have 24000 Hz, and soxr, .*'lfm2-mm\[audio\]'"):
        Hearing().take(ramp(WINDOW), 24000)
