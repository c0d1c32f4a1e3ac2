"""A line on the terminal that shows how loud it is and what the loop is doing.

Drawn with rich on stderr, and only where a person reads that. Knows nothing of sound beyond a
level in dBFS.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from lfm2_audio.voice.settings import State
from lfm2_mm.cli.terminal import is_terminal

__all__ = ["Meter", "bar"]

_WORDS: dict[State, tuple[str, str]] = {
    "listening": ("listening", "dim"),
    "hearing": ("you speak", "green"),
    "thinking": ("thinking", "yellow"),
    "speaking": ("speaking", "cyan"),
    "paused": ("paused", "magenta"),
}
_LOW, _HIGH, _WIDTH = -60.0, 0.0, 24
_BLOCKS = " ▏▎▍▌▋▊▉█"


def bar(level: float, width: int = _WIDTH) -> str:
    """A level in dBFS as a bar of so many characters: empty at -60 or less, full at 0."""
    share = (min(max(level, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW)
    eighths = round(share * width * 8)
    text = "█" * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")
    return text.ljust(width)


class Meter:
    """Redraws its line ten times a second, between `with` and its end.

    Args:
        look: Gives the level in dBFS and the state of the loop.
        shown: Whether to draw at all; by default where stderr is a terminal.
    """

    def __init__(self, look: Callable[[], tuple[float, State]], shown: bool | None = None) -> None:
        self._look = look
        self.shown = is_terminal(sys.stderr) if shown is None else shown
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._console: Any = None

    def __enter__(self) -> Meter:
        if self.shown:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)
            self._thread = threading.Thread(target=self._run, daemon=True, name="lfm2-meter")
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
            self._wipe()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The line is wiped while something else is written."""
        with self._lock:
            if self._thread is not None:
                self._wipe()
            yield

    def draw(self) -> None:
        """Draw the line now."""
        from rich.text import Text

        level, state = self._look()
        words, style = _WORDS[state]
        colour = "red" if level > -3 else "green"
        line = Text.assemble(
            (f"{words:<10}", style), (bar(level), colour), f" {max(level, _LOW):4.0f} dB"
        )
        with self._lock:
            self._console.print(line, end="\r", overflow="crop", no_wrap=True)

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.draw()

    def _wipe(self) -> None:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
