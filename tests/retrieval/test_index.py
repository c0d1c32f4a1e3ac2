"""`Index` as its users see it: what it finds, holds, refuses and remembers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lfm2_retrieval
from lfm2_mm.errors import (
    CorruptIndex,
    IndexFault,
    IndexLocked,
    IndexMismatch,
    InputError,
    SettingError,
)
from lfm2_retrieval import Index
from lfm2_retrieval.documents.model import Chunk, Document, Unchanged, Unreadable
from lfm2_retrieval.index import plaid
from lfm2_retrieval.index.adding import Digests, add_documents
from lfm2_retrieval.index.lock import WriterLock
from lfm2_retrieval.index.writer import Sizes
from tests.retrieval.index_fakes import DIM, WordEncoder, corpus, maxsim


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebooks, merges and retraining happen within a few additions."""
    for name, value in {"exact": 1000, "train": 5000, "smallest": 256, "fanout": 3}.items():
        monkeypatch.setattr(Sizes, name, value)


@pytest.fixture
def texts(tmp_path: Path) -> Iterator[Index]:
    with Index.open(tmp_path / "texts", WordEncoder()) as index:
        yield index


def fill(path: Path, rows: list[Any], step: int = 20, **options: Any) -> Index:
    index = Index.open(path, **options)
    for begin in range(0, len(rows), step):
        some = range(begin, min(begin + step, len(rows)))
        index.add_vectors(
            [rows[n] for n in some],
            [f"text {n}" for n in some],
            [f"d{n}" for n in some],
            [{"number": n} for n in some],
        )
    return index


def ids(index: Index) -> set[str]:
    return {row.id for row in index.documents()}


# ---- finding ----


@pytest.mark.parametrize("compressed", [False, True])
def test_the_best_passages_are_found(
    tmp_path: Path, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sizes, "exact", 1000 if compressed else 10**9)
    monkeypatch.setattr(plaid, "stages_for", lambda k: plaid.Stages(16, 150, 80, 40))
    rows = corpus(300)
    index = fill(tmp_path / "i", rows)
    assert (index.status().centroids > 0) == compressed
    assert index.status().exact != compressed
    shared = 0
    for query in corpus(20, seed=5):
        wanted = sorted(range(300), key=lambda n: -maxsim(query, rows[n]))[:5]
        found = index.search_vectors(query, 5)
        assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)
        shared += len({id for id, _ in found} & {f"d{n}#0" for n in wanted})
        for id, score in found:
            assert score == pytest.approx(maxsim(query, rows[int(id[1:-2])]), rel=0.05)
    assert shared >= (85 if compressed else 100)


def test_every_passage_that_fits_is_found_though_cells_are_few(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plaid, "stages_for", lambda k: plaid.Stages(2, 60, 40, 30))
    rows = corpus(200)
    index = fill(tmp_path / "i", rows)
    query = corpus(1, seed=7)[0]
    every = {f"d{n}#0" for n in range(200)}
    assert {id for id, _ in index.search_vectors(query, 500, exact=True)} == every
    few = index.search_vectors(query, 20, filter="number<20")
    assert {id for id, _ in few} == {f"d{n}#0" for n in range(20)}
    # far more fit than the stages let through
    many = index.search_vectors(query, 10, filter="number>=20")
    assert len(many) == 10
    assert all(int(id[1:-2]) >= 20 for id, _ in many)


def test_a_hit_has_its_text_place_and_matched_words(texts: Index) -> None:
    ids = texts.add_texts(
        ["Der Drucker braucht Papier.", "La imprimante attend du papier."],
        metadata=[{"lang": "de", "year": 2020}, {"lang": "fr"}],
    )
    (hit,) = texts.search("papier braucht", 5, filter={"lang": "de"})
    assert (hit.id, hit.text) == (f"{ids[0]}#0", "Der Drucker braucht Papier.")
    assert hit.metadata == {"lang": "de", "year": 2020}
    assert (hit.path, hit.page, hit.line, hit.title) == (None, None, None, None)
    assert [hit.text[a:b] for a, b, _ in hit.spans] == ["braucht", "Papier"]
    assert all(0 < weight <= 1 for _, _, weight in hit.spans)
    assert texts.search("papier", spans=False)[0].spans == []
    assert texts.search("papier", filter="lang=ja") == []


