from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lfm2_audio.voice.speaker import Speaker

RATE, FADE = 24000, 120


def ones(n: int) -> np.ndarray:
    return np.ones(n, dtype=np.float32)


@given(st.lists(st.integers(0, 50), max_size=10), st.lists(st.integers(0, 70), max_size=20))
def test_what_goes_in_comes_out_in_order(given: list[int], taken: list[int]) -> None:
    speaker, at = Speaker(RATE), 0
    for n in given:
        speaker.put(np.arange(at, at + n, dtype=np.float32) + 1)
        at += n
    out = np.concatenate([ones(0), *(speaker.take(n) for n in taken)])
    heard = min(at, sum(taken))
    assert speaker.heard == heard
    assert speaker.pending == at - heard
    assert np.array_equal(out[:heard], np.arange(heard) + 1)


def test_silence_where_there_is_nothing() -> None:
    speaker = Speaker(RATE)
    assert not speaker.take(100).any()
    assert (speaker.heard, speaker.gaps) == (0, 0)


def test_a_pause_fades_out_and_goes_on_from_there() -> None:
    speaker = Speaker(RATE)
    speaker.put(ones(2000))
    speaker.take(500)
    speaker.pause()
    out = speaker.take(500)
    assert out[0] == 1 and np.all(np.diff(out[:FADE]) < 0) and not out[FADE:].any()
    assert not speaker.take(500).any()
    assert speaker.heard == 500 + FADE
    speaker.resume()
    out = speaker.take(500)
    assert out[0] == 0 and np.all(np.diff(out[:FADE]) > 0) and np.all(out[FADE:] == 1)
    assert speaker.heard == 1000 + FADE
    assert speaker.gaps == 0


def test_what_is_dropped_ends_without_a_click() -> None:
    speaker = Speaker(RATE)
    speaker.put(ones(2000))
    speaker.take(500)
    assert speaker.clear() == 1500
    out = speaker.take(500)
    assert np.abs(np.diff(np.concatenate([ones(1), out]))).max() < 0.01
    assert not out[FADE:].any()
    assert speaker.heard == 500


def test_sound_that_runs_out_within_a_block_ends_without_a_click() -> None:
    speaker = Speaker(RATE)
    speaker.put(ones(300))
    out = speaker.take(1000)
    assert np.abs(np.diff(out)).max() < 0.01
    assert speaker.heard == 300


def test_gaps_are_counted_only_where_sound_follows() -> None:
    speaker = Speaker(RATE)
    speaker.put(ones(100))
    speaker.take(150)
    assert speaker.gaps == 0
    speaker.put(ones(100))
    speaker.take(200)
    assert speaker.gaps == 50
    speaker.take(500)
    assert speaker.gaps == 50
    speaker.begin()
    assert (speaker.gaps, speaker.heard) == (0, 0)


def test_held_samples_wait_for_their_release() -> None:
    speaker = Speaker(RATE)
    speaker.put(ones(10))
    speaker.put(ones(10), hold=True)
    assert speaker.pending == 20
    speaker.take(20)
    assert speaker.heard == 10
    speaker.release()
    speaker.take(20)
    assert speaker.heard == 20
