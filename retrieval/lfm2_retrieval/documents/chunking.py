"""Extracted text becomes passages: by structure, of at most so many tokens, with overlap.

The chunker packs blocks (headings, paragraphs, items, rows, code) until a passage is full. A block
that is too long is cut at sentences (code and rows at lines), a sentence at clauses or words, a
word only if it is longer than a passage. It knows the model by one function, `count_tokens`, which
it asks for every piece once and never with a text much longer than a passage.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from lfm2_mm.errors import SettingError
from lfm2_retrieval.documents.model import Block, Chunk, Extract
from lfm2_retrieval.documents.sentences import cut_before, line_ends, sentence_ends, word_starts

__all__ = ["Chunker"]

_WIDEST = 8  # characters a token has at most, as a guess that bounds what is counted at once
_MAX_GAP = 200  # characters between blocks above which passages do not reach over
_MAX_HEADING = 300
_CODE = ("code", "definition", "row")
_OPENING = ("heading", "definition")


class _Unit(NamedTuple):
    """A span that is not cut: a block, or a sentence or piece of one; space behind it included."""

    start: int
    end: int
    tokens: int
    block: int
    carried: bool = False  # repeats the end of the passage before


class Chunker:
    """Cuts extracts into chunks.

    Args:
        count_tokens: The number of a model's tokens in a text, without special tokens.
        chunk_tokens: The most tokens of a chunk.
        overlap: The most tokens a chunk repeats of the chunk before it, within a section.

    Raises:
        SettingError: if the numbers cannot be used.
    """

    def __init__(
        self, count_tokens: Callable[[str], int], *, chunk_tokens: int = 300, overlap: int = 40
    ) -> None:
        if chunk_tokens < 8:
            raise SettingError(
                f"chunk_tokens is {chunk_tokens}, too few for a passage: choose 8 or more"
            )
        if not 0 <= overlap <= chunk_tokens // 2:
            raise SettingError(
                f"overlap is {overlap} at {chunk_tokens} tokens per chunk: choose between 0 and "
                f"{chunk_tokens // 2}"
            )
        self._count = lru_cache(maxsize=4096)(count_tokens)
        self._limit, self._overlap = chunk_tokens, overlap

    def chunks(self, extract: Extract) -> Iterator[Chunk]:
        """The chunks of an extract, in order; every character of every block is in one of them."""
        places = _Places(extract)
        current: list[_Unit] = []
        total = 0  # tokens of `current`
        for unit in self._units(extract):
            if current and (cut := self._cut(extract, current, total, unit)) is not None:
                done, current = cut
                yield from self._chunk(extract, done, places)
                total = sum(one.tokens for one in current)
            current.append(unit)
            total += unit.tokens
        yield from self._chunk(extract, current, places)

    def _cut(
        self, extract: Extract, current: list[_Unit], total: int, unit: _Unit
    ) -> tuple[list[_Unit], list[_Unit]] | None:
        """Where a passage ends before a unit: what it holds, and what the next begins with.

        None if the unit still belongs to the passage.
        """
        blocks = extract.blocks
        opens = blocks[unit.block].kind in _OPENING and unit.start == blocks[unit.block].start
        if self._apart(blocks, current[-1], unit):
            return current, []
        if opens and 4 * total >= self._limit:
            return _without_trailing_headings(current, blocks)
        # Long runs of space are few tokens, but much text.
        wide = unit.end - current[0].start > 4 * _WIDEST * self._limit
        if not wide and total + unit.tokens <= self._limit:
            return None
        done, headings = _without_trailing_headings(current, blocks)
        if sum(one.tokens for one in headings) + unit.tokens > self._limit:
            done, headings = current, []
        if opens or headings:
            return done, headings
        return done, self._carry(extract.text, blocks, done, unit)

    # ---- units ----

    def _units(self, extract: Extract) -> Iterator[_Unit]:
        """The units of all blocks; the space and markup behind a block counts with its last."""
        text, blocks = extract.text, extract.blocks
        for index, block in enumerate(blocks):
            end = block.end
            if index + 1 < len(blocks) and blocks[index + 1].start - end <= _MAX_GAP:
                end = blocks[index + 1].start
            yield from self._unit(text, block.start, end, index, block.kind in _CODE)

    def _unit(self, text: str, start: int, end: int, block: int, code: bool) -> Iterator[_Unit]:
        tokens = self._fits(text, start, end)
        if tokens is not None:
            yield _Unit(start, end, tokens, block)
            return
        for behind in line_ends(text, start, end) if code else sentence_ends(text, start, end):
            tokens = self._fits(text, start, behind)
            if tokens is not None:
                yield _Unit(start, behind, tokens, block)
            else:
                yield from self._pieces(text, start, behind, block)
            start = behind

    def _fits(self, text: str, start: int, end: int) -> int | None:
        """The tokens of a span; None if they are too many for a chunk."""
        if end - start > _WIDEST * self._limit:
            return None
        tokens = self._count(text[start:end])
        return tokens if tokens <= self._limit else None

    def _pieces(self, text: str, start: int, end: int, block: int) -> Iterator[_Unit]:
        """A span without sentence ends, in pieces that leave room for the overlap."""
        target = self._limit - self._overlap
        width = 3 * target
        while start < end:
            cut = end if end - start <= width else cut_before(text, start, start + width)
            tokens = self._count(text[start:cut])
            while tokens > target and cut - start > 1:
                width = max(1, int(0.9 * (cut - start) * target / tokens))
                cut = cut_before(text, start, start + width)
                tokens = self._count(text[start:cut])
            yield _Unit(start, cut, tokens, block)
            if 2 * tokens < target:
                width = min(2 * width, _WIDEST * target)
            start = cut

    # ---- passages ----

    def _apart(self, blocks: tuple[Block, ...], last: _Unit, unit: _Unit) -> bool:
        """Whether no passage may hold both: another page, or far apart."""
        return blocks[last.block].page != blocks[unit.block].page or last.end < unit.start

    def _carry(
        self, text: str, blocks: tuple[Block, ...], kept: list[_Unit], unit: _Unit
    ) -> list[_Unit]:
        """The end of a passage that the next one repeats: sentences if they fit, else words."""
        budget = min(self._overlap, self._limit - unit.tokens)
        last = kept[-1]
        if budget < 1 or last.carried:
            return []
        floor = max(next(u.start for u in kept if not u.carried), last.end - _WIDEST * budget)
        ends = line_ends if blocks[last.block].kind in _CODE else sentence_ends
        places = [at for at in ends(text, floor, last.end) if floor < at < last.end]
        places = [at for at in places if text[at : last.end].strip()]
        start = self._earliest(text, places, last.end, budget)
        if start is None:
            start = self._earliest(text, word_starts(text, floor, last.end), last.end, budget)
        if start is None:
            return []
        tokens = self._count(text[start : last.end])
        return [_Unit(start, last.end, tokens, last.block, carried=True)]

    def _earliest(self, text: str, places: list[int], end: int, budget: int) -> int | None:
        """The earliest of some ascending places from which `text[place:end]` is in the budget."""
        at = bisect_left(places, True, key=lambda place: self._count(text[place:end]) <= budget)
        return places[at] if at < len(places) else None

    def _chunk(self, extract: Extract, units: list[_Unit], places: _Places) -> Iterator[Chunk]:
        own = next((unit for unit in units if not unit.carried), None)
        if own is None:
            return
        text = extract.text
        start, end = units[0].start, units[-1].end
        code = extract.blocks[units[0].block].kind in ("code", "definition")
        while start < end and text[start].isspace() and not (code and text[start] in " \t"):
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        if start < end:
            page, line = places.of(start)
            yield Chunk(text[start:end], page, line, start, end, places.heading(own.block))


def _without_trailing_headings(
    units: list[_Unit], blocks: tuple[Block, ...]
) -> tuple[list[_Unit], list[_Unit]]:
    """Units and the headings behind them, which belong to what follows; never all of the units."""
    at = len(units)
    while at > 0 and blocks[units[at - 1].block].kind == "heading":
        at -= 1
    own = any(not unit.carried for unit in units[:at])
    return (units[:at], units[at:]) if own else (units, [])


class _Places:
    """Pages, lines and headings at positions of an extract; positions mostly ascend."""

    def __init__(self, extract: Extract) -> None:
        self._extract = extract
        self._starts = [block.start for block in extract.blocks]
        self._mark = (-1, 0, 0)  # block, position and newlines before it in the block
        self._headings = list(_headings(extract))

    def of(self, position: int) -> tuple[int | None, int | None]:
        """The page and line of a position."""
        index = max(bisect_right(self._starts, position) - 1, 0)
        block = self._extract.blocks[index]
        if block.line is None:
            return block.page, None
        marked, at, newlines = self._mark
        if marked != index:
            at, newlines = block.start, 0
        text = self._extract.text
        if position >= at:
            newlines += text.count("\n", at, position)
        else:
            newlines -= text.count("\n", position, at)
        self._mark = (index, position, newlines)
        return block.page, block.line + newlines

    def heading(self, block: int) -> str | None:
        """The headings above a block, itself included if it is one."""
        return self._headings[block]


def _headings(extract: Extract) -> Iterator[str | None]:
    stack: list[tuple[int, str]] = []
    path: str | None = None
    for block in extract.blocks:
        if block.kind in _OPENING:
            level = block.level or 7
            stack = [entry for entry in stack if entry[0] < level]
            words = extract.text[block.start : block.end].partition("\n")[0].strip("# \t{:")
            stack.append((level, " ".join(words.split())[:_MAX_HEADING]))
            path = " > ".join(name for _, name in stack)
            path = path if len(path) <= _MAX_HEADING else stack[-1][1]
        yield path
