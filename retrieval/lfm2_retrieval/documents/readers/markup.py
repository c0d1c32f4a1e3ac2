"""Markdown and reStructuredText: headings, paragraphs, items, table rows and code, verbatim.

Front matter gives title, language and metadata, and is not part of any block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Block, Extract, Kind, Limits, Scalar
from lfm2_retrieval.documents.readers.decoding import decode
from lfm2_retrieval.documents.readers.scanning import ITEM, Line, lines, trimmed
from lfm2_retrieval.documents.wire import METADATA_KEY

__all__ = ["read"]

_ATX = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t#]*$")
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})")
_UNDERLINE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}[ \t]*$")
_ROW = re.compile(r"[ \t]*\|")
_RULE = re.compile(r"[ \t]*[|+:=\- ]+$")
_LEVELS = "=-~^\"'`#*+.:_"  # the usual order of underlines, for files that use both marks
_FRONT = re.compile(r"---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*$\n?", re.S | re.M)
_ENTRY = re.compile(r"([A-Za-z_][\w-]*):[ \t]+(.+?)[ \t]*$", re.M)
_MAX_FRONT = 10_000


def read(data: bytes, name: str, limits: Limits) -> Iterator[Extract]:
    """The text of a markdown or rst file, verbatim, with its structure."""
    text = decode(data, limits)
    front = _FRONT.match(text[:_MAX_FRONT])
    entries = dict(_ENTRY.findall(front[1])) if front else {}
    facts = {key.lower(): value.strip("\"'") for key, value in entries.items()}
    rst = name.lower().endswith(".rst")
    blocks = list(_blocks(text, front.end() if front else 0, fences=not rst))
    if not blocks:
        raise DocumentError("it holds nothing but space: there is nothing to index")
    title = facts.pop("title", None) or _first_heading(text, blocks)
    language = facts.pop("lang", None) or facts.pop("language", None)
    metadata: dict[str, Scalar] = {
        key: value for key, value in facts.items() if METADATA_KEY.fullmatch(key)
    }
    metadata["format"] = "rst" if rst else "markdown"
    yield Extract(text, tuple(blocks), title=title, language=language, metadata=metadata)


def _first_heading(text: str, blocks: list[Block]) -> str | None:
    found = next((block for block in blocks if block.kind == "heading"), None)
    return text[found.start : found.end].lstrip("# ").rstrip("# ") if found else None


class _Scan:
    """Lines go in one by one; finished blocks come out."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.run: list[Line] = []
        self.kind: Kind = "paragraph"

    def flush(self) -> Iterator[Block]:
        if self.run:
            start, end = trimmed(self.text, self.run[0].start, self.run[-1].end)
            if start < end:
                yield Block(start, end, self.kind, None, self.run[0].number)
        self.run, self.kind = [], "paragraph"

    def heading(self, line: Line, level: int) -> Block:
        start, end = trimmed(self.text, line.start, line.end)
        return Block(start, end, "heading", None, line.number, level)


def _blocks(text: str, begin: int, *, fences: bool) -> Iterator[Block]:
    scan = _Scan(text)
    fence: str | None = None
    for line in lines(text):
        if line.start < begin:
            continue
        mark = _FENCE.match(line.text) if fences else None
        if fence is not None:
            if mark and mark[1].startswith(fence):
                yield from scan.flush()
                fence = None
            else:
                scan.run.append(line)
                scan.kind = "code"
            continue
        if mark:
            yield from scan.flush()
            fence = mark[1]
            continue
        yield from _line(scan, line)
    yield from scan.flush()


def _line(scan: _Scan, line: Line) -> Iterator[Block]:
    """One line outside of code."""
    if line.blank:
        yield from scan.flush()
        return
    atx = _ATX.match(line.text)
    if atx and atx[2]:
        yield from scan.flush()
        yield scan.heading(line, len(atx[1]))
        return
    underline = _UNDERLINE.match(line.text)
    if underline:
        if len(scan.run) == 1 and scan.kind == "paragraph":
            title = scan.run.pop()
            yield scan.heading(title, _LEVELS.index(underline[1]) + 1)
        else:
            yield from scan.flush()  # a rule, or the line above an rst title
        return
    if _ROW.match(line.text):
        yield from scan.flush()
        if not _RULE.match(line.text):
            scan.run, scan.kind = [line], "row"
            yield from scan.flush()
        return
    if ITEM.match(line.text):
        yield from scan.flush()
        scan.kind = "item"
    scan.run.append(line)
