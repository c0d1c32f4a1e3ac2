"""Long recordings: cut at silences into pieces that a model hears one by one, with their times.

Knows samples at 16 kHz, spans of speech and text; nothing of models (what hears a piece is a
callable) and nothing of how speech is told from silence (another one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from lfm2_audio.repetition import cut_loops
from lfm2_audio.waveform import Audio

__all__ = ["RATE", "Cutting", "Piece", "Segment", "cut", "hear", "joined"]

RATE = 16000
"""Samples a second of everything here."""

FindSpeech = Callable[[Float[np.ndarray, " n"]], Sequence[Any]]
"""Spans of speech, `(start, end)` or with these attributes, in samples and in order."""

_AUDIBLE = 5e-4  # what never gets so loud (-66 dB) is silence, into which models read words
_BLOCK = 320  # samples of one look for the quietest place, 20 ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutting:
    """How a recording is cut.

    Attributes:
        max_seconds: The longest piece, its pads not counted, so that it stays below `whole`.
        pause: A silence of so many seconds always ends a piece.
        pad: Seconds of silence kept at each end of a piece.
        whole: Recordings of up to so many seconds are heard as they are, speech or noise.
    """

    max_seconds: float = 29.5
    pause: float = 2.0
    pad: float = 0.2
    whole: float = 30.0

    @classmethod
    def for_subtitles(cls) -> Cutting:
        """Short pieces, whose times say when something was said."""
        return cls(max_seconds=12.0, pause=0.6, whole=0.0)


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples `start` to `end` (exclusive) of a recording."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Segment:
    """What was said in one piece.

    Attributes:
        start: Seconds from the beginning of the recording.
        end: Seconds from the beginning of the recording.
        text: The words.
        looped: Whether the model repeated itself and was cut.
    """

    start: float
    end: float
    text: str
    looped: bool = False


def cut(
    samples: Float[Tensor, " n"],
    *,
    find_speech: FindSpeech | None = None,
    cutting: Cutting | None = None,
) -> list[Piece]:
    """Pieces of a recording at 16 kHz, in order and apart from each other; silence is left out.

    A piece ends at the longest silence that its length allows, or, where somebody speaks on and
    on, at the quietest place.

    Args:
        samples: Mono.
        find_speech: By default silero-vad, as `lfm2_audio.voice.vad` runs it.
        cutting: How.
    """
    how = cutting or Cutting()
    values = samples.numpy()
    if len(values) <= how.whole * RATE:
        audible = len(values) and np.abs(values).max() >= _AUDIBLE
        return [Piece(0, len(values))] if audible else []
    spans = _spans(values, find_speech)
    longest = int(how.max_seconds * RATE)
    spans = [part for span in spans for part in _short_enough(values, span, longest)]
    return _padded(_grouped(spans, how), int(how.pad * RATE), len(values))


def _spans(values: Float[np.ndarray, " n"], find_speech: FindSpeech | None) -> list[Piece]:
    if find_speech is None:
        from lfm2_audio.voice.vad import speech_spans

        find_speech = speech_spans
    found = []
    for span in find_speech(values):
        start, end = span if isinstance(span, tuple) else (span.start, span.end)
        found.append(Piece(max(int(start), 0), min(int(end), len(values))))
    return [piece for piece in found if piece.end > piece.start]


def _short_enough(values: Float[np.ndarray, " n"], span: Piece, longest: int) -> Iterator[Piece]:
    """A span cut at quiet places until every part is short enough."""
    start = span.start
    while span.end - start > longest:
        place = quietest(values, start + longest // 2, start + longest)
        yield Piece(start, place)
        start = place
    yield Piece(start, span.end)


def quietest(values: Float[np.ndarray, " n"], low: int, high: int) -> int:
    """The middle of the quietest fifth of a second between two samples."""
    blocks = max((high - low) // _BLOCK, 1)
    part = values[low : low + blocks * _BLOCK]
    energy = np.square(part[: len(part) // blocks * blocks].reshape(blocks, -1)).mean(axis=1)
    width = min(10, blocks)
    smooth = np.convolve(energy, np.ones(width) / width, mode="valid")
    return low + (int(smooth.argmin()) + width // 2) * _BLOCK


def _grouped(spans: Sequence[Piece], how: Cutting) -> list[Piece]:
    """Neighbouring spans become one piece, as long as that is short enough."""
    pieces: list[Piece] = []
    longest, pause = how.max_seconds * RATE, how.pause * RATE
    i = 0
    while i < len(spans):
        j = i + 1
        while (
            j < len(spans)
            and spans[j].end - spans[i].start <= longest
            and spans[j].start - spans[j - 1].end < pause
        ):
            j += 1
        full = j < len(spans) and spans[j].start - spans[j - 1].end < pause
        if full:  # cut at the longest silence of the later half, not where the length ran out
            middle = spans[i].start + longest / 2
            later = [m for m in range(i + 1, j + 1) if spans[m].start >= middle]
            if later:
                j = max(later, key=lambda m: (spans[m].start - spans[m - 1].end, m))
        pieces.append(Piece(spans[i].start, spans[j - 1].end))
        i = j
    return pieces


def _padded(pieces: Sequence[Piece], pad: int, total: int) -> list[Piece]:
    out = []
    for i, piece in enumerate(pieces):
        low = (pieces[i - 1].end + piece.start) // 2 if i else 0
        high = (piece.end + pieces[i + 1].start) // 2 if i + 1 < len(pieces) else total
        out.append(Piece(max(piece.start - pad, low), min(piece.end + pad, high)))
    return out


def hear(
    audio: Audio,
    listen: Callable[[Audio], str],
    *,
    find_speech: FindSpeech | None = None,
    cutting: Cutting | None = None,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Segment]:
    """What is said in a recording, piece by piece as it is recognised; empty pieces are left out.

    Where the model repeats itself in a piece, the piece is heard again in two halves; what then
    still repeats is cut.

    Args:
        audio: Any rate and length.
        listen: The model: text of a piece at 16 kHz.
        find_speech: See `cut`.
        cutting: See `cut`.
        progress: Told after each piece how many seconds of the recording are done.
    """
    audio = audio.resampled(RATE)
    for piece in cut(audio.samples, find_speech=find_speech, cutting=cutting):
        yield from _hear_piece(audio, piece, listen)
        if progress is not None:
            progress(piece.end / RATE)
    if progress is not None:
        progress(audio.duration)


def _hear_piece(
    audio: Audio, piece: Piece, listen: Callable[[Audio], str], *, again: bool = True
) -> Iterator[Segment]:
    text = " ".join(listen(Audio(audio.samples[piece.start : piece.end], RATE)).split())
    text, looped = cut_loops(text)
    seconds = (piece.end - piece.start) / RATE
    if looped and again and seconds > 4:
        third = (piece.end - piece.start) // 3
        middle = quietest(audio.samples.numpy(), piece.start + third, piece.end - third)
        for half in (Piece(piece.start, middle), Piece(middle, piece.end)):
            yield from _hear_piece(audio, half, listen, again=False)
    elif text:
        yield Segment(piece.start / RATE, piece.end / RATE, text, looped)


def joined(segments: Sequence[Segment]) -> str:
    """The text of all segments; no space where a script has none."""
    out = ""
    for segment in segments:
        gap = out and not (_is_dense(out[-1]) or _is_dense(segment.text[0]))
        out += (" " if gap else "") + segment.text
    return out


def _is_dense(letter: str) -> bool:
    """Whether a letter belongs to a script that is written without spaces (CJK, Thai)."""
    return (
        "\u2e80" <= letter <= "\u9fff"
        or "\uff00" <= letter <= "\uffef"
        or ("\u0e00" <= letter <= "\u0eff")
    )
