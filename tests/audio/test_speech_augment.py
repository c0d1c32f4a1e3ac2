"""Features are disturbed as sound would be, and the same way each time."""

from __future__ import annotations

import numpy as np
import pytest

from lfm2_audio.speech.augment import Augmentation, augment

STILL = Augmentation(tempo=0, warp=0, noise=0, tilt=0, time_masks=0, mel_masks=0)


def features(time: int = 60, mels: int = 16) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(-6, 2, (time, mels)).astype(np.float32)


def test_nothing_asked_nothing_done() -> None:
    mel = features()
    np.testing.assert_allclose(augment(mel, np.random.default_rng(1), STILL), mel, rtol=1e-6)


def test_the_same_stream_gives_the_same() -> None:
    mel = features()
    one = augment(mel, np.random.default_rng(5), Augmentation())
    two = augment(mel, np.random.default_rng(5), Augmentation())
    np.testing.assert_array_equal(one, two)
    assert one.shape != mel.shape or not np.allclose(one, mel)


@pytest.mark.parametrize("frames", [9, 60, 83])
def test_a_length_can_be_asked_for(frames: int) -> None:
    made = augment(features(), np.random.default_rng(2), Augmentation(), frames=frames)
    assert made.shape == (frames, 16)
    assert np.isfinite(made).all() and made.dtype == np.float32


def test_tempo_keeps_both_ends() -> None:
    mel = features()
    made = augment(mel, np.random.default_rng(0), STILL, frames=119)
    np.testing.assert_allclose(made[[0, 118]], mel[[0, 59]])
    np.testing.assert_allclose(made[2], mel[1], atol=0.1)


def test_noise_adds_power() -> None:
    how = Augmentation(tempo=0, warp=0, noise=1, snr=(0, 0), tilt=0, time_masks=0, mel_masks=0)
    mel = features()
    made = augment(mel, np.random.default_rng(0), how)
    assert (made > mel - 1e-3).all()
    quiet, loud = mel < np.median(mel), mel > np.quantile(mel, 0.95)
    assert (made - mel)[quiet].mean() > (made - mel)[loud].mean()


def test_masks_hold_the_mean() -> None:
    how = Augmentation(tempo=0, warp=0, noise=0, tilt=0, time_masks=0, mel_masks=1, mel_width=8)
    mel = features()
    made = augment(mel, np.random.default_rng(4), how)
    changed = ~np.isclose(made, mel).all(axis=0)
    assert 0 < changed.sum() <= 8
    np.testing.assert_allclose(made[:, changed], np.tile(mel.mean(0)[changed], (60, 1)), rtol=1e-5)
