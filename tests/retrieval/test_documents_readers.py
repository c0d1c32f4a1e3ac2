"""Each format: its structure, its places, and one sentence for what cannot be read."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable

import docx
import pytest

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Extract, Limits
from lfm2_retrieval.documents.readers import family, read, refusal

LIMITS = Limits(bytes=1_000_000, characters=500_000, rows=50)


def one(name: str, data: bytes | str) -> Extract:
    (found,) = read(name, data.encode() if isinstance(data, str) else data, LIMITS)
    return found


def parts(found: Extract) -> list[tuple[str, str]]:
    return [(block.kind, found.text[block.start : block.end]) for block in found.blocks]


def reason(name: str, data: bytes | str) -> str:
    with pytest.raises(DocumentError) as caught:
        list(read(name, data.encode() if isinstance(data, str) else data, LIMITS))
    return str(caught.value)


# ---- text ----


def test_plain_text_has_headings_paragraphs_items_and_lines() -> None:
    found = one("a.txt", "Hut rules\n\nWelcome to\nthe hut.\n\n- a bag\n- cash\n")
    assert parts(found) == [
        ("heading", "Hut rules"),
        ("paragraph", "Welcome to\nthe hut."),
        ("item", "- a bag"),
        ("item", "- cash"),
    ]
    assert [block.line for block in found.blocks] == [1, 3, 6, 7]
    assert found.title == "Hut rules"


def test_form_feeds_count_pages() -> None:
    found = one("a.txt", "First page here.\n\fSecond page here.\n")
    assert [block.page for block in found.blocks] == [1, 2]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252", "latin-1"]
)
def test_encodings_are_found(encoding: str) -> None:
    text = "Die Hütte schließt für größere Gruppen früh; Frühstück gibt es später. " * 5
    assert one("a.txt", text.encode(encoding)).text == text


@pytest.mark.parametrize(
    "encoding", ["shift_jis", "euc_jp", "gb18030", "euc_kr", "cp1256", "koi8-r"]
)
def test_encodings_of_other_scripts_are_found(encoding: str) -> None:
    text = {
        "shift_jis": "地震のときは、まず自分の身を守ってください。机の下に入り、頭を守ります。",
        "euc_jp": "地震のときは、まず自分の身を守ってください。机の下に入り、頭を守ります。",
        "gb18030": "猫很独立，但是它需要你的时间和耐心。把小猫带回家之前，请先准备好东西。",
        "euc_kr": "우리 도서관은 누구나 무료로 이용할 수 있습니다. 월요일에는 쉽니다.",
        "cp1256": "نظف أسنانك بالفرشاة مرتين في اليوم، في الصباح وقبل النوم، لمدة دقيقتين.",
        "koi8-r": "Кошка очень независима, но ей нужно ваше время и терпение каждый день.",
    }[encoding] * 8
    assert one("a.txt", text.encode(encoding)).text == text


def test_control_characters_and_line_ends_are_made_plain() -> None:
    assert (
        one("a.txt", "one\x1b[31m two\r\nthree\rfour\u202e").text
        == "one [31m two\nthree\nfour\u202e"
    )


def test_front_matter_gives_title_language_and_metadata_but_no_block() -> None:
    found = one("a.md", "---\ntitle: 'Tea'\nlang: ja\nyear: 2020\n---\n\n# Head\n\ntext\n")
    assert (found.title, found.language) == ("Tea", "ja")
    assert found.metadata == {"year": "2020", "format": "markdown"}
    assert [kind for kind, _ in parts(found)] == ["heading", "paragraph"]


def test_markdown_structure() -> None:
    text = "# A\n\npara\nmore\n\nSub\n---\n\n- x\n- y\n\n"
    text += "| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\n# no\n```\n"
    found = one("a.md", text)
    assert parts(found) == [
        ("heading", "# A"),
        ("paragraph", "para\nmore"),
        ("heading", "Sub"),
        ("item", "- x"),
        ("item", "- y"),
        ("row", "| a | b |"),
        ("row", "| 1 | 2 |"),
        ("code", "# no"),
    ]
    assert [block.level for block in found.blocks if block.level] == [1, 2]
    assert found.title == "A"


def test_rst_headings_are_underlined() -> None:
    found = one("a.rst", "=====\nTitle\n=====\n\nText.\n\nPart\n~~~~\n\nMore.\n")
    assert parts(found) == [
        ("heading", "Title"),
        ("paragraph", "Text."),
        ("heading", "Part"),
        ("paragraph", "More."),
    ]
    assert found.metadata["format"] == "rst"


def test_source_blocks_and_definitions() -> None:
    found = one("src/a.rs", "use std::fs;\n\npub fn main() {\n    a();\n\n    b();\n}\n")
    assert [kind for kind, _ in parts(found)] == ["code", "definition", "code"]
    assert [block.line for block in found.blocks] == [1, 3, 6]
    assert found.title == "a.rs"


# ---- tables ----


def rows(name: str, data: str) -> list[Extract]:
    return list(read(name, data.encode(), LIMITS))


def test_csv_rows_are_documents_with_typed_metadata() -> None:
    data = "name;text;year;zip;ok;lang\n"
    data += "Tea;A hot drink;2020;01234;true;de\nAle;A cold drink;2021;99999;false;en\n"
    tea, ale = rows("a.csv", data)
    assert tea.text == "Tea\nA hot drink"
    assert (tea.title, tea.language, tea.row, tea.blocks[0].line) == ("Tea", "de", 1, 2)
    assert tea.metadata == {"format": "csv", "year": 2020, "zip": "01234", "ok": True}
    assert (ale.row, ale.blocks[0].line) == (2, 3)


def test_csv_cells_may_span_lines() -> None:
    data = 'text\n"one\ntwo words"\nthree\n'
    assert [(row.text, row.blocks[0].line) for row in rows("a.csv", data)] == [
        ("one\ntwo words", 2),
        ("three", 4),
    ]


def test_a_column_of_names_is_text_and_a_column_of_labels_is_not() -> None:
    found = rows("a.tsv", "planta\tclase\n" + "".join(f"p{c}\tx\n" for c in "abcd"))
    assert [row.text for row in found] == ["pa", "pb", "pc", "pd"]
    assert [row.title for row in found] == ["pa", "pb", "pc", "pd"]
    assert found[0].metadata == {"format": "csv", "clase": "x"}


def test_a_csv_without_header_has_numbered_columns() -> None:
    (found,) = rows("a.csv", "12,a long sentence of several words\n")
    assert found.metadata == {"format": "csv", "column_1": 12}


def test_metadata_names_are_made_to_fit() -> None:
    (found,) = rows("a.csv", "text,2nd size,path,年\nsome words,1,2,3\n")
    assert found.metadata == {"format": "csv", "_2nd_size": 1, "_path": 2, "_年": 3}


def test_jsonl_is_flattened() -> None:
    lines = [{"title": "T", "body": {"text": "words here"}, "tags": ["a", "b"], "n": {"year": 3}}]
    (found,) = rows("a.jsonl", "\n".join(map(json.dumps, lines)))
    assert found.text == "T\nwords here"
    assert found.metadata == {"format": "jsonl", "tags": "a\nb", "n.year": 3}


def test_bad_jsonl_lines_are_named_after_the_good_ones() -> None:
    stream = read("a.jsonl", b'{"text": "good one"}\n[1]\n{"text": "also good"}\noops\n', LIMITS)
    found = [next(stream).text, next(stream).text]
    assert found == ["good one", "also good"]
    with pytest.raises(DocumentError) as caught:
        next(stream)
    assert str(caught.value) == (
        "2 of its lines are no JSON objects, the first on line 2: mend them (the other rows were "
        "read)"
    )


def test_lone_surrogates_and_huge_numbers_do_no_harm() -> None:
    (found,) = rows("a.jsonl", '{"text": "a \\ud800 b", "n": 1%s, "x": NaN}' % ("0" * 400))
    assert found.text == "a   b"
    assert found.metadata == {"format": "jsonl", "n": 1e300, "x": "nan"}
    found.text.encode()


# ---- html, pdf, docx ----

PAGE = """<html lang="en-GB"><head><meta charset="{charset}"><title>Bees</title></head><body>
<nav><a href="/">Home</a></nav><main><h1>Keeping bees</h1>
<p>Bees like warm, dry places, and they fly out when it is warmer than ten degrees, caf\u00e9.</p>
<h2>Tools</h2><ul><li>a veil against stings</li><li>a smoker</li></ul>
<table><tr><th>month</th><th>work</th></tr><tr><td>May</td><td>swarms</td></tr></table>
</main><script>steal()</script></body></html>"""


def test_html_gives_the_main_content() -> None:
    found = one("a.html", PAGE.format(charset="utf-8"))
    assert parts(found) == [
        ("heading", "Keeping bees"),
        (
            "paragraph",
            "Bees like warm, dry places, and they fly out when it is warmer than ten degrees, "
            "caf\u00e9.",
        ),
        ("heading", "Tools"),
        ("item", "a veil against stings"),
        ("item", "a smoker"),
        ("row", "month | work"),
        ("row", "May | swarms"),
    ]
    assert [block.line for block in found.blocks] == [2, 3, 4, 4, 4, 5, 5]
    assert (found.language, found.language_hint) == (None, "en-GB")
    assert found.metadata["format"] == "html"


def test_html_says_its_own_encoding() -> None:
    found = one("a.html", PAGE.format(charset="iso-8859-1").encode("latin-1"))
    assert "caf\u00e9" in found.text


def test_a_page_of_scripts_is_refused() -> None:
    assert reason("a.html", "<html><body><script>x()</script></body></html>") == (
        "the page holds no text: it may be filled by scripts; save its text"
    )


def pdf(stream: bytes, trailer: bytes = b"") -> bytes:
    """A PDF of one page."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    if trailer:
        objects.append(trailer)
    body, places = bytearray(b"%PDF-1.4\n"), []
    for number, entry in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, entry)
    start = len(body)
    body += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    body += b"".join(b"%010d 00000 n \n" % place for place in places)
    extra = b" /Encrypt 6 0 R /ID [<00112233445566778899aabbccddeeff> <00>]" if trailer else b""
    body += b"trailer\n<< /Size %d /Root 1 0 R%s >>\n" % (len(objects) + 1, extra)
    return bytes(body + b"startxref\n%d\n%%%%EOF\n" % start)


