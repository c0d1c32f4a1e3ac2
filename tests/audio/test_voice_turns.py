from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_audio.voice.turns import (
    Continued,
    Dismissed,
    Ended,
    Idle,
    Onset,
    Paused,
    Signal,
    Started,
    TurnDetector,
    TurnSettings,
    ms,
    samples,
)
from lfm2_audio.voice.vad import RATE, WINDOW
from lfm2_mm.errors import SettingError

SPEECH, SILENCE = 0.9, 0.05


def windows(milliseconds: float) -> int:
    return -(-samples(milliseconds) // WINDOW)


def feed(
    detector: TurnDetector, *parts: tuple[float, float], playing: bool = False
) -> list[Signal]:
    """Probabilities for so many milliseconds each."""
    out: list[Signal] = []
    for chance, length in parts:
        for _ in range(windows(length)):
            out += detector.step(chance, playing=playing)
    return out


def kinds(signals: list[Signal]) -> list[str]:
    return [type(signal).__name__ for signal in signals]


def test_a_turn_with_prefix_tail_and_the_silence_that_ends_it() -> None:
    found = feed(TurnDetector(), (SILENCE, 1024), (SPEECH, 1024), (SILENCE, 1024))
    assert kinds(found) == ["Onset", "Started", "Paused", "Ended"]
    onset, started, paused, ended = found
    assert isinstance(onset, Onset) and isinstance(started, Started)
    assert isinstance(paused, Paused) and isinstance(ended, Ended)
    assert onset.start == samples(1024)
    assert started.start == samples(1024 - 300)
    assert started.at - onset.start <= samples(250) + WINDOW
    assert ended.spoken == samples(2048)
    assert (ended.start, ended.end) == (started.start, samples(2048 + 200))
    assert (paused.start, paused.end) == (ended.start, ended.end)
    assert 0 <= ended.at - ended.spoken - samples(500) < WINDOW
    assert 0 <= paused.at - paused.end < WINDOW
    assert not ended.cut


def test_a_pause_within_a_turn() -> None:
    found = feed(TurnDetector(), (SPEECH, 960), (SILENCE, 320), (SPEECH, 640), (SILENCE, 640))
    assert kinds(found) == ["Onset", "Started", "Paused", "Continued", "Paused", "Ended"]


def test_a_short_pause_is_not_even_noticed() -> None:
    found = feed(TurnDetector(), (SPEECH, 960), (SILENCE, 160), (SPEECH, 640), (SILENCE, 640))
    assert kinds(found) == ["Onset", "Started", "Paused", "Ended"]


def test_a_cough_is_no_turn() -> None:
    found = feed(TurnDetector(), (SPEECH, 160), (SILENCE, 2000))
    assert kinds(found) == ["Onset", "Dismissed"]
    assert feed(TurnDetector(), (SPEECH, 32), (SILENCE, 2000)) == []


def test_between_the_thresholds_speech_goes_on_but_does_not_begin() -> None:
    assert feed(TurnDetector(), (0.45, 4000)) == []
    found = feed(TurnDetector(), (SPEECH, 320), (0.4, 3200), (0.3, 640))
    assert [s.spoken for s in found if isinstance(s, Ended)] == [samples(3520)]


def test_an_interruption_is_noticed_at_once_and_confirmed_later() -> None:
    found = feed(TurnDetector(), (SPEECH, 1024), playing=True)
    assert kinds(found) == ["Onset", "Started"]
    assert found[0].at <= samples(200)
    assert samples(500) <= found[1].at < samples(500) + WINDOW


def test_a_yes_while_the_other_speaks_is_dismissed() -> None:
    found = feed(TurnDetector(), (SPEECH, 416), (SILENCE, 640), playing=True)
    assert kinds(found) == ["Onset", "Dismissed"]
    assert found[1].at - samples(416) < samples(300) + WINDOW


def test_what_was_dismissed_shortly_before_belongs_to_the_turn() -> None:
    detector = TurnDetector()
    feed(detector, (SILENCE, 960))
    found = feed(detector, (SPEECH, 320), (SILENCE, 640), (SPEECH, 960), playing=True)
    assert kinds(found) == ["Onset", "Dismissed", "Onset", "Started"]
    last = found[-1]
    assert isinstance(last, Started)
    assert last.start == samples(960 - 300)
    assert detector.wanted == last.start


def test_what_was_dismissed_long_before_does_not() -> None:
    detector = TurnDetector()
    found = feed(detector, (SPEECH, 320), (SILENCE, 1600), (SPEECH, 960), playing=True)
    last = found[-1]
    assert isinstance(last, Started)
    assert last.start == samples(1920 - 300)


def test_interruptions_can_be_switched_off() -> None:
    detector = TurnDetector(TurnSettings(interrupt=False))
    assert feed(detector, (SPEECH, 3000), playing=True) == []
    assert kinds(feed(detector, (SPEECH, 320)))[:2] == ["Onset", "Started"]


def test_an_endless_turn_is_cut() -> None:
    detector = TurnDetector(TurnSettings(max_turn_ms=2000))
    found = feed(detector, (SPEECH, 5000))
    ends = [s for s in found if isinstance(s, Ended)]
    assert [end.cut for end in ends] == [True, True]
    assert ends[1].start == ends[0].end  # nothing is lost, nothing is heard twice


def test_idle_is_said_once_and_not_while_something_plays() -> None:
    detector = TurnDetector(TurnSettings(idle_ms=2000))
    assert feed(detector, (SILENCE, 1600)) == []
    assert feed(detector, (SILENCE, 5000), playing=True) == []
    found = feed(detector, (SILENCE, 9000))
    assert kinds(found) == ["Idle"]
    assert isinstance(found[0], Idle)
    assert 0 <= found[0].at - found[0].start - samples(2000) < WINDOW
    feed(detector, (SPEECH, 320), (SILENCE, 640))
    assert kinds(feed(detector, (SILENCE, 3000))) == ["Idle"]


def test_by_hand() -> None:
    detector = TurnDetector()
    feed(detector, (SILENCE, 320))
    assert kinds(detector.press()) == ["Started"]
    assert detector.press() == []
    assert feed(detector, (SPEECH, 320), (SILENCE, 3200)) == []  # silence does not end it
    (ended,) = detector.release()
    assert isinstance(ended, Ended)
    assert (ended.start, ended.end) == (samples(320), detector.at)
    assert detector.release() == []


def test_by_hand_also_ends_some_day() -> None:
    detector = TurnDetector(TurnSettings(max_turn_ms=1000))
    detector.press()
    assert kinds(feed(detector, (SILENCE, 1500))) == ["Ended"]


def test_a_dropped_turn_leaves_nothing() -> None:
    detector = TurnDetector()
    feed(detector, (SPEECH, 960))
    assert detector.speaking
    detector.drop()
    assert not detector.speaking
    assert detector.wanted == detector.at
    assert feed(detector, (SILENCE, 960)) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"release": 0.6}, "threshold is 0.5 and release 0.6; it must be 0 < release <= "),
        ({"silence_ms": -1, "tail_ms": -1}, "tail_ms is -1; it must not be negative"),
        ({"tail_ms": 600}, "tail_ms is 600, but silence_ms only 500"),
        ({"onset_ms": 320}, "onset_ms is 320; the output must pause within 200 ms of speech"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        TurnSettings(**wrong)


def test_milliseconds_and_samples() -> None:
    assert samples(32) == WINDOW
    assert ms(RATE) == 1000


steps = st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=150)
chosen = st.builds(
    TurnSettings,
    min_speech_ms=st.integers(0, 400),
    silence_ms=st.integers(200, 700),
    interrupt_ms=st.integers(0, 600),
    resume_ms=st.integers(0, 400),
    prefix_ms=st.integers(0, 400),
    recall_ms=st.integers(0, 1500),
    max_turn_ms=st.integers(500, 4000),
    idle_ms=st.none() | st.integers(0, 1000),
)

