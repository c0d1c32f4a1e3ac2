from __future__ import annotations

import base64
import io
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf  # type: ignore[import-untyped]
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_audio import waveform
from lfm2_audio.waveform import Audio, read_audio
from lfm2_mm.errors import AudioError, Lfm2Error, MissingExtra, SettingError

RATE = 16000


def tone(seconds: float = 0.5, rate: int = RATE, hz: float = 440.0) -> np.ndarray[Any, Any]:
    t = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def file_of(samples: Any, rate: int = RATE, form: str = "WAV", subtype: str | None = None) -> bytes:
    target = io.BytesIO()
    sf.write(target, samples, rate, format=form, subtype=subtype)
    return target.getvalue()


def pitch(audio: Audio) -> float:
    spectrum = np.abs(np.fft.rfft(audio.samples.numpy()))
    return float(spectrum.argmax()) * audio.rate / len(audio.samples)


@pytest.mark.parametrize(
    ("form", "subtype", "exact"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0.0),
        ("WAV", "DOUBLE", 1e-7),
        ("WAV", "ULAW", 3e-2),
        ("FLAC", "PCM_16", 1e-4),
        ("FLAC", "PCM_S8", 1e-2),
        ("AIFF", "PCM_16", 1e-4),
        ("CAF", "PCM_16", 1e-4),
        ("AU", "PCM_16", 1e-4),
        ("W64", "PCM_16", 1e-4),
        ("RF64", "PCM_16", 1e-4),
    ],
)
def test_formats_that_keep_samples_read_back_equal(form: str, subtype: str, exact: float) -> None:
    audio = read_audio(file_of(tone(), form=form, subtype=subtype))
    assert audio.rate == RATE and audio.samples.dtype == torch.float32
    assert np.abs(audio.samples.numpy() - tone()).max() <= exact


@pytest.mark.parametrize(
    ("form", "subtype", "rate"), [("MP3", None, 24000), ("OGG", "VORBIS", RATE)]
)
def test_formats_that_lose_keep_the_pitch(form: str, subtype: str | None, rate: int) -> None:
    audio = read_audio(file_of(tone(1.0, rate), rate, form, subtype))
    assert audio.duration == pytest.approx(1.0, abs=0.11)
    assert pitch(audio) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 22050, 44100, 48000, 96000, 192000])
def test_any_rate_is_resampled_to_the_one_asked_for(rate: int) -> None:
    audio = read_audio(file_of(tone(0.5, rate), rate), rate=RATE)
    assert audio.rate == RATE
    assert len(audio.samples) == pytest.approx(0.5 * RATE, abs=1)
    middle = slice(1000, -1000)
    assert np.abs(audio.samples.numpy()[middle] - tone(0.5)[: len(audio.samples)][middle]).max() < (
        2e-3
    )


@settings(max_examples=25)
@given(
    st.integers(2, 30_000),
    st.sampled_from(
        [(44100, 16000), (16000, 24000), (24000, 16000), (48000, 16000), (8000, 16000)]
    ),
    st.sampled_from([1, 2, 6]),
)
def test_resampling_block_by_block_equals_resampling_the_whole(
    n: int, rates: tuple[int, int], channels: int
) -> None:
    noise = np.random.default_rng(n).uniform(-0.5, 0.5, (n, channels)).astype(np.float32)
    data = file_of(noise, rates[0], subtype="FLOAT")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waveform, "_BLOCK", 9000)
        pieces = read_audio(data, rate=rates[1], min_seconds=0)
    whole = read_audio(data, min_seconds=0).resampled(rates[1])
    assert len(pieces.samples) == len(whole.samples)
    torch.testing.assert_close(pieces.samples, whole.samples, atol=2e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
def test_channels_become_their_mean(channels: int) -> None:
    many = np.stack([tone(hz=200 + 100 * c) for c in range(channels)], axis=1)
    audio = read_audio(file_of(many, subtype="FLOAT"))
    np.testing.assert_allclose(audio.samples.numpy(), many.mean(axis=1), atol=1e-6)


def test_every_kind_of_source_gives_the_same_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = file_of(tone())
    path = tmp_path / "q.wav"
    path.write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    url = "data:audio/wav;base64," + base64.b64encode(data).decode()
    stereo = np.stack([tone(), tone()])
    whole = read_audio(path)
    others: list[Any] = [
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        io.BytesIO(data),
        url,
        "-",
        whole,
        (whole.samples, RATE),
        (whole.samples.numpy(), RATE),
        (np.stack([whole.samples.numpy()] * 2), RATE),
        (np.stack([whole.samples.numpy()] * 2, axis=1), np.int64(RATE)),
    ]
    for source in others:
        assert read_audio(source).digest == whole.digest, type(source)
    with path.open("rb") as file:
        assert read_audio(file).digest == whole.digest
    assert read_audio((stereo, RATE)).digest != whole.digest  # not rounded to 16 bits


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, file_of(tone(0.3)))
    os.close(writer)
    try:
        assert read_audio(f"/dev/fd/{reader}").duration == pytest.approx(0.3)
    finally:
        os.close(reader)


