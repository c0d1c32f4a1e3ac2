"""Writes the sample documents that cannot be written in an editor: two docx files and a PDF.

Run `python tools/make_samples.py`; it reads tools/samples/*.txt and writes into the samples of
lfm2_retrieval, or into the folder given. In the texts every line is a paragraph; `#`, `##`, `-`,
`1.` and `|` at its start mark title, headings, items and table rows, `---` ends a page. The same
versions of the packages make the same bytes on any day.
"""

from __future__ import annotations

import io
import sys
import textwrap
import zipfile
from datetime import datetime
from pathlib import Path

__all__ = ["lines_of", "main", "pdf", "word"]

TEXTS = Path(__file__).resolve().parent / "samples"
SAMPLES = TEXTS.parents[1] / "retrieval/lfm2_retrieval/samples/documents"
STYLES = {
    "# ": "Title",
    "## ": "Heading 1",
    "- ": "List Bullet",
    "1. ": "List Number",
    "| ": "Table",
    "---": "Page",
}

Line = tuple[str, str]  # a style and what it says


def lines_of(text: str) -> list[Line]:
    """The styled lines of a source text."""
    found = []
    for line in text.splitlines():
        mark = next((mark for mark in STYLES if line.startswith(mark)), "")
        found.append((STYLES.get(mark, "Normal"), line.removeprefix(mark)))
    return found


def word(content: list[Line]) -> bytes:
    """A docx file of styled paragraphs; neighbouring table lines become one table."""
    import docx

    document = docx.Document()
    facts = document.core_properties
    facts.title, facts.author, facts.comments = content[0][1], "The lfm2_mm authors", ""
    facts.created = facts.modified = datetime(2026, 1, 1)
    table = None
    for style, text in content:
        if style != "Table":
            table = None
            document.add_paragraph(text, style=style)
            continue
        values = text.split(" | ")
        if table is None:
            table = document.add_table(rows=0, cols=len(values))
            table.style = "Table Grid"
        for cell, value in zip(table.add_row().cells, values, strict=True):
            cell.text = value
    made = io.BytesIO()
    document.save(made)
    return _same_times(made.getvalue())


def _same_times(data: bytes) -> bytes:
    """The archive with one date in every entry."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            entry = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            new.writestr(entry, old.read(name))
    return out.getvalue()


def pdf(content: list[Line]) -> bytes:
    """A PDF in Helvetica; what it says must fit Windows-1252."""
    pages: list[list[Line]] = [[]]
    for line in content:
        if line[0] == "Page":
            pages.append([])
        else:
            pages[-1].append(line)
    kids = " ".join(f"{5 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        b"<< /Title " + _string(content[0][1]) + b" /Author (The lfm2_mm authors) >>",
    ]
    for number, page in enumerate(pages):
        stream = _drawing(page)
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {6 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>".encode()
        )
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    body = bytearray(b"%PDF-1.4\n")
    places = []
    for number, entry in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, entry)
    start = len(body)
    body += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    for place in places:
        body += b"%010d 00000 n \n" % place
    body += b"trailer\n<< /Size %d /Root 1 0 R /Info 4 0 R >>\n" % (len(objects) + 1)
    return bytes(body + b"startxref\n%d\n%%%%EOF\n" % start)


def _string(text: str) -> bytes:
    """A PDF string."""
    data = text.encode("cp1252")
    for mark in (b"\\", b"(", b")"):
        data = data.replace(mark, b"\\" + mark)
    return b"(" + data + b")"


def _drawing(page: list[Line]) -> bytes:
    """The commands that draw a page: lines from the top down, more space behind headings."""
    commands, at = [b"BT"], 780
    for style, text in page:
        size, width, gap = (11, 85, 6) if style == "Normal" else (16, 50, 14)
        for row in textwrap.wrap(text, width):
            commands.append(b"/F1 %d Tf 1 0 0 1 60 %d Tm " % (size, at) + _string(row) + b" Tj")
            at -= size + 4
        at -= gap
    return b"\n".join([*commands, b"ET"])


def main() -> None:
    """Write the files."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLES
    for name, make in (("waschmaschine.docx", word), ("ryokucha.docx", word), ("levain.pdf", pdf)):
        source = (TEXTS / name).with_suffix(".txt")
        data = make(lines_of(source.read_text("utf-8")))
        (folder / name).write_bytes(data)
        print(f"{name}: {len(data)} bytes")


if __name__ == "__main__":
    main()