TEXT = b"BT /F1 11 Tf 1 0 0 1 60 780 Tm (The hut opens at noon.) Tj ET"


def test_pdf_text_has_pages() -> None:
    found = one("a.pdf", pdf(TEXT))
    assert parts(found) == [("paragraph", "The hut opens at noon.")]
    assert (found.blocks[0].page, found.metadata) == (1, {"format": "pdf", "pages": 1})


def test_an_encrypted_pdf_is_refused() -> None:
    lock = b"<< /Filter /Standard /V 1 /R 2 /P -1 /O <%s> /U <%s> >>" % (b"ab" * 32, b"cd" * 32)
    assert reason("a.pdf", pdf(TEXT, lock)) == (
        "it is encrypted with a password: save a copy without one"
    )


def test_a_scanned_pdf_is_refused() -> None:
    assert reason("a.pdf", pdf(b"")) == (
        "its 1 pages hold no text, perhaps only pictures of it: run OCR over it first"
    )


def test_what_is_no_pdf_is_refused() -> None:
    assert reason("a.pdf", b"hello").startswith("it is no PDF, or a damaged one (")


def word(write: Callable[[docx.document.Document], object]) -> bytes:
    document = docx.Document()
    write(document)
    made = io.BytesIO()
    document.save(made)
    return made.getvalue()


