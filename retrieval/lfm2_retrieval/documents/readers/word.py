"""docx: headings, paragraphs, list items and table rows in their order, by python-docx.

What the archive unpacks to is bounded before anything is unpacked; entities are not expanded.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Extract, Kind, Limits, Scalar
from lfm2_retrieval.documents.readers.scanning import Builder

if TYPE_CHECKING:
    from docx.table import Table
    from docx.text.paragraph import Paragraph

__all__ = ["read"]

_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_HEADING = re.compile(r"heading (\d)", re.I)
_MAX_MEMBERS = 10_000


def read(data: bytes, name: str, limits: Limits) -> Iterator[Extract]:
    """The text of a docx file; `line` counts its paragraphs and table rows that hold text."""
    _check(data, limits)
    import docx
    from docx.text.paragraph import Paragraph

    lxml_error: type[Exception] = import_module("lxml.etree").LxmlError
    builder = Builder(limits)
    try:
        document = docx.Document(io.BytesIO(data))
        for part in document.iter_inner_content():
            if isinstance(part, Paragraph):
                _paragraph(part, builder)
            else:
                _table(part, builder)
        facts = document.core_properties
        title, author = facts.title, facts.author
    except (KeyError, ValueError, AttributeError, lxml_error, zipfile.BadZipFile, zlib.error) as e:
        raise DocumentError(f"it is a damaged docx ({_first_line(e)}): save it anew") from e
    if not builder.blocks:
        raise DocumentError("it holds no text: there is nothing to index")
    metadata: dict[str, Scalar] = {"format": "docx"}
    if author and author != "python-docx":
        metadata["author"] = author[:1000]
    yield Extract(
        builder.text, tuple(builder.blocks), title=title or builder.heading(), metadata=metadata
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _check(data: bytes, limits: Limits) -> None:
    """Refuse what is no docx, is encrypted or unpacks to too much."""
    if data.startswith(_OLE):
        raise DocumentError(
            "it is encrypted, or an old .doc under a new name: save a copy as .docx without a "
            "password"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DocumentError(f"it is no docx file ({_first_line(error)}): save it anew") from error
    # zipfile never gives more of a member than its directory entry says, so the sum is a bound.
    size = sum(member.file_size for member in members)
    if size > limits.bytes or len(members) > _MAX_MEMBERS:
        raise DocumentError(
            f"it unpacks to {size / 2**20:.1f} MiB in {len(members)} parts, more than the "
            f"{limits.bytes / 2**20:.4g} MiB or {_MAX_MEMBERS} parts that are allowed: split it"
        )


def _paragraph(paragraph: Paragraph, builder: Builder) -> None:
    style = paragraph.style.name or "" if paragraph.style is not None else ""
    heading = _HEADING.match(style)
    kind: Kind = "paragraph"
    level = 0
    if heading or style == "Title":
        kind, level = "heading", int(heading[1]) if heading else 1
    elif style.startswith("List") or paragraph._p.pPr is not None and _numbered(paragraph):
        kind = "item"
    text = paragraph.text
    builder.add(
        " ".join(text.split()) if kind == "heading" else text,
        kind,
        line=len(builder.blocks) + 1,
        level=level,
    )


def _numbered(paragraph: Paragraph) -> bool:
    properties = paragraph._p.pPr
    return properties is not None and properties.numPr is not None


def _table(table: Table, builder: Builder) -> None:
    for row in table.rows:
        texts, seen = [], set()
        for cell in row.cells:
            if id(cell._tc) not in seen:  # a merged cell stands once for each column it spans
                seen.add(id(cell._tc))
                texts.append(" ".join(cell.text.split()))
        builder.add(" | ".join(text for text in texts if text), "row", line=len(builder.blocks) + 1)
