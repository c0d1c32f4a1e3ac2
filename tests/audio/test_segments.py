from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_audio import segments
from lfm2_audio.segments import RATE, Cutting, Piece, Segment, cut, hear, joined
from lfm2_audio.subtitles import FORMATS, as_json, as_srt, as_txt, as_vtt
from lfm2_audio.waveform import Audio

Spans = list[tuple[int, int]]


def recording(spans: Spans, total: int) -> torch.Tensor:
    """Noise where somebody speaks, silence elsewhere."""
    values = np.zeros(total, dtype=np.float32)
    generator = np.random.default_rng(0)
    for start, end in spans:
        values[start:end] = 0.3 * generator.standard_normal(end - start)
    return torch.from_numpy(values)


def seconds(*pairs: tuple[float, float]) -> Spans:
    return [(int(a * RATE), int(b * RATE)) for a, b in pairs]


def pieces(spans: Spans, total: float, **how: Any) -> list[tuple[float, float]]:
    samples = recording(spans, int(total * RATE))
    cutting = Cutting(**{"whole": 0.0, **how})
    found = cut(samples, find_speech=lambda _: spans, cutting=cutting)
    return [(piece.start / RATE, piece.end / RATE) for piece in found]


def test_short_recordings_are_heard_whole_without_looking_for_speech() -> None:
    samples = torch.full((RATE * 3,), 0.001)
    assert cut(samples, find_speech=None) == [Piece(0, 3 * RATE)]
    assert cut(torch.zeros(0)) == []


def test_a_recording_without_a_sound_is_not_heard_at_all() -> None:
    """A muted microphone: models read words into silence."""
    assert cut(torch.full((RATE * 3,), 1e-4), find_speech=None) == []
    silence = Audio(torch.zeros(RATE * 3), RATE)
    assert list(hear(silence, lambda piece: "words that nobody said")) == []


def test_silence_is_left_out_but_a_little_at_the_ends() -> None:
    found = pieces(seconds((5, 8), (9, 11)), 60)
    assert found == [(4.8, 11.2)]


def test_a_long_pause_ends_a_piece() -> None:
    assert pieces(seconds((1, 4), (7, 9)), 20) == [(0.8, 4.2), (6.8, 9.2)]
    assert pieces(seconds((1, 4), (7, 9)), 20, pause=4.0) == [(0.8, 9.2)]


def test_pieces_end_at_the_longest_silence_of_the_later_half() -> None:
    spans = seconds((0, 9), (9.2, 17), (18.5, 25), (25.3, 29), (29.2, 40))
    found = pieces(spans, 40)
    assert found[0] == (0.0, 17.2)
    assert found[1] == (18.3, 40.0)


def test_who_speaks_on_and_on_is_cut_at_the_quietest_place() -> None:
    samples = recording(seconds((0, 100)), 100 * RATE)
    samples[22 * RATE : 22 * RATE + RATE // 4] = 0
    found = cut(samples, find_speech=lambda _: seconds((0, 100)))
    assert found[0].end / RATE == pytest.approx(22.1, abs=0.2)
    assert all(piece.end - piece.start <= 30 * RATE for piece in found)
    assert (found[0].start, found[-1].end) == (0, 100 * RATE)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0.1, 20), st.floats(0.1, 5)), min_size=1, max_size=8),
    st.floats(2, 30),
)
def test_pieces_hold_all_speech_in_order_and_are_never_too_long(
    parts: list[tuple[float, float]], longest: float
) -> None:
    spans, at = [], 0
    for speech, gap in parts:
        at += int(gap * RATE)
        spans.append((at, at + int(speech * RATE)))
        at = spans[-1][1]
    total = at + RATE
    how = Cutting(max_seconds=longest, whole=0.0, pad=0.2)
    found = cut(torch.zeros(total), find_speech=lambda _: spans, cutting=how)
    assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))
    for piece in found:
        assert 0 <= piece.start < piece.end <= total
        assert piece.end - piece.start <= (longest + 2 * how.pad) * RATE + 1
    covered = np.zeros(total, dtype=bool)
    for piece in found:
        covered[piece.start : piece.end] = True
    for start, end in spans:
        assert covered[start:end].all()


def test_spans_may_be_objects_and_silero_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    class Span:
        start, end = RATE, 3 * RATE

    samples = torch.zeros(40 * RATE)
    assert cut(samples, find_speech=lambda _: [Span()]) == [Piece(RATE - 3200, 3 * RATE + 3200)]
    from lfm2_audio.voice import vad

    monkeypatch.setattr(vad, "speech_spans", lambda values: [Span()])
    assert cut(samples) == [Piece(RATE - 3200, 3 * RATE + 3200)]


