"""What is to be heard next: chunks go in, samples come out at the pace of whoever plays them.

Counts to the sample what was given out of the running answer, so that an interruption knows what
was heard. Pauses and stops with a short fade. Safe to use from several threads; knows no device.
"""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
from jaxtyping import Float

__all__ = ["Speaker"]


class Speaker:
    """A queue of samples with a pause button.

    Args:
        rate: Samples per second.
        fade_ms: Length of the fades at a pause, its end, and a stop.
    """

    def __init__(self, rate: int, *, fade_ms: float = 5.0) -> None:
        self.rate = rate
        self._fade = max(1, round(fade_ms * rate / 1000))
        self._lock = threading.Lock()
        self._chunks: deque[np.ndarray] = deque()
        self._pending = self._held = self._heard = self._gaps = self._dry = 0
        self._paused = self._sounding = False
        self._gain = 1.0
        self._last = 0.0

    @property
    def heard(self) -> int:
        """Samples of the running answer that were given out."""
        return self._heard

    @property
    def pending(self) -> int:
        """Samples that wait."""
        return self._pending + self._held

    @property
    def paused(self) -> bool:
        """Whether the pause button is down."""
        return self._paused

    @property
    def gaps(self) -> int:
        """Samples of silence given out in the midst of the running answer for want of better."""
        return self._gaps

    def begin(self) -> None:
        """A new answer follows; what still waits of an earlier one is dropped."""
        self.clear()
        with self._lock:
            self._heard = self._gaps = self._dry = 0
            self._sounding = False

    def put(self, chunk: Float[np.ndarray, " n"], *, hold: bool = False) -> None:
        """Append samples; with `hold` they are given out only after `release`."""
        if len(chunk):
            with self._lock:
                self._chunks.append(np.ascontiguousarray(chunk, dtype=np.float32))
                if hold:
                    self._held += len(chunk)
                else:
                    self._pending += len(chunk)

    def release(self) -> None:
        """What was held may be given out."""
        with self._lock:
            self._pending, self._held = self._pending + self._held, 0

    def pause(self) -> None:
        """Fall silent, and go on from there after `resume`."""
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        """Go on."""
        with self._lock:
            self._paused = False

    def clear(self) -> int:
        """Drop what waits and let go of the pause button; returns how many samples it was."""
        with self._lock:
            dropped = self._pending + self._held
            self._chunks.clear()
            self._pending = self._held = 0
            self._paused = False
            return dropped

    def take(self, n: int) -> Float[np.ndarray, " n"]:
        """The next `n` samples; silence where there are none."""
        out = np.zeros(n, dtype=np.float32)
        with self._lock:
            wanted = min(self._fade if self._gain > 0 else 0, n) if self._paused else n
            got = self._fill(out, wanted)
            self._shape(out, got)
            self._heard += got
            if got:
                self._gaps, self._dry = self._gaps + self._dry, 0
                self._sounding = True
            if self._sounding and not self._paused:
                self._dry += wanted - got
        return out

    # -- under the lock ----------------------------------------------------------------------

    def _fill(self, out: np.ndarray, wanted: int) -> int:
        wanted = min(wanted, self._pending)
        got = 0
        while got < wanted:
            chunk = self._chunks[0]
            n = min(len(chunk), wanted - got)
            out[got : got + n] = chunk[:n]
            got += n
            if n == len(chunk):
                self._chunks.popleft()
            else:
                self._chunks[0] = chunk[n:]
        self._pending -= got
        return got

    def _shape(self, out: np.ndarray, got: int) -> None:
        """Fades: out at a pause, in behind it, and a ramp to zero where sound breaks off."""
        target = 0.0 if self._paused else 1.0
        if self._gain != target and got:
            n = min(got, self._fade)
            out[:n] *= np.linspace(self._gain, target, n, dtype=np.float32)
            if target == 0.0:
                out[n:got] = 0.0
            self._gain = target
        elif self._paused:
            self._gain = 0.0
        if not len(out):
            return
        edge = float(out[got - 1]) if got else self._last
        if got < len(out) and edge:
            n = min(len(out) - got, self._fade)
            out[got : got + n] += np.linspace(edge, 0.0, n, dtype=np.float32)
        self._last = float(out[-1])
