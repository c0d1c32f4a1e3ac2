"""Odd and broken recordings through the command line: heard, or one sentence and code 1."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile as sf  # type: ignore[import-untyped]

from lfm2_audio import talking, transcribing
from tests.audio.verbs import Run, runner, sentence
from tests.audio.voice_fakes import FakeModel, Talk, clip, spoken

RATE = 16000


def spoken_words() -> np.ndarray:
    """A person's speech, 1.8 seconds."""
    return clip("question").copy()


def put(path: Path, samples: np.ndarray, rate: int = RATE, **how: Any) -> None:
    sf.write(path, samples, rate, **how)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_samples(path: Path) -> None:
    put(path, np.zeros(0))


def ten_milliseconds(path: Path) -> None:
    put(path, spoken_words()[8000:8160])


def three_hours(path: Path) -> None:
    """A hole on the disk behind a header that tells the truth."""
    put(path, np.zeros(8000), 8000, subtype="PCM_U8")
    raw, n = bytearray(path.read_bytes()), 3 * 3600 * 8000
    at = raw.index(b"data")
    raw[at + 4 : at + 8], raw[4:8] = struct.pack("<I", n), struct.pack("<I", n + 36)
    path.write_bytes(raw)
    with path.open("r+b") as sparse:
        sparse.truncate(at + 8 + n)


def nan(path: Path, count: int = 10) -> None:
    samples = spoken_words()
    samples[8000 : 8000 + count] = np.nan
    put(path, samples, subtype="FLOAT")


def one_infinite(path: Path) -> None:
    samples = spoken_words()
    samples[8000] = np.inf
    put(path, samples, subtype="FLOAT")


def cut_header(path: Path) -> None:
    put(path, spoken_words())
    path.write_bytes(path.read_bytes()[:20])


def header_alone(path: Path) -> None:
    put(path, spoken_words())
    path.write_bytes(path.read_bytes()[:44])


def words(path: Path) -> None:
    path.write_text("these are words and no sound\n" * 20)


LIMIT = "is 180.0 minutes long, over the limit of 120 minutes; cut it into parts"
BROKEN: list[tuple[Callable[[Path], None], str, str]] = [
    (empty, "is empty (0 bytes); record or download it again", ""),
    (no_samples, "holds no samples; record it again", ""),
    (
        ten_milliseconds,
        "is 0.01 seconds long, too short to hold a word; give at least 0.1 seconds",
        "",
    ),
    (three_hours, f"{LIMIT}, or raise max_seconds (--max-seconds)", LIMIT),
    (
        nan,
        "holds 10 samples that are no numbers (NaN or infinite), the first at 0.500 s; export it "
        "again, as 16-bit WAV or FLAC",
        "",
    ),
    (
        one_infinite,
        "holds 1 sample that is no number (NaN or infinite), the first at 0.500 s; export it "
        "again, as 16-bit WAV or FLAC",
        "",
    ),
    (
        cut_header,
        "begins like a sound file but is damaged or cut short (Error in WAV/W64/RF64 file. "
        "Malformed 'fmt ' chunk); save or download it again",
        "",
    ),
    (header_alone, "holds no samples; record it again", ""),
    (
        words,
        "is not a recording that can be read here (it begins with 'these are words '); WAV, FLAC, "
        "Ogg, MP3, AIFF, AU and CAF files work",
        "",
    ),
]


def as_8_bits(path: Path) -> None:
    put(path, spoken_words(), subtype="PCM_U8")


def at_192_khz(path: Path) -> None:
    put(path, np.repeat(spoken_words(), 12), 192000, subtype="PCM_24")


def in_5_1(path: Path) -> None:
    """The voice in the middle, hiss around it."""
    around = 0.002 * np.random.default_rng(1).standard_normal((len(spoken_words()), 6))
    around[:, 2] += spoken_words()
    put(path, around, format="WAVEX")


def mp3_named_wav(path: Path) -> None:
    put(path, spoken_words(), format="MP3")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return runner(monkeypatch)


class Listening:
    """Writes down how long what it hears is, and whether anything is to be heard."""

    name = "listening"

    def transcribe(self, piece: Any, **options: Any) -> Any:
        assert piece.rate == RATE
        loud = float(piece.samples.abs().max())
        return SimpleNamespace(text=f"{piece.duration:.1f} seconds" if loud > 0.02 else "")


@pytest.fixture
def hears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcribing, "load_audio_model", lambda params: Listening())


@pytest.mark.parametrize(("make", "said", "otherwise"), BROKEN)
def test_a_recording_that_cannot_be_used_is_one_sentence(
    run: Run,
    hears: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make: Callable[[Path], None],
    said: str,
    otherwise: str,
) -> None:
    path = tmp_path / "in.wav"
    make(path)
    assert sentence(run("transcribe", path)) == f"'{path}' {said}"
    monkeypatch.setattr(talking, "load_audio_model", None)  # judged before a model is loaded
    assert sentence(run("talk", "--wav-in", path)) == f"'{path}' {otherwise or said}"


@pytest.mark.parametrize("make", [as_8_bits, at_192_khz, in_5_1, mp3_named_wav])
def test_an_unusual_recording_is_heard_as_any_other(
    run: Run,
    hears: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make: Callable[[Path], None],
) -> None:
    path = tmp_path / "in.wav"
    make(path)
    result = run("transcribe", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert 1.5 < float(result.stdout.split()[0]) < 2.2
    model: Any = FakeModel(spoken(4))
    model.conversation = lambda system: Talk()
    monkeypatch.setattr(talking, "load_audio_model", lambda params: model)
    result = run("talk", "--wav-in", path)
    assert result.exit_code == 0, result.output
    assert len(model.asked) == 1 and "s of speech" in result.stdout
