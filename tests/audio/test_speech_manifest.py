"""Lists of utterances and the folder that keeps their sound."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lfm2_audio.speech import synthesis
from lfm2_audio.speech.manifest import (
    EVAL_SETS,
    Recordings,
    evaluation,
    record,
    training,
    trimmed,
)
from lfm2_audio.speech.sentences import is_held_out, lexicon
from lfm2_audio.speech.synthesis import parse_wave, resampled, synthesise
from lfm2_audio.speech.voices import ASSISTANT, HELD_OUT_VARIANTS, TRAIN_VARIANTS, Voice
from lfm2_mm.errors import MissingExtra


def tone(text: str, voice: Voice) -> NDArray[np.float32]:
    """Stands in for a speaker: a tone as long as the text, silence around it."""
    n = 400 * len(text)
    beat = np.sin(np.arange(n) * 0.2 * (1 + voice.pitch / 100)).astype(np.float32)
    silence = np.zeros(3000, np.float32)
    return np.concatenate([silence, 0.5 * beat, silence])


def test_training_holds_every_word_and_no_held_out_sentence() -> None:
    made = training(1200)
    words = [one for one in made if one.kind == "word"]
    assert len(words) == 300
    assert {one.text for one in words} == set(lexicon())
    assert not any(is_held_out(one.text) for one in made if one.kind != "word")
    assert {one.voice.variant for one in made} <= set(TRAIN_VARIANTS)


@pytest.mark.parametrize("name", EVAL_SETS)
def test_the_held_out_sets(name: str) -> None:
    made = evaluation(name, 60)
    sentences, voices = EVAL_SETS[name]
    assert len({one.text for one in made}) == 60
    assert {is_held_out(one.text) for one in made} == {sentences == "held_out"}
    allowed = HELD_OUT_VARIANTS if voices == "held_out" else TRAIN_VARIANTS
    assert {one.voice.variant for one in made} <= set(allowed)
    assert made[:20] == evaluation(name, 20)


def test_recordings_come_back(tmp_path: Path) -> None:
    said = training(40)
    made = record(said, tmp_path / "r", speak=tone, say=lambda _: None)
    assert len(made) == 40 and made.utterances == said
    wave = made.wave(7)
    assert wave.dtype == np.float32
    assert len(wave) == pytest.approx(400 * len(said[7].text) + 3200, abs=40)
    assert np.abs(wave).max() == pytest.approx(0.5, abs=0.01)
    again = Recordings(tmp_path / "r")
    np.testing.assert_array_equal(again.wave(7), wave)


def test_recordings_are_made_once(tmp_path: Path) -> None:
    said = training(12)
    record(said, tmp_path, speak=tone, say=lambda _: None)
    calls: list[str] = []

    def counted(text: str, voice: Voice) -> NDArray[np.float32]:
        calls.append(text)
        return tone(text, voice)

    record(said, tmp_path, speak=counted, say=lambda _: None)
    assert calls == []
    record(said[:6], tmp_path, speak=counted, say=lambda _: None)
    assert len(calls) == 6 and len(Recordings(tmp_path)) == 6


def test_silence_is_cut_but_for_a_little() -> None:
    wave = tone("hello", ASSISTANT)
    cut = trimmed(wave)
    assert len(cut) == pytest.approx(2000 + 3200, abs=20)
    assert not cut[:1590].any()
    np.testing.assert_array_equal(trimmed(np.zeros(100, np.float32)), np.zeros(100))


def test_waves_without_a_length_in_their_header() -> None:
    samples = np.array([0, 16384, -32768, 5], "<i2")
    header = b"RIFF\xff\xff\xff\x7fWAVEfmt " + struct.pack(
        "<IHHIIHH", 16, 1, 1, 22050, 44100, 2, 16
    )
    data = header + b"data" + struct.pack("<I", 0x7FFFF000) + samples.tobytes() + b"\x01"
    found, rate = parse_wave(data)
    assert rate == 22050
    np.testing.assert_allclose(found, [0, 0.5, -1, 5 / 32768])


def test_resampling() -> None:
    wave = np.sin(np.arange(22050) * 0.1).astype(np.float32)
    assert len(resampled(wave, 22050, 16000)) == 16000
    assert resampled(wave, 22050, 22050) is wave


def test_without_espeak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "PROGRAM", "no-such-espeak")
    with pytest.raises(MissingExtra, match="made by the program no-such-espeak, which is not"):
        synthesise("hello", ASSISTANT)


def test_how_espeak_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "speaker"
    program.write_text("#!/bin/sh\nprintf '%s ' \"$@\" > \"$0.args\"\nprintf 't_w_ˈ_ɛ_n\\n'\n")
    program.chmod(0o755)
    monkeypatch.setattr(synthesis, "PROGRAM", str(program))
    assert synthesis.phonemes("ten") == ["t", "w", "ɛ", "n"]
    assert program.with_suffix(".args").read_text() == "-q -v en-us --ipa --sep=_ "
