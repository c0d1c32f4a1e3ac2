"""Late-interaction training: pairs as rows, the in-batch loss, and how rows are laid out.

A batch holds texts of one language with what they mean in another; every other text of the batch
is a wrong answer. A small second loss asks the same of mean vectors, which gives every token a
gradient early on. Knows no corpus, no optimizer and no schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lfm2_mm.backbone import Backbone
from lfm2_mm.config import BackboneConfig
from lfm2_mm.train.attention import PlainWhole

__all__ = ["PairBatch", "Retriever", "Side", "in_batch_scores", "pad_side", "pair_loss"]


@dataclass
class Side:
    """The queries or the documents of a batch.

    Attributes:
        ids: Token rows `[n, t]`, padded on the right.
        mask: True at real positions, `[n, t]`.
        kept: True at the positions whose vectors count, `[n, t]`: not punctuation of documents.
    """

    ids: Int[Tensor, "n t"]
    mask: Bool[Tensor, "n t"]
    kept: Bool[Tensor, "n t"]

    def to(self, device: torch.device | str) -> Side:
        """The same on another device."""
        return Side(self.ids.to(device), self.mask.to(device), self.kept.to(device))


@dataclass
class PairBatch:
    """Queries, documents, and which document answers each query.

    Attributes:
        queries: `[q, …]`.
        documents: `[d, …]`.
        answers: Row of the document of each query, `[q]`.
    """

    queries: Side
    documents: Side
    answers: Int[Tensor, " q"]

    def to(self, device: torch.device | str) -> PairBatch:
        """The same on another device."""
        return PairBatch(
            self.queries.to(device), self.documents.to(device), self.answers.to(device)
        )


def pad_side(rows: Sequence[Sequence[int]], *, pad: int, skipped: frozenset[int]) -> Side:
    """Lay rows of ids out as a rectangle.

    Args:
        rows: Ids with everything that stands around the text.
        pad: The padding id.
        skipped: Ids whose vectors do not count.
    """
    time = max(map(len, rows))
    ids = torch.full((len(rows), time), pad)
    kept = torch.zeros(len(rows), time, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        kept[i, : len(row)] = torch.tensor([token not in skipped for token in row])
    lengths = torch.tensor([len(row) for row in rows])
    return Side(ids, torch.arange(time) < lengths[:, None], kept)


class Retriever(nn.Module):
    """A bidirectional backbone and one linear projection: a unit vector for each token.

    Args:
        config: Shapes of the backbone.
        dim: Size of the vectors.
    """

    def __init__(self, config: BackboneConfig, dim: int) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.dense = nn.Linear(config.hidden_size, dim, bias=False)

    def forward(self, side: Side) -> Float[Tensor, "n t k"]:
        """Vectors of every position; those of padding mean nothing."""
        mask = side.mask
        mixing = PlainWhole(*mask.shape, mask=mask, causal=False, device=mask.device)
        hidden = self.backbone(self.backbone.embed(side.ids), mixing)
        return F.normalize(self.dense(hidden).float(), dim=-1)


def in_batch_scores(
    queries: Float[Tensor, "q t k"],
    kept: Bool[Tensor, "q t"],
    documents: Float[Tensor, "d s k"],
    held: Bool[Tensor, "d s"],
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "q d"]:
    """Mean over query tokens of the best similarity with any document token, in [-1, 1].

    What ColBERT sums (arXiv 2004.12832, equation 3) is averaged here, so that one temperature fits
    queries of any length.

    Args:
        queries: Unit vectors.
        kept: Which of them count.
        documents: Unit vectors.
        held: Which of them may be matched.
        dtype: In which similarities are computed.
    """
    flat = queries[kept]
    # one more dimension forbids the others: cheaper than masking the largest tensor of all
    ban = torch.where(held, 0.0, -4.0)[..., None]
    right = torch.cat([documents, ban], dim=-1).flatten(0, 1)
    left = F.pad(flat, (0, 1), value=1.0)
    with torch.autocast(queries.device.type, enabled=False):
        similar = left.to(dtype) @ right.to(dtype).T
    best = similar.view(len(flat), *held.shape).amax(-1).float()
    owner = kept.nonzero()[:, 0]
    total = torch.zeros(len(queries), len(documents), device=best.device)
    counts = kept.sum(-1, keepdim=True).clamp(min=1)
    return total.index_add(0, owner, best) / counts


def pair_loss(
    model: Retriever,
    batch: PairBatch,
    scale: Float[Tensor, ""],
    *,
    pooled: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """In-batch cross-entropy both ways over late-interaction scores, and over mean vectors.

    Args:
        model: What is trained.
        batch: Pairs; two documents of it never say the same.
        scale: Natural logarithm of what scores are multiplied with.
        pooled: Weight of the loss over mean vectors.
        dtype: In which similarities are computed.

    Returns:
        The loss, and for the log: its parts and the share of queries whose document comes first.
    """
    queries, documents = model(batch.queries), model(batch.documents)
    q_kept, d_kept = batch.queries.kept, batch.documents.kept
    scores = in_batch_scores(queries, q_kept, documents, d_kept, dtype=dtype) * scale.exp()
    late = _both_ways(scores, batch.answers)
    means = [
        F.normalize((x * k[..., None]).sum(1), dim=-1)
        for x, k in ((queries, q_kept), (documents, d_kept))
    ]
    mean = _both_ways(means[0] @ means[1].T * scale.exp(), batch.answers)
    right = (scores.argmax(-1) == batch.answers).float().mean()
    return late + pooled * mean, {
        "late": float(late.detach()),
        "mean": float(mean.detach()),
        "right": float(right),
        "scale": float(scale.detach().exp()),
    }


def _both_ways(scores: Float[Tensor, "q d"], answers: Int[Tensor, " q"]) -> Float[Tensor, ""]:
    """Cross-entropy over documents, and over the queries where each document has one."""
    forward = F.cross_entropy(scores, answers)
    if scores.shape[0] != scores.shape[1]:
        return forward
    return (forward + F.cross_entropy(scores[:, answers].T, _rows(scores))) / 2


def _rows(scores: Tensor) -> Tensor:
    return torch.arange(len(scores), device=scores.device)
