"""Documents in: folders become documents of chunks, each with its place in the file.

This face is lazy: importing it imports no reader. It knows nothing of encoders or indexes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "Changes",
    "Chunk",
    "Document",
    "Limits",
    "Unchanged",
    "Unreadable",
    "read_documents",
    "watch",
]

_FACE = {
    "Changes": "watching",
    "Chunk": "model",
    "Document": "model",
    "Limits": "model",
    "Unchanged": "model",
    "Unreadable": "model",
    "read_documents": "reading",
    "watch": "watching",
}

if TYPE_CHECKING:
    from lfm2_retrieval.documents.model import Chunk, Document, Limits, Unchanged, Unreadable
    from lfm2_retrieval.documents.reading import read_documents
    from lfm2_retrieval.documents.watching import Changes, watch


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'lfm2_retrieval.documents' has no attribute {name!r}")
    return getattr(import_module(f"lfm2_retrieval.documents.{_FACE[name]}"), name)
