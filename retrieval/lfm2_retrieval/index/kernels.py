"""MaxSim in floating point on plain arrays: of stored vectors, and of decompressed residuals.

The stages before, which look at many passages and need not be exact, are in
`lfm2_mm.kernels.search`. Notation: q query rows, d dimensions, c centroids, t stored tokens, n
passages. Knows no files and no stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Integer, Shaped, UInt8
from numpy import ndarray
from numpy.typing import NDArray

from lfm2_retrieval.index.axes import Axes

__all__ = [
    "Levels",
    "decode",
    "flat_maxsim",
    "gather_ranges",
    "residual_maxsim",
]

_ROWS = 1 << 14
"""Token rows that are worked on at once: a few MB, which stay in the cache."""
_TINY = np.float32(1e-12)


@dataclass(frozen=True)
class Levels:
    """What packed buckets stand for; use `of`.

    Attributes:
        table: For each byte the values of its buckets as one wide element, for a single look-up.
        axes: The dimensions; None for those of the vectors.
    """

    table: Shaped[ndarray, " bytes"]
    axes: Axes | None

    @classmethod
    def of(cls, weights: Float32[ndarray, " levels"], axes: Axes | None) -> Levels:
        """The levels of a codebook.

        Args:
            weights: What a bucket stands for; 2, 4 or 8 bits by their number.
            axes: The dimensions.
        """
        return cls(_table(weights), axes)

    def values(self, packed: UInt8[ndarray, "t b"]) -> Float32[ndarray, "t d"]:
        """Residuals of size 1 of packed buckets."""
        if self.axes is not None:
            return self.axes.values(packed, self.table)
        found: NDArray[np.float32] = self.table[packed].view(np.float32)
        return found.reshape(len(packed), -1)


def residual_maxsim(
    query: Float32[ndarray, "q d"],
    centroids: Float32[ndarray, "c d"],
    codes: Integer[ndarray, " t"],
    residuals: UInt8[ndarray, "t b"],
    levels: Levels,
    scales: Float32[ndarray, " 256"],
    starts: Int[ndarray, " n"],
    lengths: Int[ndarray, " n"],
) -> Float32[ndarray, " n"]:
    """MaxSim of passages on their decompressed, normalised tokens.

    Args:
        query: Normalised query rows.
        centroids: The codebook.
        codes: Centroid of every stored token.
        residuals: Packed bucket numbers of every stored token, and its scale's number.
        levels: What buckets stand for.
        scales: What a scale's number stands for.
        starts: First token of each passage.
        lengths: Tokens of each passage, at least 1.
    """
    columns = torch.from_numpy(query).T

    def block(tokens: NDArray[Any]) -> torch.Tensor:
        rows = _sum(centroids, codes[tokens], residuals[tokens], levels, scales)
        norms = np.sqrt(np.einsum("td,td->t", rows, rows))
        # the scores are divided, not the rows: there are fewer of them
        return (torch.from_numpy(rows) @ columns) / torch.from_numpy(np.maximum(norms, _TINY))[
            :, None
        ]

    return _maxsim(block, starts, lengths)


def flat_maxsim(
    query: Float32[ndarray, "q d"],
    vectors: Float[ndarray, "t d"],
    starts: Int[ndarray, " n"],
    lengths: Int[ndarray, " n"],
) -> Float32[ndarray, " n"]:
    """MaxSim of passages whose vectors are stored as they are.

    Args:
        query: Normalised query rows.
        vectors: Every stored token.
        starts: First token of each passage.
        lengths: Tokens of each passage, at least 1.
    """
    columns = torch.from_numpy(query).T

    def block(tokens: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(vectors[tokens]).float() @ columns

    return _maxsim(block, starts, lengths)


def decode(
    centroids: Float32[ndarray, "c d"],
    codes: Integer[ndarray, " t"],
    residuals: UInt8[ndarray, "t b"],
    levels: Levels,
    scales: Float32[ndarray, " 256"],
) -> Float32[ndarray, "t d"]:
    """Centroid plus scaled residual, normalised: the tokens as the index knows them."""
    rows = _sum(centroids, codes, residuals, levels, scales)
    norms = np.sqrt(np.einsum("td,td->t", rows, rows))
    rows /= np.maximum(norms, _TINY)[:, None]
    return rows


def gather_ranges(
    starts: Int[ndarray, " n"], lengths: Int[ndarray, " n"]
) -> Int[ndarray, " total"]:
    """The numbers `start .. start + length` of all ranges, behind each other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total, dtype=np.int64)


def _sum(
    centroids: Float32[ndarray, "c d"],
    codes: Integer[ndarray, " t"],
    residuals: UInt8[ndarray, "t b"],
    levels: Levels,
    scales: Float32[ndarray, " 256"],
) -> Float32[ndarray, "t d"]:
    """Centroid plus scaled residual."""
    rows = levels.values(residuals[:, :-1])
    rows *= scales[residuals[:, -1]][:, None]
    rows += np.take(centroids, codes, axis=0)
    return rows


def _table(weights: Float32[ndarray, " levels"]) -> Shaped[ndarray, " bytes"]:
    """What each packed byte stands for: its values as one wide element, for a single look-up."""
    bits = (len(weights) - 1).bit_length()
    per_byte = 8 // bits
    byte = np.arange(256)[:, None] >> np.arange(8 - bits, -1, -bits)[None]
    values = np.ascontiguousarray(weights[byte & (len(weights) - 1)], np.float32)
    return values.view({1: np.float32, 2: np.float64, 4: np.complex128}[per_byte]).reshape(-1)


def _maxsim(
    block: Callable[[NDArray[Any]], torch.Tensor],
    starts: NDArray[Any],
    lengths: NDArray[Any],
) -> Float32[ndarray, " n"]:
    """The greatest of each passage's token scores per query row, summed over rows."""
    found = np.empty(len(lengths), np.float32)
    for chosen, longest in _batches(lengths):
        count = lengths[chosen]
        if longest == int(count.min()):
            tokens = (starts[chosen][:, None] + np.arange(longest)).reshape(-1)
            scores = block(tokens).view(len(chosen), longest, -1)
        else:
            # the last token fills up: it changes no maximum
            places = np.minimum(np.arange(longest)[None], count[:, None] - 1)
            ends = np.cumsum(count)
            packed = block(gather_ranges(starts[chosen], count))
            spread = torch.from_numpy(((ends - count)[:, None] + places).reshape(-1))
            scores = packed.index_select(0, spread).view(len(chosen), longest, -1)
        found[chosen] = scores.amax(1).sum(1).numpy()
    return found


def _batches(lengths: NDArray[Any]) -> Iterator[tuple[NDArray[Any], int]]:
    """Passages of similar length together, so that little is filled up."""
    order = np.argsort(lengths, kind="stable")
    at = 0
    while at < len(order):
        take = max(1, _ROWS // max(1, int(lengths[order[at]])))
        chosen = order[at : at + take]
        # the longest of the batch decides how many rows it has
        take = max(1, _ROWS // max(1, int(lengths[chosen[-1]])))
        chosen = chosen[:take]
        yield chosen, int(lengths[chosen[-1]])
        at += len(chosen)