def test_equal_passages_keep_their_order(texts: Index) -> None:
    texts.add_texts(["same words", "other", "same words", "same words"], list("abcd"))
    assert [hit.id for hit in texts.search("same words", 3)] == ["a#0", "c#0", "d#0"]


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    index = Index.open(tmp_path / "i")
    assert index.search_vectors(np.ones((2, DIM), np.float32)) == []
    assert index.status(verify=True).bytes_per_token == 0
    assert list(index.documents()) == []


@pytest.mark.parametrize("query", ["", "  \n", None])
def test_an_empty_query_is_refused(texts: Index, query: Any) -> None:
    with pytest.raises(InputError, match=r"the query is .*; write what to look for"):
        texts.search(query)


def test_queries_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    index = fill(tmp_path / "i", corpus(3))
    with pytest.raises(InputError, match=r"the query has the shape \[2, 5\], but the index holds"):
        index.search_vectors(np.ones((2, 5)))
    with pytest.raises(InputError, match="the query holds values that are not finite; check the"):
        index.search_vectors(np.full((2, DIM), np.nan))
    with pytest.raises(InputError, match="k is 0; ask for at least 1 passage"):
        index.search_vectors(np.ones((2, DIM)), 0)
    with pytest.raises(IndexFault, match="holds vectors that were handed in and names no model"):
        index.search("text")


# ---- changing ----


def test_the_same_id_again_replaces(texts: Index) -> None:
    texts.add_texts(["old words", "others"], ["a", "b"])
    texts.add_texts(["new words"], ["a"])
    assert [row.id for row in texts.documents()] == ["b", "a"]
    assert "old" not in texts.search("old words", 1)[0].text
    assert texts.status().deleted == 1


def test_deleting_documents_and_passages(tmp_path: Path, small: None) -> None:
    index = fill(tmp_path / "i", corpus(100))
    assert index.delete(["d3", "d4#0", "d4#9", "nobody", "d3"]) == 2
    assert index.delete("d5") == 1
    assert ids(index) == {f"d{n}" for n in range(100)} - {"d3", "d4", "d5"}
    assert index.delete([f"d{n}" for n in range(100)]) == 97
    assert index.status(verify=True).segments == 0
    assert index.search_vectors(corpus(1)[0]) == []


def test_deletions_last_through_every_later_change(tmp_path: Path, small: None) -> None:
    rows = corpus(60)
    index = fill(tmp_path / "i", rows, step=60)
    index.delete("d1")
    index.add_vectors(rows[:1], ["again"], ["e"])
    index.delete("d2")
    index.add_vectors(rows[:1], ["again"], ["d3"])
    index.compact()
    wanted = {f"d{n}" for n in range(60)} - {"d1", "d2"} | {"e"}
    assert ids(index) == wanted
    assert index.status().deleted == 0
    assert ids(Index.open(tmp_path / "i")) == wanted


def test_segments_merge_and_the_codebook_grows(tmp_path: Path, small: None) -> None:
    rows = corpus(200)
    index = Index.open(tmp_path / "i")
    seen = []
    for begin in range(0, 200, 10):
        some = range(begin, begin + 10)
        index.add_vectors([rows[n] for n in some], ["t"] * 10, [f"d{n}" for n in some])
        seen.append((index.status().segments, index.status().centroids))
    assert max(segments for segments, _ in seen) <= 6
    assert [centroids for _, centroids in seen[::19]] == [0, 256]
    assert index.status(verify=True).documents == 200
    assert index.search_vectors(rows[123], 1)[0][0] == "d123#0"
    index.compact()
    assert index.status().segments == 1
    before = index.status().generation
    index.compact()  # nothing to do
    assert index.status().generation == before


def test_an_outgrown_codebook_is_trained_anew(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sizes, "outgrown", 100)
    rows = corpus(250)
    index = fill(tmp_path / "i", rows[:60], step=60)
    first = index.status().centroids
    index.add_vectors(rows[60:], ["t"] * 190)
    assert index.status().centroids == first
    monkeypatch.setattr(Sizes, "outgrown", 2)
    index.compact()
    assert index.status().centroids >= 2 * first
    assert index.search_vectors(rows[30], 1)[0][0] == "d30#0"
    np.testing.assert_allclose(
        np.einsum("td,td->t", index.vectors("d30#0"), rows[30]), 1.0, atol=0.03
    )


