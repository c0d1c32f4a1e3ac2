"""Loops in recognised text: found while it is written, and cut out of what was written.

Speech models sometimes repeat a phrase until a limit stops them. Somebody may well say "no" four
times, so a phrase must come back often, and fill much text, before it counts. Knows text only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Loop", "LoopWatch", "cut_loops", "find_loop"]

_LONGEST = 24  # words of a phrase that may loop
_WORDS = 12  # words that a loop fills at least, and
_TIMES = 4  # times that its phrase comes at least (a phrase of many words: three times)
_LONG_PHRASE = 8
_LETTERS, _LETTER_TIMES = 36, 6  # the same for scripts without spaces, in characters
_WORD = re.compile(r"\S+")
_EDGE = "".join(chr(c) for c in range(33, 127) if not chr(c).isalnum()) + "…。、，！？"


@dataclass(frozen=True, slots=True)
class Loop:
    """Where a text repeats itself.

    Attributes:
        start: Index of the first character of the phrase's first copy.
        once: Index behind that copy.
        end: Index behind the last copy.
        times: How many whole copies there are.
    """

    start: int
    once: int
    end: int
    times: int


def find_loop(text: str) -> Loop | None:
    """The first loop of a text, by words and then by characters; None if there is none.

    Case and punctuation do not tell copies apart.
    """
    places = [(m.start(), m.end(), m[0].strip(_EDGE).casefold()) for m in _WORD.finditer(text)]
    words = [word for _, _, word in places]
    found = _first(words)
    if found is not None:
        begin, period, times = found
        last = begin + period * times
        while last < len(words) and words[last] == words[last - period]:
            last += 1  # a copy that was begun belongs to it
        return Loop(places[begin][0], places[begin + period - 1][1], places[last - 1][1], times)
    run = next((m for m in _RUN.finditer(text) if len(m[0]) >= _LETTERS), None)
    if run is None:
        return None
    size = len(run[1])
    return Loop(run.start(), run.start() + size, run.end(), len(run[0]) // size)


# a run of at least six copies of up to twelve characters that are no spaces
_RUN = re.compile(rf"(\S{{1,12}}?)\1{{{_LETTER_TIMES - 1},}}")


def _first(words: list[str]) -> tuple[int, int, int] | None:
    """Where the first loop begins, the words of its phrase, and how often it comes."""
    best: tuple[int, int, int] | None = None
    for period in range(1, min(_LONGEST, len(words) // 3) + 1):
        needed = max(3 if period >= _LONG_PHRASE else _TIMES, -(-_WORDS // period))
        same = 0  # how many words in a row equal the one a period before
        for i in range(period, len(words)):
            same = same + 1 if words[i] and words[i] == words[i - period] else 0
            if same < period * (needed - 1):
                continue
            begin = i - same - period + 1
            if best is None or begin < best[0]:
                while i + 1 < len(words) and words[i + 1] == words[i + 1 - period]:
                    i += 1
                best = begin, period, (i - begin + 1) // period
            break
    return best


def cut_loops(text: str) -> tuple[str, bool]:
    """The text with one copy of what looped, and whether anything did."""
    looped = False
    while (loop := find_loop(text)) is not None:
        text = text[: loop.once] + text[loop.end :]
        looped = True
    return text.strip() if looped else text, looped


class LoopWatch:
    """Reads a text as it is written and says when to stop.

    Args:
        every: Characters between two looks: a look reads the last few hundred.
    """

    def __init__(self, every: int = 40) -> None:
        self._every, self._text, self._looked = every, "", 0

    def feed(self, piece: str) -> bool:
        """Whether the text so far ends in a loop."""
        self._text += piece
        if len(self._text) - self._looked < self._every:
            return False
        self._looked = len(self._text)
        tail = self._text[-1200:]
        loop = find_loop(tail)
        return loop is not None and loop.end >= len(tail.rstrip()) - 1
