"""PDF: the text of each page by pdfium, as paragraphs. Pictures of text are not read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Extract, Limits, Scalar
from lfm2_retrieval.documents.readers.scanning import Builder, looks_like_heading

__all__ = ["read"]

# pdfium gives U+FFFE or U+0002 for a hyphen that only divides a word at the end of a line.
_DIVIDED = re.compile("[\ufffe\x02]\r?\n?")
_ENDS = tuple('.!?:。！？؟”"»')
_FULL = 0.75  # share of the longest line below which a line that ends a sentence ends a paragraph


def read(data: bytes, name: str, limits: Limits) -> Iterator[Extract]:
    """The text of a PDF, page by page."""
    pdfium: Any = import_module("pypdfium2")
    try:
        pdf = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            raise DocumentError(
                "it is encrypted with a password: save a copy without one"
            ) from error
        raise DocumentError(f"it is no PDF, or a damaged one ({error}): save it anew") from error
    builder = Builder(limits)
    try:
        for index in range(len(pdf)):
            page = pdf[index]
            words = page.get_textpage()
            for paragraph in _paragraphs(_DIVIDED.sub("", words.get_text_bounded())):
                heading = "\n" not in paragraph and looks_like_heading(paragraph)
                if heading and not paragraph.strip().isdigit():
                    builder.add(paragraph, "heading", page=index + 1, level=2)
                else:
                    builder.add(paragraph, page=index + 1)
            words.close()
            page.close()
        facts = pdf.get_metadata_dict(skip_empty=True)
        count = len(pdf)
    except pdfium.PdfiumError as error:
        raise DocumentError(f"its pages are damaged ({error}): save it anew") from error
    finally:
        pdf.close()
    if not builder.blocks:
        raise DocumentError(
            f"its {count} pages hold no text, perhaps only pictures of it: run OCR over it first"
        )
    metadata: dict[str, Scalar] = {"format": "pdf", "pages": count}
    if facts.get("Author"):
        metadata["author"] = facts["Author"][:1000]
    yield Extract(
        builder.text,
        tuple(builder.blocks),
        title=facts.get("Title") or builder.heading(),
        metadata=metadata,
    )


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a page's lines: at blank lines, and behind a short line that ends a sentence.

    A line that stands alone before a longer one and reads like a heading is one of its own.
    """
    rows = [row.rstrip() for row in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    longest = max((len(row) for row in rows), default=0)
    run: list[str] = []
    for row in rows:
        if not row.strip():
            yield from _joined(run)
            run = []
            continue
        if not run and looks_like_heading(row) and len(row) < _FULL * longest:
            yield row
            continue
        run.append(row)
        if row.endswith(_ENDS) and len(row) < _FULL * longest:
            yield from _joined(run)
            run = []
    yield from _joined(run)


def _joined(run: list[str]) -> Iterator[str]:
    if run:
        yield "\n".join(run)
