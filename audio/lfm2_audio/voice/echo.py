"""Open speakers: what the microphone hears of our own voice must not count as somebody's.

A half-duplex gate. While it learns how loud the echo is, nothing passes; afterwards only what is
clearly louder than the echo expected of what is being played. Knows levels; it removes no echo (a
browser or a headset does that better) and knows no turns.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from lfm2_audio.voice.turns import samples
from lfm2_audio.voice.vad import WINDOW
from lfm2_mm.errors import SettingError

__all__ = ["EchoGate", "EchoSettings"]

_SILENT = 1e-7  # mean square, -70 dBFS


@dataclass(frozen=True, kw_only=True)
class EchoSettings:
    """How echo is kept out.

    Attributes:
        mode: `off` for headsets and browsers, which cancel echo themselves; `gate` as described
            above; `half` hears nothing at all while something is played.
        warmup_ms: Sound played until the echo is known; nothing passes meanwhile.
        margin_db: By how much a voice must be louder than the expected echo.
        delay_ms: How late an echo may arrive, devices and room together.
        start_db: Echo against output that is assumed where the warm-up is 0.
    """

    mode: Literal["off", "gate", "half"] = "off"
    warmup_ms: int = 3000
    margin_db: float = 9.0
    delay_ms: int = 350
    start_db: float = -6.0

    def __post_init__(self) -> None:
        if self.mode not in ("off", "gate", "half"):
            raise SettingError(f"the echo mode is {self.mode!r}; it must be off, gate or half")
        if self.warmup_ms < 0 or self.delay_ms < 0:
            raise SettingError(
                f"warmup_ms is {self.warmup_ms} and delay_ms {self.delay_ms}; neither may be "
                "negative"
            )


class EchoGate:
    """Says of each window heard whether it may count.

    Args:
        settings: How echo is kept out.
    """

    def __init__(self, settings: EchoSettings | None = None) -> None:
        self.settings = settings or EchoSettings()
        self._played: deque[tuple[int, float]] = deque(maxlen=4096)
        self._learnt = 0
        self._coupling = 0.0 if self.settings.warmup_ms else 10 ** (self.settings.start_db / 10)

    @property
    def warm(self) -> bool:
        """Whether the echo is known."""
        return self._learnt >= samples(self.settings.warmup_ms)

    @property
    def coupling_db(self) -> float:
        """How loud the echo is against what is played, as far as it is known."""
        return 10 * float(np.log10(self._coupling + 1e-12))

    def played(self, chunk: Float[np.ndarray, " n"], at: int) -> None:
        """Take note of what goes to the speakers, at the time `at` (samples at 16 kHz)."""
        if self.settings.mode != "off" and len(chunk):
            power = float(np.mean(np.square(chunk, dtype=np.float64)))
            if power > _SILENT:
                self._played.append((at, power))

    def passes(self, window: Float[np.ndarray, " w"], at: int) -> bool:
        """Whether the window that ends at `at` may hold somebody's voice."""
        s = self.settings
        if s.mode == "off":
            return True
        while self._played and self._played[0][0] < at - WINDOW - samples(s.delay_ms):
            self._played.popleft()
        if not self._played:
            return True
        if s.mode == "half":
            return False
        reference = max(power for _, power in list(self._played))
        heard = float(np.mean(np.square(window, dtype=np.float64)))
        ratio = heard / reference
        if not self.warm:
            self._learnt += WINDOW
            self._coupling = max(self._coupling, ratio)
            return False
        if ratio > self._coupling * 10 ** (s.margin_db / 10):
            return True
        # louder echo is believed at once, quieter echo by about 1.5 dB a second
        self._coupling = max(ratio, self._coupling * 0.99)
        return False
