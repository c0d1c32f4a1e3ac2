"""How a voice loop behaves: every knob with its default, and a check of what was asked for.

Knows nothing of the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lfm2_audio.voice.echo import EchoSettings
from lfm2_audio.voice.turns import TurnSettings
from lfm2_mm.errors import SettingError

__all__ = ["State", "VoiceSettings"]

State = Literal["listening", "hearing", "thinking", "speaking", "paused"]


@dataclass(frozen=True, kw_only=True)
class VoiceSettings:
    """How a voice loop behaves.

    Attributes:
        turns: What makes a turn.
        echo: How echo is kept out.
        vad: Which detector: `auto`, `silero` or `energy`.
        manual: Turns begin and end by `press` and `release` alone (push-to-talk).
        speculate: Whether to compute what was heard during the silence that may end a turn.
        max_frames: Frames of an answer at most.
        chunk_frames: Frames of the first chunk of sound, the second, …; the last repeats.
        ahead_s: So many seconds ahead of what is heard, the model stops and waits.
        keep: Share of the context that is kept when it is full.
        reserve: Positions kept free for an answer; None is an eighth of the context.
        output_delay_ms: From `play` to the ear: what a device holds back.
    """

    turns: TurnSettings = field(default_factory=TurnSettings)
    echo: EchoSettings = field(default_factory=EchoSettings)
    vad: Literal["auto", "silero", "energy"] = "auto"
    manual: bool = False
    speculate: bool = True
    max_frames: int = 600
    chunk_frames: tuple[int, ...] = (1, 2, 4, 8)
    ahead_s: float = 4.0
    keep: float = 0.5
    reserve: int | None = None
    output_delay_ms: int = 0

    def __post_init__(self) -> None:
        if not self.chunk_frames or min(self.chunk_frames) < 1:
            raise SettingError(
                f"chunk_frames is {self.chunk_frames}; give at least one number, each at least 1"
            )
        if not 0 < self.keep < 1:
            raise SettingError(f"keep is {self.keep}; it must lie between 0 and 1")
        if self.max_frames < 1 or self.ahead_s <= 0:
            raise SettingError(
                f"max_frames is {self.max_frames} and ahead_s {self.ahead_s}; both must be positive"
            )
        if self.output_delay_ms < 0 or (self.reserve is not None and self.reserve < 1):
            raise SettingError(
                f"output_delay_ms is {self.output_delay_ms} and reserve {self.reserve}; the first "
                "must not be negative, the second at least 1"
            )
