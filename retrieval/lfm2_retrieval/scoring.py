"""Late-interaction scores: for each query vector its best document vector, summed.

Knows vectors only. Sums are fp32 whatever comes in: at the size of these sums the steps of bf16
are an eighth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["alignment", "maxsim"]

_ELEMENTS = 2**22  # of the similarity matrix held at once


def maxsim(
    query: Float[Tensor, "q d"], documents: Sequence[Float[Tensor, "_ d"]]
) -> Float[Tensor, " n"]:
    """MaxSim of one query against each document, fp32.

    A document without vectors scores minus infinity. Formula: ColBERT (arXiv 2004.12832), eq. 3.
    """
    scores = torch.full((len(documents),), -torch.inf)
    query = query.float()
    step = max(1, _ELEMENTS // max(1, len(query)))
    start = 0
    while start < len(documents):
        end, rows = start, 0
        while end < len(documents) and (rows == 0 or rows + len(documents[end]) <= step):
            rows += len(documents[end])
            end += 1
        sizes = torch.tensor([len(document) for document in documents[start:end]])
        if rows:
            packed = torch.cat([document.float() for document in documents[start:end]])
            owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
            best = torch.full((len(sizes), len(query)), -torch.inf)
            best.scatter_reduce_(0, owner[:, None].expand(-1, len(query)), packed @ query.T, "amax")
            scores[start:end] = torch.where(sizes > 0, best.sum(1), -torch.inf)
        start = end
    return scores


def alignment(
    query: Float[Tensor, "q d"], document: Float[Tensor, "t d"]
) -> tuple[Int[Tensor, " q"], Float[Tensor, " q"]]:
    """Per query row the document row that is nearest to it, and their similarity (fp32)."""
    if not len(document):
        return torch.full((len(query),), -1), torch.full((len(query),), -torch.inf)
    similarity, where = (query.float() @ document.float().T).max(dim=1)
    return where, similarity