def test_what_is_heard_has_times_and_progress() -> None:
    spans = seconds((1, 3), (6, 8), (11, 12))
    audio = Audio(recording(spans, 40 * RATE), RATE)
    heard: list[float] = []

    def listen(piece: Audio) -> str:
        heard.append(piece.duration)
        return ["first", " ", "third\n part"][len(heard) - 1]

    done: list[float] = []
    found = list(hear(audio, listen, find_speech=lambda _: spans, progress=done.append))
    assert found == [Segment(0.8, 3.2, "first"), Segment(10.8, 12.2, "third part")]
    assert heard == pytest.approx([2.4, 2.4, 1.4])
    assert done == pytest.approx([3.2, 8.2, 12.2, 40.0])


def test_a_piece_that_loops_is_heard_again_in_halves_and_then_cut() -> None:
    audio = Audio(recording(seconds((0, 20)), 20 * RATE), RATE)
    lengths: list[float] = []

    def listen(piece: Audio) -> str:
        lengths.append(piece.duration)
        return "you know " * 30 if len(lengths) != 2 else "fine"

    found = list(hear(audio, listen))
    assert [s.text for s in found] == ["fine", "you know"]
    assert [s.looped for s in found] == [False, True]
    assert lengths[0] == 20 and sum(lengths[1:]) == pytest.approx(20)
    assert found[0].end == found[1].start


def test_other_rates_are_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    audio = Audio(torch.full((48000,), 0.1), 48000)
    rates = []

    def listen(piece: Audio) -> str:
        rates.append((piece.rate, len(piece.samples)))
        return "x"

    assert list(hear(audio, listen)) == [Segment(0.0, 1.0, "x")]
    assert rates == [(16000, 16000)]


def test_scripts_without_spaces_are_joined_without() -> None:
    rows = [Segment(0, 1, t) for t in ("今日は", "晴れです。", "OK then", "fine")]
    assert joined(rows) == "今日は晴れです。OK then fine"
    assert joined([]) == ""


ROWS = [Segment(0.5, 2.0, "Is 3 < 4 & 5 --> 6?"), Segment(3661.25, 3670.0, "word " * 40)]


def test_subrip() -> None:
    text = as_srt(ROWS, 4000.0)
    cues = text.strip().split("\n\n")
    assert cues[0] == "1\n00:00:00,500 --> 00:00:02,000\nIs 3 < 4 & 5 -> 6?"
    assert len(cues) == 4
    assert [cue.split("\n")[0] for cue in cues] == ["1", "2", "3", "4"]
    starts = [cue.split("\n")[1].split(" --> ") for cue in cues[1:]]
    assert starts[0][0] == "01:01:01,250" and starts[-1][1] == "01:01:10,000"
    assert [a[1] for a in starts[:-1]] == [b[0] for b in starts[1:]]
    assert all(len(line) <= 42 for cue in cues for line in cue.split("\n")[2:])


def test_webvtt() -> None:
    text = as_vtt(ROWS, 4000.0)
    assert text.startswith("WEBVTT\n\n00:00:00.500 --> 00:00:02.000\nIs 3 &lt; 4 &amp; 5 --&gt; 6?")
    assert text.count("-->") == 4 and text.endswith("\n")


def test_text_and_json() -> None:
    assert as_txt(ROWS[:1], 2.0) == "Is 3 < 4 & 5 --> 6?\n"
    assert as_txt([], 2.0) == ""
    value = json.loads(as_json(ROWS[:1], 2.0004))
    assert value == {
        "text": "Is 3 < 4 & 5 --> 6?",
        "duration": 2.0,
        "segments": [
            {"id": 0, "start": 0.5, "end": 2.0, "text": "Is 3 < 4 & 5 --> 6?", "looped": False}
        ],
    }


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_nothing_said_is_no_error(form: str) -> None:
    assert isinstance(FORMATS[form]([], 1.0), str)


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 30), st.text(max_size=300)), max_size=4))
def test_no_text_breaks_a_subtitle_file(rows: list[tuple[float, float, str]]) -> None:
    made = [Segment(start, start + length, text) for start, length, text in rows]
    cues = [cue for cue in as_srt(made, 1.0).split("\n\n") if cue.strip("\n")]
    for i, cue in enumerate(cues, 1):
        lines = cue.strip("\n").split("\n")
        assert lines[0] == str(i) and lines[1].count(" --> ") == 1
        assert not any("-->" in line for line in lines[2:])
    assert all(name in segments.__all__ for name in ("Cutting", "Piece", "Segment"))
