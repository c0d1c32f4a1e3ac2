"""What the verbs of speech give back: a transcript, a spoken reply.

Plain values; knows nothing of how they came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from lfm2_mm.events import Done, FinishReason, Timings, Usage

if TYPE_CHECKING:
    from lfm2_audio.conversation import Conversation
    from lfm2_audio.segments import Segment
    from lfm2_audio.waveform import Audio

__all__ = ["Reply", "Transcript", "together"]


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording.

    Attributes:
        text: All of it.
        segments: Its pieces, with their times in seconds.
        done: Token counts and times, all pieces together.
    """

    text: str
    segments: tuple[Segment, ...]
    done: Done

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Reply:
    """A spoken answer.

    Attributes:
        text: What was written.
        audio: What was said; of no length if nothing was.
        conversation: The conversation with this answer in it, to be continued.
        done: Finish reason, token counts and times.
        dropped: How many of the oldest turns did not fit into the context and were left out.
    """

    text: str
    audio: Audio
    conversation: Conversation
    done: Done
    dropped: int = 0


def together(parts: Sequence[Done]) -> Done:
    """Counts and times of several requests as if they were one.

    The first token is the first request's; the reason is "stop" unless one was cut short.
    """
    if not parts:
        return Done("stop", Usage(), Timings())
    cut = (part.finish_reason for part in parts if part.finish_reason != "stop")
    reason: FinishReason = next(cut, "stop")
    usage = {f.name: sum(getattr(part.usage, f.name) for part in parts) for f in fields(Usage)}
    times = {f.name: sum(getattr(part.timings, f.name) for part in parts) for f in fields(Timings)}
    times["first_token"] = parts[0].timings.first_token
    return Done(reason, Usage(**usage), Timings(**times))
