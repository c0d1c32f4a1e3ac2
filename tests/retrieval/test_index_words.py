"""Words and filters: terms, BM25 over segments, fusion, what filters accept and refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm2_mm.errors import FilterError, InputError
from lfm2_retrieval.index import lexical
from lfm2_retrieval.index.filters import Columns, check_metadata, parse_filter
from lfm2_retrieval.index.index import Index
from lfm2_retrieval.index.segment import Record
from tests.retrieval.index_fakes import WordEncoder


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Index, naïve_2!", ["the", "index", "naïve_2"]),
        ("東京都", ["東京", "東京都", "京都"]),
        ("と LFM2を", ["と", "lfm2", "を"]),
        ("ภาษา", ["ภา", "ภาษ", "าษ", "าษา", "ษา"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ＦＵＬＬ Straße", ["full", "strasse"]),
        ("?!", []),
    ],
)
def test_terms(text: str, wanted: list[str]) -> None:
    assert list(lexical.terms(text)) == wanted


def test_scores_are_bm25_and_do_not_depend_on_segments(tmp_path: Path) -> None:
    texts = ["a cat", "a dog and a cat and a mouse", "a bird", "dog dog cat", "nothing here"]
    together, apart = (Index.open(tmp_path / name, WordEncoder()) for name in ("one", "many"))
    together.add_texts(texts, [f"d{n}" for n in range(5)])
    apart.add_texts(texts[:3], ["d0", "d1", "d2"])
    apart.add_texts(texts[3:], ["d3", "d4"])
    found = []
    for index in (together, apart):
        snapshot = index._snapshot
        pairs = [
            (int(f), s.lexical)
            for f, s in zip(snapshot.firsts[:-1], snapshot.segments, strict=True)
        ]
        found.append(lexical.score("dog", pairs, 5))
    # Lucene's BM25, k1 = 1.5, b = 0.75
    idf = math.log(1 + (5 - 2 + 0.5) / (2 + 0.5))
    mean = sum(len(text.split()) for text in texts) / 5

    def plain(times: int, length: int) -> float:
        return idf * times / (times + 1.5 * (1 - 0.75 + 0.75 * length / mean))

    np.testing.assert_allclose(found[0], [0, plain(1, 8), 0, plain(2, 3), 0], rtol=1e-5)
    # only the mean length is that of a segment
    np.testing.assert_allclose(found[1], found[0], rtol=0.2)
    assert (found[1] > 0).tolist() == (found[0] > 0).tolist()


def test_scores_of_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexical, "_PART", 2)
    index = Index.open(tmp_path / "i", WordEncoder())
    index.add_texts(["x y", "y", "?", "!", "y z", "z"], list("abcdef"))
    (segment,) = index._snapshot.segments
    assert [part.first for part in segment.lexical.parts] == [0, 4]
    scores = lexical.score("y", [(0, segment.lexical)], 6)
    assert np.flatnonzero(scores).tolist() == [0, 1, 4]
    assert not lexical.score("unheard", [(0, segment.lexical)], 6).any()


def test_fusion_sums_reciprocal_ranks() -> None:
    (first, *rest) = lexical.fuse([7, 3], [3, 9])
    assert first == (3, 1 / 62 + 1 / 61)
    assert rest == [(7, 1 / 61), (9, 1 / 62)]


def test_hybrid_finds_a_word_that_vectors_do_not_know(tmp_path: Path) -> None:
    encoder = WordEncoder()
    index = Index.open(tmp_path / "i", encoder)
    index.add_texts([f"plain text number {n}" for n in range(30)])
    index.add_texts(["entirely other: XK-73"], ["part"])
    query = "plain plain plain xk"
    by_vectors, by_both = (
        [hit.id for hit in index.search(query, 40, hybrid=both)] for both in (None, True)
    )
    assert len(by_vectors) == len(by_both) == 31
    assert by_both.index("part#0") < by_vectors.index("part#0") == 30
    assert [hit.id for hit in index.search("xk", hybrid=True, filter="id=part")] == ["part#0"]


RECORDS = [
    Record(
        id="a", digest="", path="manual/x.md", title=None, language="de", metadata={"year": 2019}
    ),
    Record(id="b", digest="", path="notes.md", title="T", language="fr", metadata={"year": 2020}),
    Record(id="c", digest="", path=None, title=None, language=None, metadata={"year": "2021"}),
    Record(
        id="d", digest="", path=None, title=None, language=None, metadata={"ok": True, "lang": "de"}
    ),
]


@pytest.mark.parametrize(
    ("filter", "wanted"),
    [
        (None, "abcd"),
        ({"lang": "de"}, "ad"),
        ("lang=de,fr", "abd"),
        ({"lang": ["fr", "ja"]}, "b"),
        ("lang!=de", "bc"),
        ({"year": {">=": 2020}}, "bc"),
        ("year>=2020", "bc"),
        (["year>2018", "year<2021"], "ab"),
        ({"year": {">": 2018, "<=": 2019}}, "a"),
        ({"year": 2021}, "c"),
        ("year==2019", "a"),
        ({"path": {"glob": "manual/*"}}, "a"),
        ("path~*.md", "ab"),
        ({"ok": True}, "d"),
        ("ok=true", "d"),
        ({"ok": 1}, ""),
        ("nothing=1", ""),
        ({"id": {"in": ["a", "c"]}}, "ac"),
        ("title=T", "b"),
    ],
)
def test_filters(filter: Any, wanted: str) -> None:
    mask = Columns(RECORDS).mask(parse_filter(filter))
    assert "".join(r.id for r, fits in zip(RECORDS, mask, strict=True) if fits) == wanted


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ("lang", "the filter 'lang' cannot be understood; write it as lang=de, year>=2020 or"),
        ("lang= ", "the filter 'lang= ' cannot be understood"),
        ({"a b": 1}, "the filter names the key 'a b'; write it as"),
        ({"year": {"~~": 1}}, "the filter on 'year' has the operator '~~'; use one of =, !=, >"),
        ({"year": None}, "the filter on 'year' compares with None; use texts, numbers or booleans"),
        (
            {"year": {">": [1, 2]}},
            r"the filter on 'year' compares > with the list \[1, 2\]; use one",
        ),
        ([3], "the filter 3 cannot be understood"),
    ],
)
def test_filters_that_cannot_be_understood(filter: Any, message: str) -> None:
    with pytest.raises(FilterError, match=message):
        parse_filter(filter)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a b": 1}, "metadata has the key 'a b'; use letters, digits, _ . - and begin with"),
        ({"a": [1]}, r"metadata 'a' is \[1\]; store a text, a number or a boolean"),
        ({"a": float("nan")}, "metadata 'a' is nan; store"),
        ({"a": "x\x1b[2J"}, r"metadata 'a' holds the control character '\\x1b'; remove it"),
    ],
)
def test_metadata_that_cannot_be_stored(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_metadata(metadata)