def test_docx_keeps_the_order_of_paragraphs_and_tables() -> None:
    def write(document: docx.document.Document) -> None:
        document.add_heading("Manual", 1)
        document.add_paragraph("Read this first.")
        table = document.add_table(rows=1, cols=3)
        for cell, text in zip(table.rows[0].cells, ("wool", "30", "45"), strict=True):
            cell.text = text
        table.rows[0].cells[1].merge(table.rows[0].cells[2])
        document.add_paragraph("fill the drum", style="List Number")

    found = one("a.docx", word(write))
    assert parts(found) == [
        ("heading", "Manual"),
        ("paragraph", "Read this first."),
        ("row", "wool | 30 45"),
        ("item", "fill the drum"),
    ]
    assert [block.line for block in found.blocks] == [1, 2, 3, 4]
    assert found.title == "Manual"


def test_an_encrypted_docx_is_refused() -> None:
    assert reason("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100)) == (
        "it is encrypted, or an old .doc under a new name: save a copy as .docx without a password"
    )


def test_a_docx_bomb_is_refused_before_it_is_unpacked() -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * 3_000_000)
    assert reason("a.docx", made.getvalue()) == (
        "it unpacks to 2.9 MiB in 1 parts, more than the 0.9537 MiB or 10000 parts that are "
        "allowed: split it"
    )


