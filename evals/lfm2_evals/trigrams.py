"""The lexical baseline of retrieval: cosine of TF-IDF vectors of character trigrams.

It knows no language, and yet finds much: names, numbers and words that languages share. Every
score of a retriever is worth what it is above this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lfm2_mm.errors import MissingExtra

__all__ = ["trigram_scores", "trigrams"]


def trigrams(text: str) -> Counter[str]:
    """Character trigrams of the words of a text, without case; a word's ends count as spaces."""
    padded = f" {' '.join(text.casefold().split())} "
    return Counter(padded[i : i + 3] for i in range(len(padded) - 2))


def trigram_scores(queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
    """Cosine of each query with each document, `[q, d]`; 0 where they share no trigram.

    Counts are damped by a logarithm and weighted by rarity among the documents.

    Raises:
        MissingExtra: if SciPy is not installed.
    """
    try:
        from scipy.sparse import csr_matrix  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra(
            "the trigram baseline needs SciPy, which is not installed; run `pip install "
            "'lfm2-mm[retrieval]'`"
        ) from None
    counted = [trigrams(text) for text in documents]
    frequency = Counter(gram for counts in counted for gram in counts)
    column = {gram: i for i, gram in enumerate(frequency)}
    rarity = np.log1p(len(documents) / np.array([*frequency.values()], dtype=np.float64))

    def table(rows: Sequence[Counter[str]]) -> csr_matrix:
        entries = [
            (i, column[gram], (1 + np.log(n)) * rarity[column[gram]])
            for i, counts in enumerate(rows)
            for gram, n in counts.items()
            if gram in column
        ]
        row, col, value = (
            (np.array(part) for part in zip(*entries, strict=True))
            if entries
            else (
                np.zeros(0, dtype=np.int64),
                np.zeros(0, dtype=np.int64),
                np.zeros(0),
            )
        )
        found = csr_matrix((value, (row, col)), (len(rows), len(column)))
        norm = np.sqrt(np.asarray(found.multiply(found).sum(axis=1)).ravel())
        found.data /= np.maximum(norm, 1e-12).repeat(np.diff(found.indptr))
        return found

    scores = table([trigrams(text) for text in queries]) @ table(counted).T
    return np.asarray(scores.toarray(), dtype=np.float32)
