"""A small encoder without a model: each word has its vector, drawn from its hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIM = 32


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled.astype(np.float32)


def word_vector(word: str, dim: int = DIM) -> NDArray[np.float32]:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    return unit(np.random.default_rng(seed).standard_normal(dim).astype(np.float32))


class WordEncoder:
    """Every word a row; behind the words of a query three rows of expansion."""

    def __init__(self, name: str = "words", fingerprint: str = "0123456789abcdef") -> None:
        self.name, self.fingerprint, self.dim = name, fingerprint, DIM
        self.encoded: list[str] = []

    def encode_queries(self, texts: Sequence[str], *, batch_tokens: int = 4096) -> list[Tensor]:
        return [torch.cat([self._rows(text), self._rows("pad pad")]) for text in texts]

    def encode_documents(
        self, texts: Sequence[str], *, batch_tokens: int = 16384, pool_factor: int = 1
    ) -> list[Tensor]:
        self.encoded += texts
        return [self._rows(text) for text in texts]

    def query_tokens(self, text: str) -> list[tuple[str, int, int]]:
        return [*self.document_tokens(text), *[("pad", -1, -1)] * 3]

    def document_tokens(self, text: str) -> list[tuple[str, int, int]]:
        found = [(m[0], m.start(), m.end()) for m in re.finditer(r"\w+", text)]
        return [("[D]", -1, -1), *found]

    def count_tokens(self, text: str) -> int:
        return len(re.findall(r"\w+", text))

    def _rows(self, text: str) -> Tensor:
        words = [piece.lower() for piece, _, _ in self.document_tokens(text)]
        return torch.from_numpy(np.stack([word_vector(word) for word in words]))


def corpus(count: int, seed: int = 0, words: int = 200) -> list[NDArray[np.float32]]:
    """Texts as vectors: words with noise, of different lengths."""
    source = np.random.default_rng(seed)
    vocabulary = unit(source.standard_normal((words, DIM)).astype(np.float32))
    lengths = source.integers(4, 40, count)
    return [
        unit(
            vocabulary[source.integers(0, words, n)]
            + 0.05 * source.standard_normal((n, DIM)).astype(np.float32)
        )
        for n in lengths.tolist()
    ]


def maxsim(query: NDArray[np.float32], rows: NDArray[np.float32]) -> float:
    return float((query @ rows.T).max(1).sum())