AFTER: dict[str, set[str]] = {
    "": {"Onset", "Idle"},
    "Idle": {"Onset", "Idle"},
    "Onset": {"Dismissed", "Started"},
    "Dismissed": {"Onset", "Idle"},
    "Started": {"Paused", "Ended"},
    "Paused": {"Continued", "Ended"},
    "Continued": {"Paused", "Ended"},
    "Ended": {"Onset", "Idle"},
}


@given(steps, chosen)
def test_signals_come_in_order_and_turns_never_overlap(
    given: list[tuple[float, bool]], settings: TurnSettings
) -> None:
    detector = TurnDetector(settings)
    before, low, wanted = "", 0, 0
    for chance, playing in given:
        for signal in detector.step(chance, playing=playing):
            name = type(signal).__name__
            assert name in AFTER[before]
            assert signal.at == detector.at
            before = name
            if isinstance(signal, Started | Paused | Ended):
                assert signal.start >= wanted  # it was not let go of before
            if isinstance(signal, Ended):
                assert low <= signal.start < signal.spoken <= signal.end <= detector.at
                low = signal.end
        assert detector.wanted >= wanted  # what was let go of never comes back
        wanted = detector.wanted
        assert detector.at - wanted <= samples(8000)  # and memory is bounded


@given(steps)
def test_200_ms_of_speech_always_pause_the_output(given: list[tuple[float, bool]]) -> None:
    detector = TurnDetector()
    said = [s for chance, playing in given for s in detector.step(chance, playing=playing)]
    said += feed(detector, (SPEECH, 192), playing=True)
    known = [s for s in said if isinstance(s, Onset | Started | Dismissed | Ended)]
    assert isinstance(known[-1], Onset | Started)


@given(st.lists(st.floats(0, 0.49), max_size=150), st.booleans())
def test_what_never_reaches_the_threshold_makes_no_signal(
    given: list[float], playing: bool
) -> None:
    detector = TurnDetector()
    assert [s for chance in given for s in detector.step(chance, playing=playing)] == []


def test_continued_needs_speech() -> None:
    detector = TurnDetector()
    found = feed(detector, (SPEECH, 960), (SILENCE, 320), (SPEECH, 32))
    assert isinstance(found[-1], Continued)
    quiet = feed(TurnDetector(), (SPEECH, 320), (SILENCE, 32))
    assert not any(isinstance(s, Dismissed | Continued) for s in quiet)
