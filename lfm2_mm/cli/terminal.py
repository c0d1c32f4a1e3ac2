"""What reaches the terminal, and what does not: sentences, a dim line, no noise, no control codes.

Knows streams and texts; nothing of models. stdout belongs to answers, so only `Answers` writes
there; everything else here goes to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

__all__ = [
    "Answers",
    "amount",
    "clean",
    "count",
    "dim",
    "fail",
    "is_terminal",
    "print_json",
    "say",
    "silence_libraries",
    "size",
    "warn",
    "working",
]

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def is_terminal(stream: Any) -> bool:
    """Whether a person reads this stream."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def clean(text: str) -> str:
    """The text without characters that steer a terminal: escapes, bells, direction overrides."""
    return "".join(c for c in text if c in "\n\t" or not _steers(c))


def _steers(c: str) -> bool:
    return unicodedata.category(c) == "Cc" or c in _DIRECTIONS


def say(text: str, *, quiet: bool = False) -> None:
    """A line on stderr."""
    if not quiet:
        click.echo(clean(text), err=True)


def warn(text: str) -> None:
    """A warning on stderr."""
    say(f"warning: {text}")


def fail(text: str) -> None:
    """The one sentence of a failure."""
    say(f"error: {text}")


def dim(text: str, *, quiet: bool = False) -> None:
    """A decoration: shown only where a person reads stderr."""
    if quiet or not is_terminal(sys.stderr):
        return
    styled = clean(text) if os.environ.get("NO_COLOR") else click.style(clean(text), dim=True)
    click.echo(styled, err=True)


@contextmanager
def working(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Say on the terminal what is being waited for, and wipe it afterwards."""
    shown = not quiet and is_terminal(sys.stderr)
    if shown:
        click.echo(f"{clean(text)} …", err=True, nl=False)
    try:
        yield
    finally:
        if shown:
            click.echo("\r\x1b[K", err=True, nl=False)


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout."""
    click.echo(json.dumps(value, ensure_ascii=False))


def count(n: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def amount(n: float) -> str:
    """A number of parameters: `3.1M`, `8.3B`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= unit:
            return f"{n / unit:.1f}{letter}" if n < 100 * unit else f"{n / unit:.0f}{letter}"
    return f"{n:.0f}"


def size(n: float) -> str:
    """A number of bytes: `7.1 MB`, `1.9 GB`."""
    for unit, letter in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{n / unit:.1f} {letter}"
    return f"{n:.0f} B"


class Answers:
    """Writes an answer to stdout as it comes, and thinking to stderr.

    A piece may end in the middle of a marker, so that text which may become one is held back.
    On a terminal control characters are left out.
    """

    def __init__(self, *, thinking: bool = False, quiet: bool = False) -> None:
        from lfm2_mm.toolcalls import THINK_END, THINK_START

        self._start, self._end = THINK_START, THINK_END
        self._mode = "think" if thinking else "begin"
        self._held = ""
        self._quiet = quiet
        self._safe = is_terminal(sys.stdout)
        self._tail = ""

    def write(self, piece: str) -> None:
        """The next piece of raw output."""
        self._held += piece
        if self._mode == "begin":
            text = self._held.lstrip()
            if text.startswith(self._start):
                self._mode, self._held = "think", text.removeprefix(self._start)
            elif self._start.startswith(text):
                return
            else:
                self._mode = "text"
        if self._mode == "think":
            before, marker, after = self._held.partition(self._end)
            if not marker:
                keep = _overlap(before, self._end)
                self._think(before[: len(before) - keep])
                self._held = before[len(before) - keep :]
                return
            self._think(before)
            self._mode, self._held = "between", after
        if self._mode == "between":
            self._held = self._held.lstrip()
            if not self._held:
                return
            self._mode = "text"
        self._out(self._held)
        self._held = ""

    def close(self) -> None:
        """Write what is held back, and end the line."""
        if self._held:
            self._think(self._held) if self._mode == "think" else self._out(self._held)
        self._held = ""
        if self._tail != "\n":
            self._out("\n")

    def _out(self, text: str) -> None:
        if text:
            sys.stdout.write(clean(text) if self._safe else text)  # click would take colours out
            sys.stdout.flush()
            self._tail = text[-1]

    def _think(self, text: str) -> None:
        if text and not self._quiet and is_terminal(sys.stderr):
            click.echo(click.style(clean(text), dim=True), err=True, nl=False)


def _overlap(text: str, marker: str) -> int:
    """How many last characters of `text` may be the beginning of `marker`."""
    return next((n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0)


def silence_libraries() -> None:
    """Keep advice and bars of other libraries off the terminal; LFM2_MM_LOG=debug lets them speak.

    Must run before they are imported, for that is when they read the environment.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    level = os.environ.get("LFM2_MM_LOG", "").strip().upper()
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("lfm2_mm").setLevel(level if level in logging.getLevelNamesMapping() else 30)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if level == "DEBUG":
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.simplefilter("ignore")
    for library in ("transformers", "huggingface_hub", "torch", "PIL", "httpx2", "httpcore2"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
