"""Words: BM25 of a segment's passages, and the fusion of two rankings.

bm25s computes the scores when a segment is written, in parts of bounded size; they are stored by
term. At search time each part's inverse document frequency is replaced by that of the whole index,
so that scores do not depend on how passages are spread over segments. Knows no vectors.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2_mm.errors import CorruptIndex, MissingExtra
from lfm2_retrieval.index import files
from lfm2_retrieval.index.files import FileWriter
from lfm2_retrieval.index.manifest import Part

__all__ = ["LexicalFiles", "LexicalWriter", "fuse", "score", "terms"]

_PART = 1 << 15
"""Passages that bm25s sees at once: bounds the memory of building."""
_RANK = 60
"""The constant of reciprocal rank fusion (Cormack, Clarke and Buettcher, 2009)."""

# Scripts written without spaces: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han, Hangul (whose
# words carry endings). Their runs become character pairs and triples.
_DENSE = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
# marks that belong to words, but are no word characters to `re`
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0900-\u0dff"
_WORD = re.compile(f"[{_DENSE}]+|[^\\W_{_DENSE}][\\w{_MARKS}]*")
_IS_DENSE = re.compile(f"[{_DENSE}]")
_LONGEST = 64


def terms(text: str) -> Iterator[str]:
    """The terms of a text, folded: words, and character 2- and 3-grams where there are no spaces.

    Example:
        >>> list(terms("The index, 東京都"))
        ['the', 'index', '東京', '東京都', '京都']
    """
    for match in _WORD.finditer(unicodedata.normalize("NFKC", text).casefold()):
        word = match[0]
        if not _IS_DENSE.match(word):
            # a word followed by dense characters ends where these begin
            for piece in re.split(f"[{_DENSE}]+", word):
                if piece:
                    yield piece[:_LONGEST]
        if len(dense := "".join(_IS_DENSE.findall(word))) == 1:
            yield dense
        for begin in range(len(dense) - 1):
            yield dense[begin : begin + 2]
            if begin + 3 <= len(dense):
                yield dense[begin : begin + 3]


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a part's postings stand in the files."""

    passages: int
    terms: int
    term_bytes: int
    postings: int


class LexicalWriter:
    """Collects the terms of passages and writes their scores.

    Args:
        create: Opens a new file of the segment.
    """

    _NAMES = ("terms.bin", "term_offsets.bin", "posting_offsets.bin", "postings.bin", "bm25.bin")

    def __init__(self, create: Callable[[str], FileWriter]) -> None:
        self._create = create
        self._files = [create(name) for name in self._NAMES]
        self._parts: list[_Part] = []
        self._vocabulary: dict[str, int] = {}
        self._passages: list[NDArray[np.int32]] = []

    def add(self, text: str) -> None:
        """The next passage."""
        vocabulary = self._vocabulary
        found = [vocabulary.setdefault(term, len(vocabulary)) for term in terms(text)]
        self._passages.append(np.array(found, np.int32))
        if len(self._passages) >= _PART:
            self._write_part()

    def finish(self) -> None:
        """Write the rest; closing the files is for the caller."""
        if self._passages:
            self._write_part()
        content = json.dumps([asdict(part) for part in self._parts]).encode()
        self._create("lexical.json").write(content)

    def _write_part(self) -> None:
        passages, vocabulary = self._passages, self._vocabulary
        self._passages, self._vocabulary = [], {}
        if not vocabulary:
            self._parts.append(_Part(len(passages), 0, 0, 0))
            return
        # terms are looked up by bisection, in the order of their bytes
        encoded = [term.encode("utf-8", "surrogatepass") for term in vocabulary]
        order = sorted(range(len(encoded)), key=encoded.__getitem__)
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        scores = _bm25([rank[one].tolist() for one in passages], len(order))
        blob = b"".join(encoded[number] for number in order)
        lengths = [len(encoded[number]) for number in order]
        content = (
            blob,
            np.cumsum([0, *lengths]).astype("<i8"),
            scores["indptr"].astype("<i8"),
            scores["indices"].astype("<i4"),
            scores["data"].astype("<f4"),
        )
        for file, data in zip(self._files, content, strict=True):
            file.write(data)
        postings = len(scores["data"])
        self._parts.append(_Part(len(passages), len(order), len(blob), postings))


def _bm25(passages: list[list[int]], n_terms: int) -> Any:
    try:
        BM25: Any = import_module("bm25s").BM25
    except ImportError as error:
        raise MissingExtra(
            "bm25s is not installed, which scores words; run `pip install 'lfm2-mm[retrieval]'`"
        ) from error
    model = BM25(method="lucene", backend="numpy", csc_backend="numpy")
    return model.build_index_from_ids(
        unique_token_ids=list(range(n_terms)),
        corpus_token_ids=passages,
        show_progress=False,
        leave_progress=False,
    )


