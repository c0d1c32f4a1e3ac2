from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_audio.voice import vad as module
from lfm2_audio.voice.script import Script, noise
from lfm2_audio.voice.vad import (
    RATE,
    WINDOW,
    EnergyVad,
    SileroVad,
    Span,
    open_vad,
    probabilities,
    spans,
    speech_spans,
)
from lfm2_mm.errors import MissingExtra, SettingError
from tests.audio.voice_fakes import clip


def test_silero_runs_without_torchaudio_and_its_own_package() -> None:
    code = (
        "import sys, numpy as np\n"
        "from lfm2_audio.voice.vad import SileroVad\n"
        "assert 0 <= SileroVad()(np.zeros(512, dtype=np.float32)) < 0.1\n"
        "print(sorted({'torchaudio', 'silero_vad'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["question", "second", "short"])
@pytest.mark.parametrize("kind", ["silero", "energy"])
def test_speech_is_found_where_it_is(name: str, kind: Any) -> None:
    speech = clip(name)
    (found,) = speech_spans(
        Script().wait(1).say(speech).wait(1).samples(), min_silence_ms=400, vad=open_vad(kind)
    )
    assert abs(found.start - RATE) < 0.1 * RATE
    assert abs(found.end - RATE - len(speech)) < 0.3 * RATE


@pytest.mark.parametrize("kind", ["silero", "energy"])
@pytest.mark.parametrize("pink", [False, True])
@pytest.mark.parametrize("level", [0.003, 0.03, 0.1])
def test_noise_is_no_speech(kind: Any, pink: bool, level: float) -> None:
    hiss = level * noise(5 * RATE, seed=3, pink=pink)
    onset = np.concatenate([np.zeros(RATE, dtype=np.float32), hiss])  # it may also begin suddenly
    assert speech_spans(hiss, vad=open_vad(kind)) == []
    assert speech_spans(onset, vad=open_vad(kind)) == []


def test_silero_hears_speech_through_noise() -> None:
    script = Script().wait(1).say(clip("question")).wait(1)
    (found,) = speech_spans(script.samples(snr_db=10), min_silence_ms=400)
    assert abs(found.start - RATE) < 0.1 * RATE


def test_a_detector_forgets() -> None:
    for kind in (SileroVad(), EnergyVad()):
        first = probabilities(clip("short"), kind)
        assert probabilities(clip("short"), kind) == first


def test_one_probability_for_each_window_begun() -> None:
    for n in (0, 1, WINDOW, WINDOW + 1):
        assert len(probabilities(np.zeros(n, dtype=np.float32), EnergyVad())) == -(-n // WINDOW)


def test_without_silero_loudness_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert open_vad().name == "energy"
    with pytest.raises(MissingExtra, match=r"run pip install 'lfm2-mm\[audio\]'"):
        open_vad("silero")


def test_an_unknown_detector_is_refused() -> None:
    kind: Any = "webrtc"
    with pytest.raises(SettingError, match="vad is 'webrtc'; it must be auto, silero or energy"):
        open_vad(kind)


chances = st.lists(st.floats(0, 1), max_size=60)


@given(chances)
def test_spans_are_ordered_long_enough_and_apart(given: list[float]) -> None:
    found = spans(given, min_speech=2 * WINDOW, min_silence=3 * WINDOW)
    for span in found:
        assert span.end - span.start >= 2 * WINDOW
        assert given[span.start // WINDOW] >= 0.5
    for one, other in zip(found, found[1:], strict=False):
        assert other.start - one.end >= 3 * WINDOW


@given(chances)
def test_spans_hold_every_loud_window_if_nothing_is_too_short(given: list[float]) -> None:
    found = spans(given, min_speech=0, min_silence=WINDOW)
    for i, chance in enumerate(given):
        at = i * WINDOW
        if chance >= 0.5:
            assert any(span.start <= at < span.end for span in found)


def test_between_the_thresholds_nothing_changes() -> None:
    assert spans([0.4, 0.6, 0.4, 0.4, 0.1, 0.4, 0.4, 0.4], min_speech=0, min_silence=512) == [
        Span(WINDOW, 4 * WINDOW)
    ]
    assert spans([0.4] * 9, min_speech=0) == []


def test_padding_never_lets_neighbours_overlap() -> None:
    script = Script().wait(0.1).say(clip("short")).wait(0.5).say(clip("short"))
    found = speech_spans(script.samples(), pad_ms=5000)
    assert len(found) == 2
    assert found[0].start == 0
    assert found[0].end == found[1].start
    assert found[1].end == len(script)
