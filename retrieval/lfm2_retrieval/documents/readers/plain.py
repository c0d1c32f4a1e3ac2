"""Plain text: paragraphs at blank lines, list items, lone headings, pages at form feeds."""

from __future__ import annotations

from collections.abc import Iterator

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Block, Extract, Kind, Limits
from lfm2_retrieval.documents.readers.decoding import decode
from lfm2_retrieval.documents.readers.scanning import (
    ITEM,
    Line,
    lines,
    looks_like_heading,
    trimmed,
)

__all__ = ["read"]


def read(data: bytes, name: str, limits: Limits) -> Iterator[Extract]:
    """The text of a plain file, verbatim, with its structure."""
    text = decode(data, limits)
    blocks = list(_blocks(text))
    if not blocks:
        raise DocumentError("it holds nothing but space: there is nothing to index")
    head = next((block for block in blocks if block.kind == "heading"), None)
    title = text[head.start : head.end] if head else None
    yield Extract(text, tuple(blocks), title=title, metadata={"format": "text"})


def _paragraphs(text: str) -> Iterator[tuple[list[Line], int]]:
    """Runs of lines that are not blank, and the page each is on."""
    run: list[Line] = []
    page = 1
    for line in lines(text):
        if run and (line.blank or line.text.startswith("\f")):
            yield run, page
            run = []
        page += line.text.count("\f")
        if not line.blank:
            run.append(line)
    if run:
        yield run, page


def _blocks(text: str) -> Iterator[Block]:
    paged = "\f" in text
    found = list(_paragraphs(text))
    headings = 0
    for index, (run, number) in enumerate(found):
        page = number if paged else None
        alone = len(run) == 1 and index + 1 < len(found) and not ITEM.match(run[0].text)
        if alone and looks_like_heading(run[0].text):
            start, end = trimmed(text, run[0].start, run[0].end)
            yield Block(start, end, "heading", page, run[0].number, 1 if not headings else 2)
            headings += 1
            continue
        yield from _parts(text, run, page)


def _parts(text: str, run: list[Line], page: int | None) -> Iterator[Block]:
    """A paragraph as one block, or as one for each list item in it."""
    starts = [0, *(i for i, line in enumerate(run) if i and ITEM.match(line.text)), len(run)]
    for first, behind in zip(starts, starts[1:], strict=False):
        start, end = trimmed(text, run[first].start, run[behind - 1].end)
        kind: Kind = "item" if ITEM.match(run[first].text) else "paragraph"
        yield Block(start, end, kind, page, run[first].number)
