"""An encoder for tests: a vector per word, equal for words that translate each other; no model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

MEANS = {"bremse": "brake", "ブレーキ": "brake", "rad": "wheel", "bremsen": "brake"}
_TOKEN = re.compile(r"ブレーキ|[ぁ-ん一-龥]|[^\W\d_]+|\d+|[^\w\s]")


class WordEncoder:
    """Looks like `lfm2_retrieval.Encoder`; "brakepad" is cut into two tokens."""

    name = "words"
    fingerprint = "0" * 16
    dim = 64

    def encode_queries(self, texts: Sequence[str], *, batch_tokens: int = 0) -> list[Tensor]:
        return [self._rows(text) for text in texts]

    def encode_documents(
        self, texts: Sequence[str], *, batch_tokens: int = 0, pool_factor: int = 1
    ) -> list[Tensor]:
        return [self._rows(text)[::pool_factor] for text in texts]

    def query_tokens(self, text: str) -> list[tuple[str, int, int]]:
        return self._tokens(text)

    def document_tokens(self, text: str) -> list[tuple[str, int, int]]:
        return self._tokens(text)

    def count_tokens(self, text: str) -> int:
        return len(self._tokens(text)) - 1

    def _tokens(self, text: str) -> list[tuple[str, int, int]]:
        found = [("<begin>", -1, -1)]
        for match in _TOKEN.finditer(text):
            start, end = match.span()
            cut = start + 5 if match[0].lower() == "brakepad" else end
            found.append((text[start:cut], start, cut))
            if cut < end:
                found.append((text[cut:end], cut, end))
        return found

    def _rows(self, text: str) -> Tensor:
        return torch.stack([self._vector(piece) for piece, _, _ in self._tokens(text)])

    def _vector(self, piece: str) -> Tensor:
        word = piece.lower()
        digest = hashlib.sha256(MEANS.get(word, word).encode()).digest()
        made = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.nn.functional.normalize(torch.randn(self.dim, generator=made), dim=0)
