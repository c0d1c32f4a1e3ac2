"""A segment, as a reader sees it: immutable files, mapped into memory.

Passages of one document follow each other. Knows how a segment is laid out, not how it is searched
or which of its passages are deleted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm2_mm.errors import CorruptIndex
from lfm2_retrieval.index import files, kernels
from lfm2_retrieval.index.codec import Codebook, code_dtype
from lfm2_retrieval.index.lexical import LexicalFiles
from lfm2_retrieval.index.manifest import Part

__all__ = ["NOWHERE", "PLACE", "Place", "Record", "Segment", "key_of"]

PLACE = ("document", "chunk", "page", "line", "start", "end")
"""Columns of `places.bin`: int32, -1 for unknown."""
NOWHERE = -1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a passage stands in its document: see `documents.Chunk`."""

    page: int | None = None
    line: int | None = None
    start: int = 0
    end: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is stored of a document beside its passages."""

    id: str
    digest: str
    path: str | None
    title: str | None
    language: str | None
    metadata: dict[str, Any]

    def to_bytes(self) -> bytes:
        """As a line of `documents.bin`."""
        values = [self.id, self.digest, self.path, self.title, self.language, self.metadata]
        return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """From a line of `documents.bin`."""
        id, digest, path, title, language, metadata = json.loads(
            data.decode("utf-8", "surrogatepass")
        )
        return cls(
            id=id, digest=digest, path=path, title=title, language=language, metadata=metadata
        )


def key_of(id: str) -> int:
    """The 64-bit number under which a document is looked up."""
    import hashlib

    data = id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Segment:
    """The arrays of one segment.

    Attributes:
        part: What the manifest says of it, but for deletions: a segment outlives states.
        offsets: First token of each passage and the end, int64 [passages + 1].
        places: int32 [passages, len(PLACE)].
        vectors: fp16 [tokens, dim] of a flat segment, else None.
        codes: Centroid of each token of a residual segment, else None.
        residuals: uint8 [tokens, bytes].
        list_offsets: int64 [centroids + 1]; where each inverted list begins.
        lists: int32; the passages of each centroid, ascending.
    """

    def __init__(self, folder: Path, part: Part, dim: int, book: Codebook | None) -> None:
        self.part = replace(part, deleted=None)
        self._book = book
        self._where = folder / "segments" / part.name
        passages, tokens, documents = part.passages, part.tokens, part.documents

        def mapped(name: str, dtype: Any, *shape: int) -> NDArray[Any]:
            if name not in part.files:
                raise CorruptIndex(
                    f"the index file {str(self._where / name)!r} is not in the manifest; restore "
                    "the index from a backup or build it anew"
                )
            return files.map_array(self._where / name, dtype, shape)

        self.offsets = mapped("offsets.bin", "<i8", passages + 1)
        self.places = mapped("places.bin", "<i4", passages, len(PLACE))
        self._text_offsets = mapped("text_offsets.bin", "<i8", passages + 1)
        self._texts = self._bytes("texts.bin", self._text_offsets)
        self._record_offsets = mapped("document_offsets.bin", "<i8", documents + 1)
        self._records = self._bytes("documents.bin", self._record_offsets)
        self.firsts = mapped("document_passages.bin", "<i8", documents + 1)
        self._keys = mapped("keys.bin", "<u8", documents)
        self._key_order = mapped("key_order.bin", "<i4", documents)
        self.vectors: NDArray[Any] | None = None
        self.codes: NDArray[Any] | None = None
        if part.kind == "flat":
            self.vectors = mapped("vectors.bin", "<f2", tokens, dim)
        else:
            if book is None:
                raise CorruptIndex(
                    f"the segment {str(self._where)!r} has residuals, but the index has no "
                    "codebook; restore it from a backup or build the index anew"
                )
            count = len(book.centroids)
            self.codes = mapped("codes.bin", code_dtype(count), tokens)
            self.residuals = mapped("residuals.bin", "u1", tokens, book.residual_bytes)
            self.list_offsets = mapped("list_offsets.bin", "<i8", count + 1)
            self.lists = mapped("lists.bin", "<i4", int(self.list_offsets[-1]))
        self.lexical = LexicalFiles.open(self._where, part)

    def _bytes(self, name: str, offsets: NDArray[Any]) -> NDArray[Any]:
        return files.map_bytes(self._where / name, int(offsets[-1]))

    def __len__(self) -> int:
        return self.part.passages

    def text(self, passage: int) -> str:
        """The text of a passage."""
        begin, end = self._text_offsets[passage : passage + 2]
        return self._texts[begin:end].tobytes().decode("utf-8", "surrogatepass")

    def record(self, document: int) -> Record:
        """What is stored of a document."""
        begin, end = self._record_offsets[document : document + 2]
        return Record.from_bytes(self._records[begin:end].tobytes())

    def records(self) -> Iterator[Record]:
        """All documents, deleted ones, too."""
        for document in range(self.part.documents):
            yield self.record(document)

    def find(self, id: str) -> int | None:
        """The number of a document, by its id."""
        key = key_of(id)
        at = int(np.searchsorted(self._keys, np.uint64(key)))
        while at < len(self._keys) and int(self._keys[at]) == key:
            document = int(self._key_order[at])
            if self.record(document).id == id:
                return document
            at += 1
        return None

    def rows(self, passages: NDArray[Any]) -> NDArray[np.float32]:
        """The token vectors of passages behind each other, normalised, [tokens, dim]."""
        starts = self.offsets[passages]
        tokens = kernels.gather_ranges(starts, self.offsets[passages + 1] - starts)
        if self.vectors is not None:
            rows: NDArray[np.float32] = self.vectors[tokens].astype(np.float32)
            return rows
        assert self.codes is not None and self._book is not None
        return self._book.decode(self.codes[tokens], self.residuals[tokens])