def test_bulk_trains_once_at_the_end(tmp_path: Path, small: None) -> None:
    with Index.open(tmp_path / "i") as index:
        with index.bulk():
            for n in range(5):
                index.add_vectors(corpus(30, seed=n), ["t"] * 30)
            assert index.status().centroids == 0
        assert index.status().centroids > 0
        assert index.status().documents == 150


def test_compaction_keeps_ids_texts_and_places(texts: Index) -> None:
    items = [document("a.txt", "1", "one one", "two two", "three"), document("b.txt", "1", "four")]
    with texts._changing() as writer:
        add_documents(writer, WordEncoder(), items)
    texts.delete("a.txt#1")
    texts.compact()
    assert [hit.id for hit in texts.search("three", 1)] == ["a.txt#2"]
    hit = texts.search("three", 1)[0]
    assert (hit.path, hit.page, hit.line, hit.title, hit.language) == ("a.txt", 3, 30, "T", "en")
    assert [row.passages for row in texts.documents()] == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["x"], ["a", "b"]), "2 ids came with 1 texts; give one for each"),
        ((["x", "y"], ["a", "a"]), "the id 'a' is given more than once; give each text its own"),
        ((["x"], ["../a"]), r"the document id or path '../a' leads out of its folder; leave out"),
        ((["x"], ["a\x1b[2J"]), r"'a\\x1b\[2J' holds the control character '\\x1b'; remove it"),
        ((["x"], ["a\u202eb"]), "holds the control character"),
        ((["x"], [""]), "the document id or path is ''; use a text of 1 to 4096 characters"),
        ((["x"], None, [{"path": "a/../../b"}]), "leads out of its folder"),
        (("text",), "the texts are one text; give a list of texts"),
        (([3],), "text 0 is a int; give texts"),
    ],
)
def test_what_cannot_be_stored_is_refused(texts: Index, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        texts.add_texts(*arguments)
    assert texts.status().documents == 0


def test_vectors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    index = Index.open(tmp_path / "i")
    index.add_vectors([np.ones((2, 4))], ["a"])
    with pytest.raises(InputError, match=r"has the shape \[2, 5\], but the index holds rows of 4"):
        index.add_vectors([np.ones((2, 5))], ["a"])
    with pytest.raises(InputError, match=r"has the shape \[0, 4\]"):
        index.add_vectors([np.ones((0, 4))], ["a"])
    with pytest.raises(InputError, match="1 vectors came with 2 texts; give one for each"):
        index.add_vectors([np.ones((2, 4))], ["a", "b"])
    assert index.add_vectors([], []) == []


# ---- documents ----


def document(path: str, digest: str, *chunks: str) -> Document:
    return Document(
        path=path,
        digest=digest,
        title="T",
        language="en",
        chunks=tuple(
            Chunk(text=text, page=n + 1, line=10 * (n + 1), start=0, end=len(text))
            for n, text in enumerate(chunks)
        ),
        metadata={"size": 1},
    )


def test_documents_are_added_updated_and_dropped(texts: Index) -> None:
    encoder = WordEncoder()
    told = []

    def add(*items: Any) -> Any:
        with texts._changing() as writer:
            return add_documents(writer, encoder, items, lambda r: told.append(r.current))

    first = add(
        document("a", "1", "one", "two"), Unreadable("z", "it is broken."), document("e", "1")
    )
    assert (first.added, first.updated, first.passages) == (2 - 1, 0, 2)
    assert [(one.path, one.reason) for one in first.skipped] == [("z", "it is broken.")]
    assert ids(texts) == {"a"}
    second = add(document("a", "2", "three"), Unchanged("b"))
    assert (second.added, second.updated, second.unchanged) == (0, 1, 1)
    assert [row.digest for row in texts.documents()] == ["2"]
    third = add(document("a", "3"))
    assert (third.removed, ids(texts)) == (1, set())
    bad = add(document("x/../../y", "1", "one"), document("fine", "1", "one"))
    assert [one.path for one in bad.skipped] == ["x/../../y"]
    assert "leads out of its folder" in bad.skipped[0].reason
    assert "a" in told and "fine" in told


def test_rows_that_a_table_no_longer_has_go(texts: Index) -> None:
    def add(*items: Any) -> Any:
        with texts._changing() as writer:
            return add_documents(writer, WordEncoder(), items)

    add(*(document(f"t.csv#{n}", "1", f"row {n}") for n in range(1, 6)))
    report = add(Unchanged("t.csv#1"), document("t.csv#2", "2", "row"))
    assert report.removed == 3
    assert ids(texts) == {"t.csv#1", "t.csv#2"}
    report = add(document("t.csv#1", "3", "row"), Unreadable("t.csv", "the rest is broken."))
    assert report.removed == 0


def test_known_digests_are_looked_up(texts: Index) -> None:
    with texts._changing() as writer:
        add_documents(writer, WordEncoder(), [document("a", "1", "one"), document("b", "2", "two")])
        known = Digests(writer)
        assert known.get("a") == "1"
        assert "c" not in known
        assert dict(known) == {"a": "1", "b": "2"}
        assert len(known) == 2


def test_files_are_read_and_added(texts: Index, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("The printer needs paper.")
    (folder / "b.txt").write_text("The bird sings.")
    report = texts.add(folder)
    assert (report.added, report.unchanged) == (2, 0)
    assert texts.search("printer paper", 1)[0].path == "a.txt"
    (folder / "b.txt").write_text("The bird flies.")
    again = texts.add([folder])
    assert (again.added, again.updated, again.unchanged) == (0, 1, 1)
    (tmp_path / "empty").mkdir()
    assert texts.add(tmp_path / "empty").added == 0


def test_ctrl_c_keeps_what_was_acknowledged_and_a_rerun_continues(
    texts: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2_retrieval.index import adding

    monkeypatch.setattr(adding, "_GROUP", 4)
    monkeypatch.setattr(adding, "_COMMIT_TOKENS", 20)
    encoder = WordEncoder()

    def items(interrupted: bool, known: Any) -> Iterator[Any]:
        for n in range(20):
            if interrupted and n == 15:
                raise KeyboardInterrupt
            path = f"d{n:02}"
            yield Unchanged(path) if known.get(path) == "1" else document(path, "1", f"word w{n}")

    with pytest.raises(KeyboardInterrupt), texts._changing() as writer:
        add_documents(writer, encoder, items(True, {}))
    kept = ids(texts)
    assert 4 <= len(kept) < 15
    encoder.encoded.clear()
    with texts._changing() as writer:
        report = add_documents(writer, encoder, items(False, Digests(writer)))
    assert (report.unchanged, report.added) == (len(kept), 20 - len(kept))
    assert len(encoder.encoded) == 20 - len(kept)
    assert ids(texts) == {f"d{n:02}" for n in range(20)}
    assert {path.name for path in (texts._folder / "segments").iterdir()} == {
        part.name for part in texts._state.segments
    }


def test_a_document_of_many_passages_is_encoded_in_groups(
    texts: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm2_retrieval.index import adding

    monkeypatch.setattr(adding, "_GROUP", 3)
    sizes = []
    encoder = WordEncoder()
    real = encoder.encode_documents
    encoder.encode_documents = lambda texts, **_: sizes.append(len(texts)) or real(texts)  # type: ignore
    with texts._changing() as writer:
        add_documents(writer, encoder, [document("a", "1", *(f"w{n}" for n in range(8)))])
    assert sizes == [3, 3, 2]
    assert [row.passages for row in texts.documents()] == [8]


# ---- the folder ----


def test_an_index_is_found_again_with_what_made_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "i"
    with Index.open(path, WordEncoder(), bits=2) as index:
        index.add_texts(["a b"], ["x"])
    with Index.open(path, WordEncoder()) as again:
        assert again.status().bits == 2
        assert again.status().model == "words"
        assert again.search("a", 1)[0].id == "x#0"
        np.testing.assert_allclose(
            again.vectors("x#0"), WordEncoder().encode_documents(["a b"])[0].numpy(), atol=1e-3
        )
        with pytest.raises(InputError, match="there is no passage 'y' in the index; list it to"):
            again.vectors("y")


def test_an_index_of_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    Index.open(tmp_path / "i", WordEncoder())
    with pytest.raises(IndexMismatch) as caught:
        Index.open(tmp_path / "i", WordEncoder("other", "f" * 16))
    assert (
        "was made by the model 'words' (fingerprint 0123456789abcdef, 32 dimensions), not by "
        in str(caught.value)
    )
    assert "'other' (fingerprint ffffffffffffffff, 32 dimensions); open it with the model" in str(
        caught.value
    )
    fill(tmp_path / "bare", corpus(2))
    with pytest.raises(IndexMismatch, match="was made by handed-in vectors .* not by 'words'"):
        Index.open(tmp_path / "bare", WordEncoder())
    # the same weights under another name are the same model
    Index.open(tmp_path / "i", WordEncoder("renamed")).add_texts(["a"])


def test_an_index_of_the_same_model_in_fewer_bits_is_refused_with_a_way_out(tmp_path: Path) -> None:
    four = WordEncoder("small", "0123456789abcdef-int4")
    Index.open(tmp_path / "whole", WordEncoder())
    with pytest.raises(IndexMismatch) as caught:
        Index.open(tmp_path / "whole", four)
    assert str(caught.value).endswith(
        "was made by the model 'words' in full precision or 8 bits, and 'small' is the same model "
        "in int4, whose vectors rank otherwise; open it with quantize=int8 or none, or make a new "
        "index"
    )
    Index.open(tmp_path / "four", four).add_texts(["a"])
    with pytest.raises(IndexMismatch, match="in int4, and 'words' is the same .* quantize=int4, "):
        Index.open(tmp_path / "four", WordEncoder())


def test_an_index_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(IndexFault, match=r"there is no index at .*; check the path or add to it"):
        Index.open(tmp_path / "i", create=False)
    with pytest.raises(IndexFault, match="there is no index at"):
        Index.open(tmp_path / "i", read_only=True)
    assert not (tmp_path / "i").exists()
    with pytest.raises(SettingError, match="bits is 3; choose 2, 4 or 8"):
        Index.open(tmp_path / "i", bits=3)


def test_a_folder_of_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(IndexFault, match="holds 'thesis.tex' and is no index; name a new or empty"):
        Index.open(tmp_path)
    with pytest.raises(IndexFault, match="thesis.tex' is a file; name a folder for the index"):
        Index.open(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_closed_or_read_only_index_refuses(tmp_path: Path) -> None:
    index = fill(tmp_path / "i", corpus(3))
    index.close()
    index.close()
    with pytest.raises(IndexFault, match="is closed; open it again"):
        index.status()
    reader = Index.open(tmp_path / "i", read_only=True)
    with pytest.raises(IndexFault, match="was opened read-only; open it without read_only"):
        reader.delete("d1")


def test_readers_keep_their_state_until_they_refresh(tmp_path: Path, small: None) -> None:
    rows = corpus(80)
    writer = fill(tmp_path / "i", rows)
    reader = Index.open(tmp_path / "i", read_only=True)
    before = reader.search_vectors(rows[0], 5)
    writer.delete([f"d{n}" for n in range(79)])
    writer.compact()
    assert ids(writer) == {"d79"}
    # the files are gone from the folder, but this reader has them open
    assert reader.search_vectors(rows[0], 5) == before
    assert len(ids(reader)) == 80
    assert reader.refresh()
    assert ids(reader) == {"d79"}
    assert not reader.refresh()


def test_two_objects_write_in_turn(tmp_path: Path) -> None:
    one, two = (Index.open(tmp_path / "i", WordEncoder()) for _ in range(2))
    one.add_texts(["a"], ["a"])
    two.add_texts(["b"], ["b"])
    one.add_texts(["c"], ["c"])
    assert ids(one) == {"a", "b", "c"}


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    index = fill(tmp_path / "i", corpus(3))
    with index.bulk(), pytest.raises(IndexLocked) as caught:
        Index.open(tmp_path / "i").delete("d1")
    assert f"process {os.getpid()} is writing to the index" in str(caught.value)
    assert "; wait until it has finished and try again" in str(caught.value)
    index.delete("d1")
    lock = WriterLock(tmp_path / "i")
    with lock, lock:
        assert lock.held
    assert not lock.held


# ---- damage ----


def damaged(path: Path) -> Path:
    """A file of the only segment's vectors."""
    return next((path / "segments").glob("*/vectors.bin"))


def test_a_truncated_file_is_detected_and_named(tmp_path: Path) -> None:
    fill(tmp_path / "i", corpus(5)).close()
    file = damaged(tmp_path / "i")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(
        CorruptIndex, match=r"vectors.bin' has \d+ bytes instead of \d+; restore it"
    ):
        Index.open(tmp_path / "i")
    file.unlink()
    with pytest.raises(CorruptIndex, match=r"vectors.bin' cannot be read \(No such file or dir"):
        Index.open(tmp_path / "i")


def test_a_flipped_bit_is_detected_and_named(tmp_path: Path, small: None) -> None:
    index = fill(tmp_path / "i", corpus(100))
    index.delete("d1")
    for file in sorted(index._state.named(tmp_path / "i")):
        data = bytearray(file.read_bytes())
        if not data:
            continue
        data[len(data) // 2] ^= 16
        good, _ = file.read_bytes(), file.write_bytes(data)
        with pytest.raises(CorruptIndex, match=rf"{file.name}' has the checksum .* instead of"):
            index.status(verify=True)
        file.write_bytes(good)
    index.status(verify=True)


def test_damage_that_leads_out_of_an_array_is_no_traceback(tmp_path: Path, small: None) -> None:
    fill(tmp_path / "i", corpus(100), step=100).close()
    codes = next((tmp_path / "i").glob("segments/*/codes.bin"))
    codes.write_bytes(b"\xff" * codes.stat().st_size)
    index = Index.open(tmp_path / "i")
    with pytest.raises(CorruptIndex, match="contradicts itself .*; run `lfm2-mm index status"):
        index.search_vectors(corpus(1)[0], exact=True)


def test_a_damaged_manifest_is_detected_and_named(tmp_path: Path) -> None:
    fill(tmp_path / "i", corpus(5)).close()
    manifest = next((tmp_path / "i").glob("manifest-*"))
    good = manifest.read_bytes()
    manifest.write_bytes(good.replace(b'"bits": 4', b'"bits": 8'))
    with pytest.raises(CorruptIndex, match=r"manifest-\d+.json' does not have its checksum"):
        Index.open(tmp_path / "i")
    manifest.unlink()
    with pytest.raises(CorruptIndex, match=r"manifest-\d+.json' is missing; restore it from"):
        Index.open(tmp_path / "i")
    (tmp_path / "i" / "CURRENT").write_text("../../etc/passwd 0")
    with pytest.raises(CorruptIndex, match="CURRENT' names no manifest"):
        Index.open(tmp_path / "i")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"version": 9}, IndexMismatch, "has format version 9, but this program reads 2 to 4;"),
        ({"format": "zip"}, CorruptIndex, "is no manifest"),
        ({"segments": [{"name": "../x"}]}, CorruptIndex, "is no manifest"),
    ],
)
def test_foreign_manifests_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    from lfm2_retrieval.index import files

    Index.open(tmp_path / "i").close()
    path = next((tmp_path / "i").glob("manifest-*"))
    stored = files.put(path, json.dumps({**json.loads(path.read_text()), **change}).encode())
    (tmp_path / "i" / "CURRENT").write_text(f"{path.name} {stored.sha256}\n")
    with pytest.raises(error, match=message):
        Index.open(tmp_path / "i")


def test_what_a_crash_left_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "i"
    index = fill(path, corpus(5))
    shutil.copytree(next((path / "segments").iterdir()), path / "segments" / "half")
    (path / "manifest-99999999.json").write_text("{")
    (path / "CURRENT.tmp").write_text("x")
    assert ids(Index.open(path, read_only=True)) == ids(index)
    assert (path / "segments" / "half").exists()
    index.delete([])
    assert not (path / "segments" / "half").exists()
    assert not list(path.glob("*.tmp"))
    assert len(list(path.glob("manifest-*"))) == 1


def test_the_face_is_lazy_and_complete() -> None:
    assert lfm2_retrieval.Index is Index
    assert all(getattr(lfm2_retrieval, name) for name in lfm2_retrieval.__all__)
    with pytest.raises(AttributeError, match="module 'lfm2_retrieval' has no attribute 'Nothing'"):
        _ = lfm2_retrieval.Nothing
