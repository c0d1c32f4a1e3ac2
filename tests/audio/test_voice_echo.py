from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_audio.voice.echo import EchoGate, EchoSettings
from lfm2_audio.voice.script import noise
from lfm2_audio.voice.vad import WINDOW
from lfm2_mm.errors import SettingError


def speechlike(n: int, seed: int) -> np.ndarray:
    """Noise whose loudness changes four times a second, as a voice's does."""
    t = np.arange(n) / 16000
    return np.asarray(noise(n, seed=seed) * (0.03 + 0.1 * np.sin(2 * np.pi * 2 * t) ** 2), "f4")


def talk(
    gate: EchoGate, played: np.ndarray, heard: np.ndarray, start: int = 0
) -> list[tuple[int, bool]]:
    """Window by window: what is played goes out, what is heard comes in."""
    out = []
    for at in range(0, len(played) - WINDOW + 1, WINDOW):
        gate.played(played[at : at + WINDOW], start + at)
        out.append((at, gate.passes(heard[at : at + WINDOW], start + at)))
    return out


def test_without_a_gate_everything_passes() -> None:
    played = speechlike(20 * WINDOW, 1)
    assert all(passes for _, passes in talk(EchoGate(), played, played))


def test_half_duplex_hears_nothing_while_it_speaks_and_everything_after() -> None:
    gate = EchoGate(EchoSettings(mode="half", delay_ms=100))
    sound = speechlike(20 * WINDOW, 1)
    assert not any(passes for _, passes in talk(gate, sound, sound))
    quiet = np.zeros_like(sound)
    later = talk(gate, quiet, sound, start=len(sound))
    opened = [at for at, passes in later if passes]
    assert 1600 - WINDOW <= opened[0] <= 1600 + 2 * WINDOW


@given(st.integers(0, 100), st.floats(-40, 6), st.integers(0, 4000))
def test_echo_alone_never_passes(seed: int, echo_db: float, delay: int) -> None:
    gate = EchoGate(EchoSettings(mode="gate"))
    played = speechlike(8 * 16000, seed)
    echo = 10 ** (echo_db / 20) * np.concatenate([np.zeros(delay, "f4"), played])[: len(played)]
    assert not any(passes for _, passes in talk(gate, played, echo.astype("f4")))
    assert gate.warm


def test_a_voice_over_the_echo_passes_once_the_echo_is_known() -> None:
    gate = EchoGate(EchoSettings(mode="gate"))
    played = speechlike(8 * 16000, 1)
    voice = np.zeros_like(played)
    voice[5 * 16000 :] = 3 * speechlike(3 * 16000, 2)
    passed = [at for at, passes in talk(gate, played, 0.2 * played + voice) if passes]
    assert passed and min(passed) >= 5 * 16000 - WINDOW
    assert len(passed) > 0.6 * 3 * 16000 / WINDOW
    assert -25 < gate.coupling_db < 5


def test_during_the_warm_up_nothing_passes() -> None:
    gate = EchoGate(EchoSettings(mode="gate", warmup_ms=3000))
    played = speechlike(2 * 16000, 1)
    assert not any(passes for _, passes in talk(gate, played, 10 * speechlike(len(played), 2)))
    assert not gate.warm


def test_without_a_warm_up_the_echo_is_guessed() -> None:
    gate = EchoGate(EchoSettings(mode="gate", warmup_ms=0, start_db=-6))
    played = np.full(WINDOW, 0.1, dtype=np.float32)
    gate.played(played, 0)
    assert not gate.passes(played, 0)
    assert gate.passes(4 * played, 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mode": "loud"}, "the echo mode is 'loud'; it must be off, gate or half"),
        ({"delay_ms": -1}, "warmup_ms is 3000 and delay_ms -1; neither may be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        EchoSettings(**wrong)
