"""Where the time of one turn goes. Knows counts and clocks; nothing of turns or models."""

from __future__ import annotations

import time
from typing import Any

from lfm2_audio.voice.answer import Answer
from lfm2_audio.voice.vad import RATE

__all__ = ["Stopwatch"]


class Stopwatch:
    """Times of one turn.

    Attributes:
        heard_at: Sample of the input at which the first sample was given out.
    """

    def __init__(self, at: int = 0, spoken: int = 0) -> None:
        self._at, self._spoken = at, spoken
        self._ended = time.perf_counter()
        self.heard_at: int | None = None

    def report(self, answer: Answer, *, frame_seconds: float, gaps: float) -> dict[str, Any]:
        """Fields of `TurnLatency`.

        Args:
            answer: What was made.
            frame_seconds: Length of a frame of speech.
            gaps: Seconds of silence in the midst of it.
        """
        fields: dict[str, Any] = {
            "response_id": answer.response_id,
            "vad_ms": _ms((self._at - self._spoken) / RATE),
            "frames": answer.frames,
            "gaps_ms": _ms(gaps),
        }
        if answer.first_text is not None:
            fields["first_token_ms"] = _ms(answer.first_text - self._ended)
        if answer.first_audio is not None:
            fields["first_audio_ms"] = _ms(answer.first_audio - self._ended)
        if self.heard_at is not None:
            fields["heard_ms"] = _ms((self.heard_at - self._spoken) / RATE)
        if answer.frames:
            fields["real_time"] = round(answer.busy / (answer.frames * frame_seconds), 3)
        if answer.done is not None:
            timings, usage = answer.done.timings, answer.done.usage
            fields |= {
                "encode_ms": _ms(timings.encode),
                "prefill_ms": _ms(timings.prefill),
                "cached": usage.cached_tokens,
                "positions": usage.prompt_tokens,
            }
        return fields


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)
