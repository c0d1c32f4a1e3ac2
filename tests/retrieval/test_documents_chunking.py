"""Chunks are exact spans, never too long, in order, and together everything that was said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_mm.errors import SettingError
from lfm2_retrieval.documents.chunking import Chunker
from lfm2_retrieval.documents.model import Block, Chunk, Extract, Limits
from lfm2_retrieval.documents.readers import read

LIMITS = Limits()


def words(text: str) -> int:
    return len(text.split())


def extract(text: str, name: str = "a.txt") -> Extract:
    return next(iter(read(name, text.encode(), LIMITS)))


def cut(found: Extract, limit: int = 30, overlap: int = 0, count=len) -> list[Chunk]:  # type: ignore[no-untyped-def]
    return list(Chunker(count, chunk_tokens=limit, overlap=overlap).chunks(found))


def covered(found: Extract, chunks: list[Chunk]) -> bool:
    """Whether every character of a block that is no space is in a chunk."""
    inside = {at for chunk in chunks for at in range(chunk.start, chunk.end)}
    places = (at for block in found.blocks for at in range(block.start, block.end))
    return all(found.text[at].isspace() or at in inside for at in places)


LETTERS = st.text("abc DEF.,!?。、日本語\n\n-\u0301\u200d👍é", min_size=1, max_size=400)


@given(LETTERS, st.integers(8, 60), st.integers(0, 4), st.sampled_from(["a.txt", "a.md", "a.py"]))
def test_chunks_are_exact_bounded_ordered_and_complete(
    text: str, limit: int, overlap: int, name: str
) -> None:
    if not text.strip():
        return
    try:
        found = extract(text, name)
    except Exception as error:
        assert "nothing but space" in str(error)
        return
    chunks = cut(found, limit, overlap)
    for chunk in chunks:
        assert chunk.text == found.text[chunk.start : chunk.end]
        assert chunk.text.strip()
        assert len(chunk.text) <= limit
        assert chunk.line == found.text.count("\n", 0, chunk.start) + 1
    assert all(
        a.start < b.start and a.end <= b.end for a, b in zip(chunks, chunks[1:], strict=False)
    )
    assert covered(found, chunks)


def test_sections_start_chunks_and_name_the_headings_above_them() -> None:
    text = "# One\n\n" + "alpha beta. " * 10 + "\n\n## Two\n\n" + "Gamma delta. " * 30
    chunks = cut(extract(text, "a.md"), 25, count=words)
    assert chunks[0].heading == "One"
    second = next(c for c in chunks if c.text.startswith("## Two"))
    assert second.heading == "One > Two"
    assert chunks[-1].heading == "One > Two"
    assert chunks[-1].text.startswith("Gamma")


def test_a_heading_is_never_the_end_of_a_chunk() -> None:
    text = "".join(f"## H{i}\n\n{'word ' * 17}\n\n" for i in range(6))
    for chunk in cut(extract(text, "a.md"), 20, count=words):
        assert not chunk.text.rpartition("\n")[2].startswith("##")


def test_overlap_repeats_whole_sentences_within_its_budget() -> None:
    text = " ".join(f"Sentence number {i} is here." for i in range(40))
    chunks = cut(extract(text), 30, 12, words)
    for before, after in zip(chunks, chunks[1:], strict=False):
        shared = text[after.start : before.end]
        assert 0 < words(shared) <= 12
        assert shared.startswith("Sentence number")


def test_overlap_falls_back_to_words() -> None:
    text = "word" + " word" * 200
    chunks = cut(extract(text), 30, 10, words)
    assert all(
        0 < words(text[b.start : a.end]) <= 10 for a, b in zip(chunks, chunks[1:], strict=False)
    )
    assert all(chunk.text.startswith("word") for chunk in chunks)


def test_words_are_not_cut_where_there_is_a_choice() -> None:
    text = " ".join(f"w{i:03d}" for i in range(300))
    known = set(text.split())
    for chunk in cut(extract(text), 40):
        assert set(chunk.text.split()) <= known


def test_a_script_without_spaces_is_cut_at_its_sentence_marks() -> None:
    text = "地震のときは机の下に入ります。揺れがおさまるのを待ちます。" * 6
    chunks = cut(extract(text), 40)
    assert len(chunks) > 1
    assert all(chunk.text.endswith("。") for chunk in chunks)


def test_a_letter_keeps_its_accent() -> None:
    chunks = cut(extract("e\u0301" * 100), 9)
    assert all(chunk.text.startswith("e") and chunk.text.endswith("\u0301") for chunk in chunks)


def test_a_chunk_never_spans_two_pages() -> None:
    found = Extract("one\n\ntwo", (Block(0, 3, "paragraph", 1), Block(5, 8, "paragraph", 2)))
    assert [(c.text, c.page) for c in cut(found)] == [("one", 1), ("two", 2)]


def test_lines_count_inside_a_block() -> None:
    text = "\n\n" + "\n".join(f"line {i} of the paragraph" for i in range(20))
    chunks = cut(extract(text), 60)
    assert [c.line for c in chunks] == [text.count("\n", 0, c.start) + 1 for c in chunks]
    assert chunks[0].line == 3


def test_code_keeps_its_indentation_and_names_its_definition() -> None:
    text = "def one():\n    a = 1\n\n    b = 2\n\n\ndef two():\n    return 3\n"
    chunks = cut(extract(text, "a.py"), 30)
    assert [c.heading for c in chunks] == ["def one()", "def one()", "def two()"]
    assert chunks[1].text == "    b = 2"


def test_the_counter_is_never_asked_about_much_more_than_a_chunk() -> None:
    asked: list[int] = []

    def count(text: str) -> int:
        asked.append(len(text))
        return len(text) // 4 + 1

    for text in ("x" * 50_000, "word " * 9_000, ". " * 9_000, "a" + " " * 50_000 + "b"):
        cut(extract(text), 300, 40, count)
    assert max(asked) <= 8 * 300
    assert sum(asked) < 10 * 160_000


def test_runs_of_marks_are_scanned_once() -> None:
    """Half a million full stops take quadratic time in a careless pattern; then this times out."""
    found = extract("." * 500_000)
    assert covered(found, cut(found, 300, 40))


@pytest.mark.parametrize(
    ("tokens", "overlap", "message"),
    [
        (7, 0, "chunk_tokens is 7, too few for a passage: choose 8 or more"),
        (20, 11, "overlap is 11 at 20 tokens per chunk: choose between 0 and 10"),
        (20, -1, "overlap is -1 at 20 tokens per chunk: choose between 0 and 10"),
    ],
)
def test_unusable_numbers_are_refused(tokens: int, overlap: int, message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}$"):
        Chunker(len, chunk_tokens=tokens, overlap=overlap)
