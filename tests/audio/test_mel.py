"""Mel features against the official front end, and what it leaves open."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm2_audio.config import MelConfig
from lfm2_audio.mel import MelFrontend, mel_filters, n_frames
from tests.audio import official

FRONT = MelFrontend(MelConfig())


@pytest.mark.parametrize("name", official.signals())
def test_parity(name: str) -> None:
    made = FRONT(official.signals()[name])
    torch.testing.assert_close(made, official.golden("mel")[name], atol=1e-5, rtol=0)


def test_tables() -> None:
    tables = official.golden("mel_tables")
    torch.testing.assert_close(FRONT.filters, tables["filters"], atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(FRONT.window, tables["window"], atol=1e-7, rtol=0)


@pytest.mark.parametrize("n", [0, 1, 159, 160, 161, 16000])
def test_one_frame_more_than_carries_speech(n: int) -> None:
    """Trap 1: inference feeds T + 1 frames, the last of them zero."""
    samples = official.signal("extra", n)
    features, counts = FRONT.batch(samples[None], torch.tensor([n]))
    assert features.shape[2] == n_frames(n, FRONT.config) == n // 160 + 1
    assert counts.tolist() == [n // 160]
    assert not features[0, :, n // 160 :].any()
    assert features.isfinite().all()


def test_one_second() -> None:
    features, counts = FRONT.batch(official.signal("second", 16000)[None], torch.tensor([16000]))
    assert features.shape == (1, 128, 101)
    assert counts.tolist() == [100]


def test_normalised_over_the_whole_recording() -> None:
    """Trap 11: what comes later changes the features of what came before."""
    short, more = official.signal("a", 8000), official.signal("b", 8000, peak=0.9)
    alone, whole = FRONT(short), FRONT(torch.cat([short, more]))
    assert (alone[:, :40] - whole[:, :40]).abs().max() > 0.1
    speech = whole[:, :-1]
    torch.testing.assert_close(speech.mean(1), torch.zeros(128), atol=1e-4, rtol=0)
    torch.testing.assert_close(speech.std(1), torch.ones(128), atol=1e-3, rtol=0)


def test_silence_is_finite_and_quiet() -> None:
    features = FRONT(torch.zeros(3200))
    assert features.isfinite().all()
    assert features.abs().max() < 1


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=4), st.floats(-5, 5))
def test_a_batch_equals_each_alone(lengths: list[int], padding: float) -> None:
    recordings = [official.signal(f"batch {i}", n) for i, n in enumerate(lengths)]
    padded = torch.full((len(lengths), max(lengths)), padding)
    for row, recording in zip(padded, recordings, strict=True):
        row[: len(recording)] = recording
    features, counts = FRONT.batch(padded, torch.tensor(lengths))
    for row, count, recording in zip(features, counts.tolist(), recordings, strict=True):
        alone = FRONT(recording)
        torch.testing.assert_close(row[:, : count + 1], alone, atol=1e-5, rtol=0)
        assert not row[:, count:].any()


def test_other_sizes() -> None:
    config = MelConfig(rate=8000, n_mels=20, n_fft=256, window=200, hop=80)
    assert MelFrontend(config)(official.signal("small", 4000)).shape == (20, 51)
    filters = mel_filters(config)
    assert filters.shape == (20, 129)
    assert (filters.sum(1) > 0).all()
