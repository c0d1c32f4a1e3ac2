"""Helpers for readers: lines of a text with their places, and a text built up block by block.

This module knows no format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Block, Kind, Limits
from lfm2_retrieval.documents.readers.decoding import clean

__all__ = ["ITEM", "Builder", "Line", "lines", "looks_like_heading", "trimmed"]

ITEM = re.compile(r"[ \t]*(?:[-*+•‣·–]|\d{1,3}[.)]|[a-zA-Z][.)]|\(\d{1,3}\))[ \t]+\S|\s*[・①-⑳]")

_MAX_HEADING = 60
_SENTENCE_ENDS = tuple(".!?…:;,。！？：；、，؟؛،")


class Line(NamedTuple):
    """One line of a text: its number from 1, its span without the line end, and what it says."""

    number: int
    start: int
    end: int
    text: str

    @property
    def blank(self) -> bool:
        """Whether it holds nothing but space."""
        return not self.text or self.text.isspace()


def lines(text: str) -> Iterator[Line]:
    """The lines of a text; only a newline ends one."""
    start, number = 0, 1
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield Line(number, start, end, text[start:end])
        start, number = end + 1, number + 1


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the space at its ends."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def looks_like_heading(line: str) -> bool:
    """Whether a line that stands alone reads like a heading: short, with letters, no sentence."""
    line = line.strip()
    return (
        len(line) <= _MAX_HEADING
        and not line.endswith(_SENTENCE_ENDS)
        and any(letter.isalpha() for letter in line)
    )


class Builder:
    """A text put together from blocks, for formats whose text is not the file's own.

    Args:
        limits: How long the text may become.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._parts: list[str] = []
        self._length = 0
        self.blocks: list[Block] = []

    def add(
        self,
        text: str,
        kind: Kind = "paragraph",
        *,
        page: int | None = None,
        line: int | None = None,
        level: int = 0,
    ) -> None:
        """Append a block; one of nothing but space is left out.

        Raises:
            DocumentError: if the text is longer than allowed.
        """
        text = clean(text).strip()
        if not text:
            return
        tight = self.blocks and kind in ("item", "row") and self.blocks[-1].kind == kind
        gap = "" if not self.blocks else "\n" if tight else "\n\n"
        start = self._length + len(gap)
        self._length = start + len(text)
        if self._length > self._limits.characters:
            raise DocumentError(
                f"its text has more than the {self._limits.characters} characters that are "
                "allowed: split it"
            )
        self._parts += [gap, text]
        self.blocks.append(Block(start, self._length, kind, page, line, level))

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._parts)

    def heading(self) -> str | None:
        """The first heading."""
        found = next((b for b in self.blocks if b.kind == "heading"), None)
        return self.text[found.start : found.end] if found else None
