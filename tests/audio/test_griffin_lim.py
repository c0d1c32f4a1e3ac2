"""The codec without a network: codes and back, whole and streamed alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lfm2_audio.codec import Codec, CodecStream
from lfm2_audio.griffin_lim import FOLDER, GriffinLim, GriffinLimConfig, fit_codebooks
from lfm2_mm.errors import CheckpointError, InputError, ModelNotFound

CONFIG = GriffinLimConfig(rate=8000, n_mels=20, n_fft=128, hop=32, stack=4, iterations=6, ahead=1)


def sound(seconds: float = 1.0) -> Tensor:
    """A gliding tone with two partials, as simple as a voice can be."""
    t = torch.arange(int(8000 * seconds)) / 8000
    phase = 2 * torch.pi * (300 * t + 200 * t * t)
    return 0.3 * phase.sin() + 0.15 * (2.7 * phase).sin()


def blank() -> GriffinLim:
    size = CONFIG.stack * CONFIG.n_mels
    return GriffinLim(CONFIG, torch.zeros(1, 1, 1), torch.zeros(size, 1), torch.zeros(size))


@pytest.fixture(scope="module")
def codec() -> GriffinLim:
    torch.manual_seed(0)
    stacked = torch.cat([blank().stacked(sound()[i:]) for i in range(0, 128, 16)])
    return GriffinLim(CONFIG, *fit_codebooks(stacked, books=3, entries=32, width=24))


def test_it_is_a_codec(codec: GriffinLim) -> None:
    assert isinstance(codec, Codec)
    assert isinstance(codec.stream(), CodecStream)
    assert (codec.rate, codec.samples_per_frame, codec.codebooks) == (8000, 128, 3)


def test_as_many_samples_as_frames_say(codec: GriffinLim) -> None:
    codes = codec.encode(sound())
    assert codes.shape == (62, 3) and codes.dtype == torch.int64
    for n in (0, 1, 2, 3, 62):
        assert codec.decode(codes[:n]).shape == (n * 128,)


def test_codes_hold_the_features(codec: GriffinLim) -> None:
    stacked = codec.stacked(sound())
    wanted = stacked.reshape(-1, CONFIG.n_mels)
    plain = (stacked - codec.mean).abs().mean()
    assert (codec.mels(codec.encode(sound())) - wanted).abs().mean() < 0.15 * plain


def test_the_sound_has_the_features_that_were_asked_for(codec: GriffinLim) -> None:
    codes = codec.encode(sound())
    made = codec.decode(codes)
    again = codec.stacked(made).reshape(-1, CONFIG.n_mels)
    wanted = codec.mels(codes)
    louder = wanted > wanted.max() - 4
    noise = codec.stacked(0.1 * torch.randn(len(made))).reshape(-1, CONFIG.n_mels)
    error = (again - wanted)[louder].abs().mean()
    assert error < 0.4 * (noise - wanted)[louder].abs().mean()


@pytest.mark.parametrize("cuts", [[1] * 20, [20], [0, 3, 0, 1, 16], [7, 13]])
def test_streaming_equals_the_whole(codec: GriffinLim, cuts: list[int]) -> None:
    codes = codec.encode(sound())[:20]
    whole = codec.decode(codes)
    stream = codec.stream()
    parts = [stream.push(part) for part in torch.split(codes, cuts)]
    found = torch.cat([*parts, stream.flush()])
    torch.testing.assert_close(found, whole, atol=1e-5 * float(whole.abs().max()), rtol=0)


def test_a_stream_begins_anew_after_its_end(codec: GriffinLim) -> None:
    codes = codec.encode(sound())[:5]
    stream = codec.stream()
    first = torch.cat([stream.push(codes), stream.flush()])
    assert stream.flush().shape == (0,)
    second = torch.cat([stream.push(codes), stream.flush()])
    torch.testing.assert_close(first, second)


def test_a_frame_is_held_back_and_no_more(codec: GriffinLim) -> None:
    stream, codes = codec.stream(), codec.encode(sound())
    assert len(stream.push(codes[:1])) == 0
    assert len(stream.push(codes[1:2])) == 128 - 48  # and half of what a window reaches ahead
    assert len(stream.push(codes[2:3])) == 128


def test_codes_that_stand_for_no_sound(codec: GriffinLim) -> None:
    with pytest.raises(InputError, match="the code 2048 stands for no sound"):
        codec.decode(torch.full((2, 3), 2048))
    with pytest.raises(InputError, match="the frames have 8 codes, but this codec decodes 3"):
        codec.decode(torch.zeros(2, 8, dtype=torch.int64))


def test_saved_and_loaded(codec: GriffinLim, tmp_path: Path) -> None:
    codec.save(tmp_path / FOLDER)
    for place in (tmp_path, tmp_path / FOLDER):
        again = GriffinLim.load(place)
        assert again.config == CONFIG
        torch.testing.assert_close(again.books, codec.books, rtol=0.01, atol=0.01)


def test_folders_that_hold_no_codec(codec: GriffinLim, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="holds no Griffin-Lim codec"):
        GriffinLim.load(tmp_path)
    codec.save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "hop": 0}))
    with pytest.raises(CheckpointError, match="gives GriffinLimConfig.*hop=0"):
        GriffinLim.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"rate": 8000}))
    with pytest.raises(CheckpointError, match="no usable value for 'n_mels'"):
        GriffinLim.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GriffinLim.load(tmp_path)
