"""What a voice loop reports beyond the Realtime API: pauses, dropped context, latency.

Their types begin with `lfm2_mm.`, so that no client takes them for OpenAI's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lfm2_audio.voice.events import VoiceEvent

__all__ = [
    "NO_SILERO",
    "ContextDropped",
    "Notice",
    "OutputPaused",
    "OutputResumed",
    "TurnDismissed",
    "TurnLatency",
    "Warmed",
]

NO_SILERO = (
    "silero-vad is not installed, so loudness alone tells speech from noise; run "
    "pip install 'lfm2-mm[audio]'"
)
"""What a `Notice` says of it."""


@dataclass(frozen=True, kw_only=True)
class OutputPaused(VoiceEvent):
    """Somebody may be speaking: the output is silent until that is known."""

    type: ClassVar[str] = "lfm2_mm.output.paused"
    response_id: str
    heard_ms: int


@dataclass(frozen=True, kw_only=True)
class OutputResumed(VoiceEvent):
    """It was no turn: the output goes on."""

    type: ClassVar[str] = "lfm2_mm.output.resumed"
    response_id: str


@dataclass(frozen=True, kw_only=True)
class TurnDismissed(VoiceEvent):
    """What was heard was too short for a turn."""

    type: ClassVar[str] = "lfm2_mm.turn.dismissed"
    audio_start_ms: int


@dataclass(frozen=True, kw_only=True)
class Warmed(VoiceEvent):
    """What is known of the conversation was computed ahead.

    Attributes:
        positions: Of the prompt.
        computed: Those that were not there yet.
    """

    type: ClassVar[str] = "lfm2_mm.conversation.warmed"
    positions: int
    computed: int


@dataclass(frozen=True, kw_only=True)
class ContextDropped(VoiceEvent):
    """The context is full: the oldest turns are gone, the rest is computed again."""

    type: ClassVar[str] = "lfm2_mm.context.dropped"
    turns: int
    positions_before: int
    positions_after: int


@dataclass(frozen=True, kw_only=True)
class Notice(VoiceEvent):
    """Something to be known that is no error."""

    type: ClassVar[str] = "lfm2_mm.notice"
    message: str


@dataclass(frozen=True, kw_only=True)
class TurnLatency(VoiceEvent):
    """Where the time of one turn went, in milliseconds; None for what did not come about.

    Attributes:
        vad_ms: From the last speech to the end of the turn, by the clock of the audio.
        encode_ms: Computing rows of what was heard; behind the end of the turn only.
        prefill_ms: Computing the prompt; behind the end of the turn only.
        first_token_ms: From the end of the turn to the first token.
        first_audio_ms: From the end of the turn to the first samples.
        heard_ms: From the last speech to the first sample given out, by the clock of the audio.
        cached: Positions of the prompt found computed.
        positions: Positions of the prompt.
        frames: Frames of speech generated.
        real_time: Seconds of generating per second of speech.
        gaps_ms: Silence in the midst of the answer, for want of samples.
    """

    type: ClassVar[str] = "lfm2_mm.turn.latency"
    response_id: str
    vad_ms: float | None = None
    encode_ms: float | None = None
    prefill_ms: float | None = None
    first_token_ms: float | None = None
    first_audio_ms: float | None = None
    heard_ms: float | None = None
    cached: int | None = None
    positions: int | None = None
    frames: int = 0
    real_time: float | None = None
    gaps_ms: float = 0.0

    def line(self) -> str:
        """One line for a terminal."""
        parts = []
        for name in ("vad", "encode", "prefill", "first_token", "first_audio", "heard"):
            value = getattr(self, f"{name}_ms")
            if value is not None:
                parts.append(f"{name.replace('_', ' ')} {value:.0f} ms")
        if self.cached is not None:
            parts.append(f"{self.cached} of {self.positions} positions cached")
        if self.real_time is not None:
            parts.append(f"real time x{self.real_time:.2f}")
        if self.gaps_ms:
            parts.append(f"gaps {self.gaps_ms:.0f} ms")
        return " · ".join(parts)