def test_contents_count_and_not_the_name(tmp_path: Path) -> None:
    for name, form in (("song.wav", "MP3"), ("talk.raw", "WAV"), ("noise.xyz", "FLAC")):
        path = tmp_path / name
        path.write_bytes(file_of(tone(1.0, 24000), 24000, form))
        assert pitch(read_audio(path)) == pytest.approx(440, abs=2)
        with path.open("rb") as file:
            assert pitch(read_audio(file)) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "int32", "float16", "float64"])
def test_arrays_of_any_number_format_have_full_scale_one(kind: str) -> None:
    values = tone()
    if kind == "uint8":
        given = np.rint(values * 128 + 128).astype(kind)
    elif kind.startswith("int"):
        given = np.rint(values * -float(np.iinfo(kind).min)).astype(kind)
    else:
        given = values.astype(kind)
    audio = read_audio((given, RATE))
    assert np.abs(audio.samples.numpy() - values).max() < 5e-3


def write(folder: Path, data: bytes) -> Path:
    path = folder / "in.wav"
    path.write_bytes(data)
    return path


def with_bad(value: float) -> bytes:
    samples = tone()
    samples[800:802] = value
    return file_of(samples, subtype="FLOAT")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is empty (0 bytes); record or download it again"),
        (file_of(np.zeros(0, np.float32)), "holds no samples; record it again"),
        (
            file_of(tone(0.01)),
            "is 0.01 seconds long, too short to hold a word; give at least 0.1 seconds",
        ),
        (file_of(tone())[:20], "begins like a sound file but is damaged or cut short"),
        (file_of(tone(), form="FLAC")[:30], "begins like a sound file but is damaged or cut short"),
        (b"\xff\xf3\x84\xc4" + b"broken" * 99, "begins like a sound file but is damaged or cut"),
        (b"hello, this is no sound at all", "is not a recording that can be read here (it begins"),
        (b"%PDF-1.7 and so on", "is a PDF document, which cannot be read here; convert it first"),
        (b"\x00\x00\x00\x20ftypM4A " + bytes(64), "is an MP4, M4A or MOV file, which cannot be"),
        (b"\x1a\x45\xdf\xa3" + bytes(64), "is a Matroska or WebM file, which cannot be read here"),
        (
            with_bad(float("nan")),
            "holds 2 samples that are no numbers (NaN or infinite), the first",
        ),
        (with_bad(float("inf")), "the first at 0.050 s; export it again, as 16-bit WAV or FLAC"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(
    data: bytes, text: str, tmp_path: Path
) -> None:
    for source in (data, write(tmp_path, data), io.BytesIO(data)):
        with pytest.raises(AudioError) as caught:
            read_audio(source)
        message = str(caught.value)
        assert text in message and "\n" not in message, message
    assert str(tmp_path) not in message or "in.wav" in message


def test_three_hours_are_refused_from_the_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with sf.SoundFile(path, "w", 8000, 1, "PCM_U8") as file:
        file.write(np.zeros(8000, np.float32))
    raw = bytearray(path.read_bytes())
    at, n = raw.index(b"data"), 3 * 3600 * 8000
    raw[at + 4 : at + 8] = struct.pack("<I", n)
    raw[4:8] = struct.pack("<I", n + 36)
    path.write_bytes(raw)
    with path.open("r+b") as sparse:
        sparse.truncate(at + 8 + n)
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    assert str(caught.value).endswith(
        "is 180.0 minutes long, over the limit of 120 minutes; cut it into parts, or raise "
        "max_seconds (--max-seconds)"
    )


def test_the_limits_can_be_set() -> None:
    data = file_of(tone(0.5))
    with pytest.raises(AudioError, match="over the limit of 0.005 minutes"):
        read_audio(data, max_seconds=0.3)
    with pytest.raises(AudioError, match="give at least 1 seconds"):
        read_audio(data, min_seconds=1)
    with pytest.raises(AudioError, match="more than the limit of 100 bytes"):
        read_audio(data, max_bytes=100)
    with pytest.raises(AudioError, match="over the limit"):
        read_audio(Audio(torch.zeros(RATE), RATE), max_seconds=0.5)
    assert read_audio(data, min_seconds=0.5, max_seconds=0.5).duration == 0.5


def test_a_file_cut_short_in_its_data_is_read_as_far_as_it_goes() -> None:
    audio = read_audio(file_of(tone())[: 44 + 2 * 4000])
    assert len(audio.samples) == 4000


def test_other_sources_are_refused(tmp_path: Path) -> None:
    wrong: list[tuple[Any, str]] = [
        (tmp_path / "none.wav", "there is no file"),
        (tmp_path, "is a folder, not a recording"),
        (3, "sound cannot be read from a value of type int"),
        (io.StringIO("x"), "was opened as text; open it in binary mode"),
        ((tone(), "16000"), "needs its sample rate beside it"),
        ((tone().reshape(2, 2, -1), RATE), "an array of 3 dimensions"),
        ((np.array(["a"]), RATE), "is no sound"),
        ((tone(), 10), "has 10 samples a second, but 1,000 to 1,536,000 can be read"),
        ("a\0b", "cannot be read"),
    ]
    for source, text in wrong:
        with pytest.raises(AudioError, match=".") as caught:
            read_audio(source)
        assert text in str(caught.value)


@given(st.binary(max_size=300))
def test_no_bytes_whatever_raise_anything_but_our_errors(data: bytes) -> None:
    for start in (b"", file_of(tone(0.1))[:44], file_of(tone(0.1), form="FLAC")[:60], b"OggS"):
        try:
            read_audio(start + data)
        except Lfm2Error as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.opus", "a.aiff", "a.WAV"])
def test_saving_goes_by_the_ending(name: str, tmp_path: Path) -> None:
    audio = Audio(torch.from_numpy(tone(1.0, 24000)), 24000)
    audio.save(tmp_path / name)
    back = read_audio(tmp_path / name)
    assert back.duration == pytest.approx(1.0, abs=0.12)
    assert pitch(back) == pytest.approx(440, abs=3)
    if name.lower().endswith("wav"):
        assert sf.info(tmp_path / name).subtype == "PCM_16"


def test_too_loud_samples_are_clipped_and_do_not_wrap(tmp_path: Path) -> None:
    Audio(torch.tensor([2.0, -3.0] * RATE), RATE).save(tmp_path / "a.wav")
    back = read_audio(tmp_path / "a.wav").samples
    assert back[0] > 0.999 and back[1] == -1.0


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "opus", "mp3"])
def test_samples_that_are_no_numbers_are_written_as_silence(form: str) -> None:
    """libsndfile's MP3 encoder ends the whole process when it meets a NaN."""
    samples = torch.from_numpy(tone(1.0, 24000))
    samples[1000:1100], samples[2000] = float("nan"), float("inf")
    back = read_audio(Audio(samples, 24000).to_bytes(form))
    assert back.duration == pytest.approx(1.0, abs=0.12)
    assert pitch(back) == pytest.approx(440, abs=3)


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    audio = Audio(torch.zeros(RATE), RATE)
    with pytest.raises(SettingError, match=r"written as 'docx'; use a name that ends with .wav"):
        audio.save(tmp_path / "a.docx")
    with pytest.raises(SettingError, match="written as ''"):
        audio.save(tmp_path / "a")
    with pytest.raises(SettingError, match=r"of 22050 Hz cannot be written as 'opus'"):
        Audio(torch.zeros(RATE), 22050).save(tmp_path / "a.opus")
    with pytest.raises(AudioError, match="cannot be written"):
        audio.save(tmp_path / "none" / "a.wav")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingExtra, match=r"pip install 'lfm2-mm\[audio\]'"):
        read_audio(b"RIFF")
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(MissingExtra, match="the package soxr is needed"):
        Audio(torch.zeros(RATE), RATE).resampled(8000)
