"""Search in stages, each on fewer passages than the one before (PLAID, arXiv 2205.09707).

1. Cells: the nearest centroids of each query row; passages with tokens there are scored by them
   (centroid interaction, pruned to these cells).
2. Centroid interaction in full, on the best of stage 1.
3. MaxSim on decompressed tokens, on the best of stage 2.

Knows the order of the stages; the arithmetic is in `kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lfm2_retrieval.index import exact, kernels
from lfm2_retrieval.index.snapshot import Snapshot

__all__ = ["Stages", "search", "stages_for"]


@dataclass(frozen=True, slots=True)
class Stages:
    """How much each stage lets through.

    Attributes:
        cells: Centroids of each query row.
        centroid: Passages that are scored by all their centroids.
        exact: Passages that are scored by their decompressed tokens.
    """

    cells: int
    centroid: int
    exact: int


def stages_for(k: int) -> Stages:
    """Widths for `k` results (`lfm2-mm bench retrieval` measures what they cost)."""
    return Stages(cells=16, centroid=max(640, 20 * k), exact=max(320, 10 * k))


def search(
    snapshot: Snapshot,
    query: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.bool_],
    stages: Stages | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best passages and their scores, best first.

    Flat segments are scored exactly beside the others.

    Args:
        snapshot: The index.
        query: Normalised rows, [q, d].
        k: How many.
        allowed: Which passages may be found, bool [passages].
        stages: Widths; by default those for `k`.
    """
    stages = stages or stages_for(k)
    passages = _candidates(snapshot, query, allowed, stages)
    scores = exact.score_all(snapshot, query, passages)
    best = top(scores, k)
    return passages[best], scores[best]


def top(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Places of the k greatest, greatest first, ties by place."""
    if k < len(scores):
        # all that tie with the k-th take part, so that ties fall by place
        bound = np.partition(scores, len(scores) - k)[len(scores) - k]
        chosen = np.flatnonzero(scores >= bound)
    else:
        chosen = np.arange(len(scores))
    return chosen[np.argsort(-scores[chosen], kind="stable")][:k]


def _candidates(
    snapshot: Snapshot,
    query: NDArray[np.float32],
    allowed: NDArray[np.bool_],
    stages: Stages,
) -> NDArray[np.int64]:
    """What is worth decompressing, and all of the flat segments."""
    flat = [np.zeros(0, np.int64)]
    rest = allowed.copy()
    for number, segment in enumerate(snapshot.segments):
        if segment.vectors is not None:
            begin, end = snapshot.firsts[number : number + 2]
            flat.append(np.flatnonzero(allowed[begin:end]) + begin)
            rest[begin:end] = False
    found = np.concatenate(flat)
    count = int(np.count_nonzero(rest))
    if count <= stages.exact:
        return np.concatenate([found, np.flatnonzero(rest)])
    assert snapshot.book is not None
    scores = torch.from_numpy(snapshot.book.centroids) @ torch.from_numpy(query).T
    if count <= stages.centroid:
        passages = np.flatnonzero(rest)
    else:
        passages = _cells(snapshot, scores, rest, stages)
    if len(passages) > stages.exact:
        approximate = _centroids(snapshot, scores.numpy(), passages)
        passages = passages[_greatest(approximate, stages.exact)]
    return np.concatenate([found, passages])


def _cells(
    snapshot: Snapshot, scores: torch.Tensor, rest: NDArray[np.bool_], stages: Stages
) -> NDArray[np.int64]:
    """Stage 1: the best passages by the cells that they have tokens in."""
    n_cells = min(stages.cells, scores.shape[0])
    values, cells = torch.topk(scores.T.contiguous(), n_cells, dim=1)
    # a row that has no token in these cells is taken to be as near as the last of them
    gains = (values - values[:, -1:]).flip(1).contiguous().numpy() + np.float32(1e-6)
    order = cells.flip(1).contiguous().numpy()
    total = np.zeros(snapshot.n_passages, np.float32)
    for number, segment in enumerate(snapshot.segments):
        if segment.vectors is None:
            begin, end = snapshot.firsts[number : number + 2]
            total[begin:end] = kernels.accumulate_cells(
                segment.lists, segment.list_offsets, order, gains, len(segment)
            )
    total[~rest] = -1.0
    best = _greatest(total, stages.centroid)
    # what has no token in any cell stays, if there is nothing better that is allowed
    return np.sort(best[total[best] >= 0])


def _centroids(
    snapshot: Snapshot, scores: NDArray[np.float32], passages: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Stage 2: MaxSim with each token taken for its centroid."""
    found = np.empty(len(passages), np.float32)
    for number, which in snapshot.by_segment(passages):
        segment = snapshot.segments[number]
        assert segment.codes is not None
        places = passages[which] - snapshot.firsts[number]
        starts = np.asarray(segment.offsets[places])
        lengths = np.asarray(segment.offsets[places + 1]) - starts
        found[which] = kernels.centroid_maxsim(scores, segment.codes, starts, lengths)
    return found


def _greatest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Places of the `count` greatest, in no order."""
    if count >= len(scores):
        return np.arange(len(scores))
    return np.argpartition(scores, len(scores) - count)[len(scores) - count :]
