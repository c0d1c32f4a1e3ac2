"""A transcript as plain text, SubRip, WebVTT or JSON.

Long segments become several subtitles of at most two lines, with times shared out by length.
Knows segments only.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

from lfm2_audio.segments import Segment, joined

__all__ = ["FORMATS", "as_json", "as_srt", "as_txt", "as_vtt"]

_WIDTH, _LINES = 42, 2  # what broadcasters use, for scripts of narrow letters


def as_txt(segments: Sequence[Segment], duration: float) -> str:
    """One paragraph."""
    text = joined(segments)
    return text + "\n" if text else ""


def as_srt(segments: Sequence[Segment], duration: float) -> str:
    """SubRip, as players read it."""
    cues = [
        f"{i}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{_arrowless(text)}\n"
        for i, (start, end, text) in enumerate(_cues(segments), 1)
    ]
    return "\n".join(cues)


def as_vtt(segments: Sequence[Segment], duration: float) -> str:
    """WebVTT, as browsers read it (W3C, WebVTT 1)."""
    cues = [
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{_escaped(text)}\n"
        for start, end, text in _cues(segments)
    ]
    return "\n".join(["WEBVTT\n", *cues])


def as_json(segments: Sequence[Segment], duration: float) -> str:
    """An object with text, duration and segments, times in seconds."""
    rows = [
        {"id": i, **asdict(s), "start": round(s.start, 3), "end": round(s.end, 3)}
        for i, s in enumerate(segments)
    ]
    value = {"text": joined(segments), "duration": round(duration, 3), "segments": rows}
    return json.dumps(value, ensure_ascii=False) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[Segment], float], str]] = {
    "txt": as_txt,
    "srt": as_srt,
    "vtt": as_vtt,
    "json": as_json,
}
"""Every format by the ending of its files: segments and seconds of the recording become text."""


def _cues(segments: Sequence[Segment]) -> Iterator[tuple[float, float, str]]:
    """Subtitles: start, end and text of one or two lines."""
    for segment in segments:
        lines = textwrap.wrap(" ".join(segment.text.split()), _WIDTH)
        blocks = [lines[i : i + _LINES] for i in range(0, len(lines), _LINES)]
        total = sum(map(len, lines)) or 1
        start, seconds = segment.start, segment.end - segment.start
        for i, block in enumerate(blocks):
            end = start + seconds * sum(map(len, block)) / total
            yield start, segment.end if i + 1 == len(blocks) else end, "\n".join(block)
            start = end


def _clock(seconds: float, point: str) -> str:
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{whole:02}{point}{thousandths:03}"


def _arrowless(text: str) -> str:
    return text.replace("-->", "->")  # what separates the times must not stand in a text


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
