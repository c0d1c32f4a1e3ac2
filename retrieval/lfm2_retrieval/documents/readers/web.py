"""HTML: the main content as trafilatura finds it, as headings, paragraphs, items and rows.

Lines are those of the source where a block's first words stand there as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Extract, Kind, Limits, Scalar
from lfm2_retrieval.documents.readers.decoding import decode
from lfm2_retrieval.documents.readers.scanning import Builder

__all__ = ["read"]

_KINDS: dict[str, Kind] = {"item": "item", "row": "row", "code": "code"}
_CONTAINERS = frozenset({"body", "main", "list", "table", "div", "quote"})
_DECLARED = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9._-]{2,40})", re.I)
_LANG = re.compile(r"<html[^>]{0,500}?\slang\s*=\s*[\"']?([A-Za-z-]{2,20})", re.I)
_SCRIPTS = re.compile(r"<(script|style|template|noscript)\b.*?</\1\s*>", re.I | re.S)
_TAG = re.compile(r"<[^>]*>")
_FIRST = 40  # characters of a block that are looked for in the source
_MAX_DEPTH = 200


def read(data: bytes, name: str, limits: Limits) -> Iterator[Extract]:
    """The main content of a page."""
    import trafilatura

    source = _source(data, limits)
    page: Any = trafilatura.bare_extraction(
        source,
        include_comments=False,
        include_tables=True,
        with_metadata=True,
        config=_settings(),
    )
    builder = Builder(limits)
    lines = _Lines(source)
    if page is not None and page.body is not None:
        _walk(page.body, builder, lines, 0)
    if not builder.blocks:
        _bare(source, builder, lines)
    if not builder.blocks:
        raise DocumentError("the page holds no text: it may be filled by scripts; save its text")
    metadata: dict[str, Scalar] = {"format": "html"}
    for key in ("author", "date"):
        value = getattr(page, key, None)
        if isinstance(value, str) and value:
            metadata[key] = value[:1000]
    declared = _LANG.search(source[:10_000])
    yield Extract(
        builder.text,
        tuple(builder.blocks),
        title=getattr(page, "title", None) or builder.heading(),
        language_hint=declared[1] if declared else None,
        metadata=metadata,
    )


@cache
def _settings() -> Any:
    """The settings of trafilatura, but short pages keep their structure."""
    from trafilatura.settings import use_config

    settings = use_config()
    for name in ("MIN_EXTRACTED_SIZE", "MIN_OUTPUT_SIZE"):
        settings["DEFAULT"][name] = "1"
    return settings


def _source(data: bytes, limits: Limits) -> str:
    """The page as text; what a meta element says of the encoding counts before a guess."""
    declared = _DECLARED.search(data[:4096])
    if declared:
        try:
            text = data.decode(declared[1].decode("ascii"))
        except (LookupError, UnicodeDecodeError):
            text = None
        if text is not None and "\0" not in text:
            data = text.encode("utf-8", "replace")
    return decode(data, limits)


class _Lines:
    """Finds the line of a block in the source, from one block to the next."""

    def __init__(self, source: str) -> None:
        body = re.search(r"<body\b", source, re.I)
        self._source, self._at = source, body.start() if body else 0
        self._line = 1 + source.count("\n", 0, self._at)

    def of(self, text: str) -> int:
        words = text.strip().partition("\n")[0][:_FIRST]
        found = self._source.find(words, self._at) if words else -1
        if found > self._at:
            self._line += self._source.count("\n", self._at, found)
            self._at = found
        return self._line


def _walk(element: Any, builder: Builder, lines: _Lines, depth: int) -> None:
    """Blocks of a tree in trafilatura's tags."""
    tag = str(element.tag).rpartition("}")[2]
    nested = tag in _CONTAINERS or (tag == "item" and element.find("list") is not None)
    if nested and depth < _MAX_DEPTH:
        _add(builder, lines, element.text or "", "paragraph")
        for child in element:
            _walk(child, builder, lines, depth + 1)
            _add(builder, lines, child.tail or "", "paragraph")
        return
    if tag == "row":
        texts = (" ".join("".join(cell.itertext()).split()) for cell in element)
        cells = [text for text in texts if text]
        if cells:
            builder.add(" | ".join(cells), "row", line=lines.of(cells[0]))
        return
    for line_break in element.iter("lb"):
        line_break.tail = "\n" + (line_break.tail or "")
    text = "".join(str(part) for part in element.itertext())
    if tag == "head":
        rend = (element.get("rend") or "h2").lstrip("h")
        level = int(rend) if rend in "123456" and rend else 2
        builder.add(" ".join(text.split()), "heading", line=lines.of(text), level=level)
    else:
        _add(builder, lines, text, _KINDS.get(tag, "paragraph"))


def _add(builder: Builder, lines: _Lines, text: str, kind: Kind) -> None:
    if text.strip():
        builder.add(text, kind, line=lines.of(text))


def _bare(source: str, builder: Builder, lines: _Lines) -> None:
    """All text of a page in which no main content was found."""
    from html import unescape

    stripped = _TAG.sub("\n", _SCRIPTS.sub(" ", source))
    for part in re.split(r"\n\s*\n", unescape(stripped)):
        _add(builder, lines, " ".join(part.split()), "paragraph")
