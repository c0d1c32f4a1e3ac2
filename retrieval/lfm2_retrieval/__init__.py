"""lfm2_retrieval: documents in, passages out, for LFM2-ColBERT and LFM2.5-ColBERT.

This face is lazy: importing the package imports nothing else. The core finds
`lfm2_retrieval.frontend.frontend` by entry point.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "AddReport",
    "Document",
    "DocumentRow",
    "Encoder",
    "Hit",
    "Index",
    "Status",
    "Unreadable",
    "answer",
    "explain_page",
    "maxsim",
    "read_documents",
    "rerank",
]

_FACE = {
    "AddReport": "index.model",
    "Document": "documents",
    "DocumentRow": "index.model",
    "Encoder": "encoder",
    "Hit": "index.model",
    "Index": "index.index",
    "Status": "index.model",
    "Unreadable": "documents",
    "answer": "answers",
    "explain_page": "explain",
    "maxsim": "scoring",
    "read_documents": "documents",
    "rerank": "reranking",
}

if TYPE_CHECKING:
    from lfm2_retrieval.answers import answer
    from lfm2_retrieval.documents import Document, Unreadable, read_documents
    from lfm2_retrieval.encoder import Encoder
    from lfm2_retrieval.explain import explain_page
    from lfm2_retrieval.index.index import Index
    from lfm2_retrieval.index.model import AddReport, DocumentRow, Hit, Status
    from lfm2_retrieval.reranking import rerank
    from lfm2_retrieval.scoring import maxsim


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'lfm2_retrieval' has no attribute {name!r}")
    return getattr(import_module(f"lfm2_retrieval.{_FACE[name]}"), name)
