"""What the index gives back: hits, rows, reports. Plain data; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["AddReport", "DocumentRow", "Hit", "Skipped", "Status"]


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One found passage.

    Attributes:
        id: Its id: that of the document, "#", its number in the document.
        score: MaxSim; in a hybrid search the fused reciprocal ranks.
        path: The file; None for texts that were handed in.
        text: The passage.
        spans: Matched words: first character in `text`, the character behind the last, weight in
            0 to 1.
        metadata: Of its document.
        page: The page it starts on, from 1.
        line: The line it starts on, from 1.
        title: Of its document.
        language: ISO 639 code, where it is known.
    """

    id: str
    score: float
    path: str | None
    text: str
    spans: list[tuple[int, int, float]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    page: int | None = None
    line: int | None = None
    title: str | None = None
    language: str | None = None


@dataclass(frozen=True, kw_only=True)
class DocumentRow:
    """One document of an index."""

    id: str
    path: str | None
    title: str | None
    language: str | None
    digest: str
    passages: int
    tokens: int
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was not indexed, and why, in one sentence."""

    path: str
    reason: str


@dataclass(kw_only=True)
class AddReport:
    """What an addition did so far.

    Attributes:
        added: New documents.
        updated: Documents that replaced an earlier version.
        removed: Documents that are gone: rows that a table no longer has, files without text.
        unchanged: Documents that the index had already.
        skipped: Files that could not be read.
        passages: Passages encoded.
        tokens: Token vectors stored.
        seconds: Time taken.
        current: The document worked on last.
    """

    added: int = 0
    updated: int = 0
    removed: int = 0
    unchanged: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    passages: int = 0
    tokens: int = 0
    seconds: float = 0.0
    current: str | None = None


@dataclass(frozen=True, kw_only=True)
class Status:
    """How an index stands.

    Attributes:
        path: Its folder.
        generation: Counts its states.
        model: Name of the model that made the vectors; None if they were handed in.
        fingerprint: Of that model.
        dim: Length of a vector.
        bits: Bits a dimension of compressed vectors.
        documents: Documents.
        passages: Passages.
        tokens: Token vectors.
        deleted: Passages that are deleted but still take room.
        segments: Parts on disk.
        centroids: Of the codebook; 0 while vectors are stored as they are.
        exact: Whether searches score every passage.
        bytes: All files.
        vector_bytes: Vectors, inverted lists and codebook.
        verified: Whether every file was read and compared with its checksum.
    """

    path: Path
    generation: int
    model: str | None
    fingerprint: str
    dim: int
    bits: int
    documents: int
    passages: int
    tokens: int
    deleted: int
    segments: int
    centroids: int
    exact: bool
    bytes: int
    vector_bytes: int
    verified: bool

    @property
    def bytes_per_token(self) -> float:
        """Bytes of vectors, lists and codebook, per token; 0 for an empty index."""
        return self.vector_bytes / self.tokens if self.tokens else 0.0
