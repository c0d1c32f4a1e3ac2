"""Where a text may be cut: behind sentences, behind lines, between words, last between letters.

Every function is linear in the span it looks at, whatever the span holds. This module knows
characters only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

__all__ = ["cut_before", "line_ends", "sentence_ends", "word_starts"]

_ENDS, _WIDE_ENDS = ".!?…؟۔।", "。！？．｡"
_CLOSING = "\"'”’»)\\]」』）】》"
# Possessive, and only at the first mark of a run: a text of nothing but dots stays linear.
_SENTENCE = re.compile(
    rf"(?<![{_ENDS}])[{_ENDS}]++[{_CLOSING}]*+\s++(?![a-zà-ÿа-я])"
    rf"|(?<![{_WIDE_ENDS}])[{_WIDE_ENDS}]++[{_CLOSING}]*+\s*+"
)
_LINE = re.compile(r"\n")
_CLAUSE = re.compile(r"[、，；：,;:،؛]\s*+")
_WORD = re.compile(r"(?<=\s)\S")
_IDEOGRAPH = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f]")
_JOINERS = frozenset("\u200c\u200d\ufe0e\ufe0f")


def sentence_ends(text: str, start: int, end: int) -> Iterator[int]:
    """Ascending positions behind each sentence of `text[start:end]`; the last is `end`."""
    yield from _behind(_SENTENCE, text, start, end)


def line_ends(text: str, start: int, end: int) -> Iterator[int]:
    """Ascending positions behind each line of `text[start:end]`; the last is `end`."""
    yield from _behind(_LINE, text, start, end)


def _behind(pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[int]:
    for match in pattern.finditer(text, start, end):
        if match.end() < end:
            yield match.end()
    if start < end:
        yield end


def word_starts(text: str, start: int, end: int) -> list[int]:
    """Ascending positions in (start, end) where a word starts, or an ideograph stands."""
    words = {match.start() for match in _WORD.finditer(text, start, end)}
    words.update(match.start() for match in _IDEOGRAPH.finditer(text, start, end))
    return sorted(at for at in words if at > start and not _joined(text, at))


def cut_before(text: str, start: int, end: int) -> int:
    """The best place in (start, end] to cut a span that is too long.

    Behind the last clause mark or space of its second half; else, in a script without spaces or a
    very long word, as late as no combining character is parted from its base.
    """
    if end >= len(text):
        return end
    middle = start + (end - start) // 2
    at = -1
    for match in _CLAUSE.finditer(text, middle, end):
        at = match.end()
    if at < 0:
        spaces = (text.rfind(space, middle, end) for space in (" ", "\n", "\t", "\u3000"))
        at = max(spaces) + 1
    if at > start:
        return at
    while end > start + 1 and _joined(text, end):
        end -= 1
    return end


def _joined(text: str, at: int) -> bool:
    """Whether the character at a position belongs to the one before it."""
    if at >= len(text):
        return False
    mark = text[at]
    return (
        bool(unicodedata.combining(mark))
        or unicodedata.category(mark) in ("Mn", "Me", "Mc")
        or mark in _JOINERS
        or text[at - 1] == "\u200d"
    )