@dataclass(frozen=True, eq=False)
class _Mapped:
    """A part's arrays; `first` is its first passage in the segment."""

    first: int
    passages: int
    blob: NDArray[Any]
    term_offsets: NDArray[Any]
    posting_offsets: NDArray[Any]
    postings: NDArray[Any]
    scores: NDArray[Any]

    def find(self, term: bytes) -> tuple[int, int] | None:
        """Where a term's postings begin and end."""
        low, high = 0, len(self.term_offsets) - 2
        while low <= high:
            middle = (low + high) // 2
            begin, end = self.term_offsets[middle : middle + 2]
            found = self.blob[begin:end].tobytes()
            if found == term:
                begin, end = self.posting_offsets[middle : middle + 2]
                return int(begin), int(end)
            if found < term:
                low = middle + 1
            else:
                high = middle - 1
        return None


class LexicalFiles:
    """The stored scores of one segment."""

    def __init__(self, parts: Sequence[_Mapped]) -> None:
        self.parts = parts

    @classmethod
    def open(cls, where: Path, part: Part) -> LexicalFiles:
        """Map what `LexicalWriter` wrote.

        Raises:
            CorruptIndex: if a file is missing, of another size, or no such file.
        """
        path = where / "lexical.json"
        try:
            described = [_Part(**one) for one in json.loads(path.read_bytes())]
        except (OSError, ValueError, TypeError) as error:
            raise CorruptIndex(
                f"the index file {str(path)!r} cannot be read ({error}); restore it from a backup "
                "or build the index anew"
            ) from error
        full = [one for one in described if one.terms]
        blob = files.map_bytes(where / "terms.bin", sum(one.term_bytes for one in full))
        rows = sum(one.terms + 1 for one in full)
        term_offsets = files.map_array(where / "term_offsets.bin", "<i8", (rows,))
        posting_offsets = files.map_array(where / "posting_offsets.bin", "<i8", (rows,))
        count = sum(one.postings for one in full)
        postings = files.map_array(where / "postings.bin", "<i4", (count,))
        scores = files.map_array(where / "bm25.bin", "<f4", (count,))
        mapped, first, row, byte, posting = [], 0, 0, 0, 0
        for one in described:
            if one.terms:
                entry = slice(row, row + one.terms + 1)
                mapped.append(
                    _Mapped(
                        first,
                        one.passages,
                        blob[byte : byte + one.term_bytes],
                        term_offsets[entry],
                        posting_offsets[entry],
                        postings[posting : posting + one.postings],
                        scores[posting : posting + one.postings],
                    )
                )
                row, byte = entry.stop, byte + one.term_bytes
                posting += one.postings
            first += one.passages
        return cls(mapped)


def score(
    query: str, segments: Sequence[tuple[int, LexicalFiles]], n_passages: int
) -> NDArray[np.float32]:
    """BM25 of every passage of an index.

    Args:
        query: Its terms count as often as they occur.
        segments: First passage and stored scores of each.
        n_passages: How many passages there are, deleted ones included.

    Returns:
        float32 [n_passages]; 0 where no term occurs.
    """
    found = np.zeros(n_passages, np.float32)
    for term, times in Counter(terms(query)).items():
        data = term.encode("utf-8", "surrogatepass")
        hits = [
            (first, part, where)
            for first, lexical in segments
            for part in lexical.parts
            if (where := part.find(data)) is not None
        ]
        everywhere = _idf(sum(end - begin for _, _, (begin, end) in hits), n_passages)
        for first, part, (begin, end) in hits:
            weight = times * everywhere / _idf(end - begin, part.passages)
            # a passage stands once among a term's postings
            found[part.postings[begin:end] + (first + part.first)] += (
                part.scores[begin:end] * weight
            )
    return found


def _idf(frequency: int, passages: int) -> float:
    """Lucene's inverse document frequency, as bm25s has it."""
    return math.log(1 + (passages - frequency + 0.5) / (frequency + 0.5))


def fuse(*rankings: Sequence[int]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion: best first, ties by number.

    Args:
        *rankings: Passages, best first.
    """
    fused: dict[int, float] = {}
    for ranking in rankings:
        for rank, passage in enumerate(ranking, 1):
            fused[passage] = fused.get(passage, 0.0) + 1 / (_RANK + rank)
    return sorted(fused.items(), key=lambda item: (-item[1], item[0]))