def test_entities_of_a_docx_are_not_expanded() -> None:
    data = word(lambda document: document.add_paragraph("SEED"))
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            member = old.read(name)
            if name == "word/document.xml":
                head, mark, tail = member.partition(b"?>")
                bomb = b'<!DOCTYPE x [<!ENTITY a "boom"><!ENTITY b "&a;&a;&a;">]>'
                member = head + mark + bomb + tail.replace(b"SEED", b"calm &b;")
            new.writestr(name, member)
    assert "boom" not in one("a.docx", made.getvalue()).text


def test_a_broken_docx_is_refused() -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("hello.txt", b"hello")
    assert reason("a.docx", made.getvalue()).startswith("it is a damaged docx (")
    assert reason("a.docx", b"hello").startswith("it is no docx file (")


# ---- gz, limits, refusals ----


def test_gzip_is_looked_through() -> None:
    assert one("a.md.gz", gzip.compress(b"# Head\n\ntext\n")).title == "Head"


def test_a_gzip_bomb_is_refused() -> None:
    assert reason("a.txt.gz", gzip.compress(b"0" * 2_000_000)) == (
        "it unpacks to more than the 0.9537 MiB that are allowed: unpack it and split it"
    )


def test_a_damaged_gzip_is_refused() -> None:
    assert reason("a.txt.gz", gzip.compress(b"hello" * 100)[:-9]).startswith("its gzip data is dam")


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", bytes(range(256)) * 8, b"\x7fELF\2\1\1\0" * 40]
)
def test_binary_content_under_a_text_name_is_refused(data: bytes) -> None:
    assert reason("a.txt", data) == (
        "its content is binary, not text: give it the suffix of its real format"
    )


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.csv", "a.html", "a.pdf", "a.docx"])
def test_an_empty_file_is_refused(name: str) -> None:
    assert reason(name, b"") == "it is empty: there is nothing to index"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py"])
def test_a_file_of_space_is_refused(name: str) -> None:
    assert reason(name, b" \n \n") == "it holds nothing but space: there is nothing to index"


def test_too_long_a_text_is_refused() -> None:
    assert reason("a.txt", b"a" * 600_000) == (
        "its text has 600000 characters, more than the 500000 that are allowed: split it"
    )


def test_too_many_rows_are_refused() -> None:
    assert reason("a.csv", "text\n" + "some words\n" * 51) == (
        "it has more than the 50 rows that are allowed: split it"
    )


def test_files_that_are_no_documents_are_known_by_name() -> None:
    assert refusal("a/b.PNG") == ".png is a picture: it is not read as a document"
    assert refusal("a.tar.gz") == ".tar is an archive: it is not read as a document"
    assert refusal("README") is None
    assert (family("README"), family("x.CSV.gz"), family("x.hpp")) == ("plain", "rows", "source")
