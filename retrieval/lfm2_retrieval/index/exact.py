"""Exact search: every allowed passage is scored. The way for small indexes, and the yardstick."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lfm2_retrieval.index import kernels
from lfm2_retrieval.index.snapshot import Snapshot

__all__ = ["score_all", "score_passages"]


def score_all(
    snapshot: Snapshot, query: NDArray[np.float32], passages: NDArray[np.int64]
) -> NDArray[np.float32]:
    """MaxSim of the given passages, on their vectors as they are stored.

    Args:
        snapshot: The index.
        query: Normalised rows, [q, d].
        passages: Numbers of passages.

    Returns:
        float32 [passages].
    """
    found = np.empty(len(passages), np.float32)
    for number, which in snapshot.by_segment(passages):
        places = passages[which] - snapshot.firsts[number]
        found[which] = score_passages(snapshot, number, query, places)
    return found


def score_passages(
    snapshot: Snapshot, number: int, query: NDArray[np.float32], places: NDArray[np.int64]
) -> NDArray[np.float32]:
    """MaxSim of some passages of one segment, by their places in it."""
    segment = snapshot.segments[number]
    starts = np.asarray(segment.offsets[places])
    lengths = np.asarray(segment.offsets[places + 1]) - starts
    if segment.vectors is not None:
        return kernels.flat_maxsim(query, segment.vectors, starts, lengths)
    assert segment.codes is not None and snapshot.book is not None
    return kernels.residual_maxsim(
        query,
        snapshot.book.centroids,
        segment.codes,
        segment.residuals,
        snapshot.book.levels,
        snapshot.book.scales,
        starts,
        lengths,
    )
