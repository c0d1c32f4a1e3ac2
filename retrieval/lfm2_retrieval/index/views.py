"""What a snapshot looks like to a user: its status, its documents, hits. Reads, never scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from lfm2_retrieval import highlight
from lfm2_retrieval.index.encoders import EncoderLike
from lfm2_retrieval.index.model import DocumentRow, Hit, Status
from lfm2_retrieval.index.segment import NOWHERE
from lfm2_retrieval.index.snapshot import Snapshot

__all__ = ["document_rows", "hits", "status_of"]

_VECTORS = ("vectors.bin", "codes.bin", "residuals.bin", "offsets.bin", "list_offsets.bin")
_VECTOR_FILES = {*_VECTORS, "lists.bin"}


def document_rows(snapshot: Snapshot) -> Iterator[DocumentRow]:
    """Every live document, in the order of storage."""
    for record, passages, tokens in snapshot.documents():
        yield DocumentRow(
            id=record.id,
            path=record.path,
            title=record.title,
            language=record.language,
            digest=record.digest,
            passages=passages,
            tokens=tokens,
            metadata=dict(record.metadata),
        )


def status_of(snapshot: Snapshot, *, verified: bool) -> Status:
    """How an index stands."""
    state = snapshot.state
    named = state.named(snapshot.folder)
    vectors = sum(
        stored.size
        for path, stored in named.items()
        if path.name in _VECTOR_FILES or path.parent.parent.name == "codebooks"
    )
    live = int(snapshot.live.sum())
    return Status(
        path=snapshot.folder,
        generation=state.generation,
        model=state.model.name,
        fingerprint=state.model.fingerprint,
        dim=state.model.dim,
        bits=state.bits,
        documents=snapshot.n_documents,
        passages=live,
        tokens=state.tokens,
        deleted=snapshot.n_passages - live,
        segments=len(state.segments),
        centroids=state.codebook.centroids if state.codebook else 0,
        exact=state.codebook is None,
        bytes=sum(stored.size for stored in named.values()),
        vector_bytes=vectors,
        verified=verified,
    )


def hits(
    snapshot: Snapshot,
    encoder: EncoderLike,
    query: str,
    ranked: Sequence[tuple[int, float]],
    *,
    spans: bool,
) -> list[Hit]:
    """Found passages, best first.

    Args:
        snapshot: The index.
        encoder: What made its vectors.
        query: The question.
        ranked: Numbers of passages, and what they scored.
        spans: Whether to mark matched words.
    """
    found, vectors = [], []
    for passage, score in ranked:
        segment, place = snapshot.locate(passage)
        document, _, page, line, _, _ = segment.places[place].tolist()
        record = segment.record(document)
        vectors.append(torch.from_numpy(segment.rows(np.array([place]))))
        found.append(
            Hit(
                id=snapshot.id_of(passage),
                score=score,
                path=record.path,
                text=segment.text(place),
                metadata=dict(record.metadata),
                page=None if page == NOWHERE else page,
                line=None if line == NOWHERE else line,
                title=record.title,
                language=record.language,
            )
        )
    if not spans or not found:
        return found
    aligned = highlight.align(encoder, query, [one.text for one in found], vectors)
    marked = [highlight.spans(one) for one in aligned]
    return [replace(one, spans=mine) for one, mine in zip(found, marked, strict=True)]
