"""Search in stages, each on fewer passages than the one before (PLAID, arXiv 2205.09707).

1. Cells: the nearest centroids of each query row; passages with tokens there are scored by them
   (centroid interaction, pruned to these cells).
2. Centroid interaction in full, on the best of stage 1.
3. MaxSim on packed residuals in whole numbers, on the best of stage 2.
4. MaxSim on decompressed tokens in floating point, on the best of stage 3.

Knows the order of the stages; the arithmetic is in `kernels` and `lfm2_mm.kernels.search`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lfm2_mm.kernels import search as fast
from lfm2_retrieval.index import exact
from lfm2_retrieval.index.segment import Segment
from lfm2_retrieval.index.snapshot import Snapshot

__all__ = ["Stages", "search", "stages_for"]


@dataclass(frozen=True, slots=True)
class Stages:
    """How much each stage lets through.

    Attributes:
        cells: Centroids of each query row.
        centroid: Passages that are scored by all their centroids.
        packed: Passages that are scored by their packed residuals.
        exact: Passages that are scored by their decompressed tokens.
    """

    cells: int
    centroid: int
    packed: int
    exact: int


def stages_for(k: int) -> Stages:
    """Widths for `k` results (`lfm2-mm bench retrieval` measures what they cost).

    On 100,000 passages of manual pages these stages miss 1 % of the ten best and the codec 1.5 %;
    half as wide they miss 2 %, twice as wide .2 % in more of the time (docs/LOG.md).
    """
    return Stages(
        cells=64, centroid=max(16_384, 80 * k), packed=max(4096, 40 * k), exact=max(64, 4 * k)
    )


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
    book = snapshot.book
    rows = fast.filled(query)
    scores = (torch.from_numpy(book.centroids) @ torch.from_numpy(rows).T).numpy()
    if count <= stages.centroid:
        passages = np.flatnonzero(rest)
    else:
        passages = _cells(snapshot, scores[:, : len(query)], rest, stages)
    if len(passages) > stages.packed:
        steps = fast.centroid_bytes(scores)
        approximate = _by_segment(
            snapshot, passages, lambda _, *places: fast.centroid_maxsim(steps, *places)
        )
        # in their order on disk
        passages = np.sort(passages[_greatest(approximate, stages.packed)])
    if len(passages) > stages.exact:
        turned = book.in_basis(rows)
        ready = fast.ResidualQuery.prepare(turned, scores, book.weights, book.scales)
        approximate = _by_segment(
            snapshot,
            passages,
            lambda one, codes, *places: fast.residual_maxsim(ready, codes, one.residuals, *places),
        )
        passages = passages[_greatest(approximate, stages.exact)]
    return np.concatenate([found, passages])


def _cells(
    snapshot: Snapshot, scores: NDArray[np.float32], rest: NDArray[np.bool_], stages: Stages
) -> NDArray[np.int64]:
    """Stage 1: the best passages by the cells that they have tokens in."""
    n_cells = min(stages.cells, scores.shape[0])
    by_row = torch.from_numpy(scores).T.contiguous()
    values, cells = torch.topk(by_row, n_cells, dim=1)
    # a row that has no token in these cells is taken to be as near as the last of them
    gains = (values - values[:, -1:]).flip(1).contiguous().numpy() + np.float32(1e-6)
    order = cells.flip(1).contiguous().numpy()
    total = np.zeros(snapshot.n_passages, np.float32)
    for number, segment in enumerate(snapshot.segments):
        if segment.vectors is None:
            begin, end = snapshot.firsts[number : number + 2]
            total[begin:end] = fast.accumulate_cells(
                segment.lists, segment.list_offsets, order, gains, len(segment)
            )
    total[~rest] = -1.0
    best = _greatest(total, stages.centroid)
    # what has no token in any cell stays, if there is nothing better that is allowed
    return np.sort(best[total[best] >= 0])


def _by_segment(
    snapshot: Snapshot,
    passages: NDArray[np.int64],
    score: Callable[[Segment, NDArray[Any], NDArray[np.int64], NDArray[np.int64]], NDArray[Any]],
) -> NDArray[np.float32]:
    """Scores of passages, from a segment, its codes, their first tokens and their lengths."""
    found = np.empty(len(passages), np.float32)
    for number, which in snapshot.by_segment(passages):
        segment = snapshot.segments[number]
        places = passages[which] - snapshot.firsts[number]
        starts = np.asarray(segment.offsets[places])
        lengths = np.asarray(segment.offsets[places + 1]) - starts
        assert segment.codes is not None
        found[which] = score(segment, segment.codes, starts, lengths)
    return found


def _greatest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Places of the `count` greatest, in no order."""
    if count >= len(scores):
        return np.arange(len(scores))
    return np.argpartition(scores, len(scores) - count)[len(scores) - count :]
