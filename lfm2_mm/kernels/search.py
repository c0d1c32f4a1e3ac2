"""Search among stored token vectors: scores by cells, by centroids, and by packed residuals.

Each function calls the compiled kernel where there is one and else its twin in numpy, which also
says what the kernel computes. Notation: q query rows, r of them after filling up to a multiple of
16, d dimensions, c centroids, t tokens, n passages. Knows arrays, and nothing of indexes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int8, Int32, Int64, Integer, UInt8
from numpy import ndarray
from numpy.typing import NDArray

from lfm2_mm.kernels import native

__all__ = [
    "ROWS",
    "ResidualQuery",
    "accumulate_cells",
    "centroid_bytes",
    "centroid_maxsim",
    "filled",
    "residual_maxsim",
    "unpacked",
]

ROWS = 16
"""Query rows come in multiples of so many."""
_INPUTS = 64
_MOST_ROWS, _MOST_INPUTS = 256, 1024
_TOKENS = 1 << 14
"""Tokens that a twin works on at once."""

_P, _N, _T = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_CELLS = [_P, _P, _P, _P, _N, _N, _N, _P, _P, _T]
_CENTROIDS = [_P, _N, _P, _N, _P, _P, _N, _P, _T]
_RESIDUALS = [_P, _P, _P, _N, _N, _P, _P, _N, _P, _N, _N, _P, _P, _P, _P, _N, _P, _T]


def filled(query: Float32[ndarray, "q d"]) -> Float32[ndarray, "r d"]:
    """The query with rows of zeros behind it, which add nothing to any score."""
    rows = -len(query) % ROWS
    return np.ascontiguousarray(np.pad(query, ((0, rows), (0, 0))), np.float32)


def accumulate_cells(
    passages: Int32[ndarray, " u"],
    offsets: Int64[ndarray, " ends"],
    cells: Int64[ndarray, "q p"],
    gains: Float32[ndarray, "q p"],
    n_passages: int,
) -> Float32[ndarray, " n_passages"]:
    """Score all passages by the cells they have tokens in.

    For each query row the best gain among its cells that hold the passage, 0 where none does,
    summed over rows.

    Args:
        passages: The passages of each cell, ascending, cell behind cell.
        offsets: Where each cell begins, and the end.
        cells: The cells of each query row.
        gains: What a cell is worth, ascending in each row.
        n_passages: How many passages there are.
    """
    total = np.zeros(n_passages, np.float32)
    kernel = native.function("lfm2_search_cells", _CELLS, _T)
    if kernel is not None:
        passages, offsets = _plain(passages, np.int32), _plain(offsets, np.int64)
        cells, gains = _plain(cells, np.int64), _plain(gains, np.float32)
        stamps = np.full(n_passages, -1, np.int32)
        arrays = (passages, offsets, cells, gains)
        kernel(
            *map(_at, arrays), *cells.shape, n_passages, _at(total), _at(stamps), native.threads()
        )
        return total
    row = np.zeros(n_passages, np.float32)
    begins = offsets[cells]
    counts = offsets[cells + 1] - begins
    for begin, count, gain in zip(begins, counts, gains, strict=True):
        found = passages[_ranges(begin, count)]
        # of several values for one passage numpy keeps the last, which is the greatest
        row[found] = np.repeat(gain, count)
        total += row
        row[found] = 0.0
    return total


def centroid_bytes(scores: Float32[ndarray, "c r"]) -> UInt8[ndarray, "c r"]:
    """Scores of centroids in 256 steps: from the greatest one down, over a range of 1 at most."""
    given = torch.from_numpy(scores)
    low, high = (float(one) for one in torch.aminmax(given))
    low = max(low, high - 1.0)
    step = 255 / max(high - low, 1e-6)
    # cut off above 0, so that the conversion rounds
    steps: NDArray[np.uint8] = (
        given.mul(step).add_(0.5 - low * step).clamp_(0, 255).to(torch.uint8).numpy()
    )
    return steps


def centroid_maxsim(
    scores: UInt8[ndarray, "c r"],
    codes: Integer[ndarray, " t"],
    starts: Int64[ndarray, " n"],
    lengths: Int64[ndarray, " n"],
) -> Int32[ndarray, " n"]:
    """MaxSim of passages whose tokens are taken for their centroids, in steps.

    Args:
        scores: What `centroid_bytes` gives.
        codes: Centroid of every stored token, 16 or 32 bits.
        starts: First token of each passage.
        lengths: Tokens of each passage, at least 1.
    """
    found = np.empty(len(starts), np.int32)
    kernel = native.function("lfm2_search_centroids", _CENTROIDS, _T)
    if kernel is not None and scores.shape[1] % ROWS == 0 and scores.shape[1] <= _MOST_ROWS:
        scores, codes = _plain(scores, np.uint8), _plain(codes, codes.dtype)
        starts, lengths = _plain(starts, np.int64), _plain(lengths, np.int64)
        size = codes.dtype.itemsize
        kernel(
            *(_at(scores), scores.shape[1], _at(codes), size, _at(starts), _at(lengths)),
            *(len(starts), _at(found), native.threads()),
        )
        return found
    for some, tokens, begins in _blocks(starts, lengths):
        best = np.maximum.reduceat(scores[codes[tokens]], begins, axis=0)
        found[some] = best.sum(1, dtype=np.int32)
    return found


@dataclass(frozen=True)
class ResidualQuery:
    """A query as packed residuals are scored with, in whole numbers; use `prepare`.

    A token scores scores[centroid] + scale (constant + factor (codes . levels)) in each row.

    Attributes:
        scores: Similarity of every centroid and query row.
        codes: Query rows in 8 bits, in blocks of 16, four inputs of a row side by side.
        constant: What the lowest level alone gives, by row.
        factor: Of the sum of products, by row.
        levels: What a packed level stands for, in 7 bits.
        bits: Bits of a level.
        dim: Levels of a token.
        scales: What the last byte of a packed residual stands for.
    """

    scores: Float32[ndarray, "c r"]
    codes: Int8[ndarray, "blocks quarters 16 4"]
    constant: Float32[ndarray, " r"]
    factor: Float32[ndarray, " r"]
    levels: UInt8[ndarray, " levels"]
    bits: int
    dim: int
    scales: Float32[ndarray, " 256"]

    @classmethod
    def prepare(
        cls,
        query: Float32[ndarray, "r d"],
        scores: Float32[ndarray, "c r"],
        weights: Float32[ndarray, " levels"],
        scales: Float32[ndarray, " 256"],
    ) -> ResidualQuery:
        """Round a query.

        Args:
            query: Its rows in the basis of the residuals; r a multiple of 16.
            scores: Similarity of every centroid and query row.
            weights: What a level stands for, ascending; 4, 16 or 256 of them.
            scales: What a scale's byte stands for.
        """
        rows, dim = query.shape
        bits = (len(weights) - 1).bit_length()
        low, step = float(weights[0]), max(float(weights[-1] - weights[0]) / 127, 1e-12)
        levels = np.clip(np.rint((weights - low) / step), 0, 127).astype(np.uint8)
        unit = np.maximum(np.abs(query).max(1), 1e-12) / 127
        codes = np.rint(query / unit[:, None]).astype(np.int8)
        # inputs in the order in which packed bytes are unpacked: all their highest bits first
        per_byte = 8 // bits
        codes = codes.reshape(rows, dim // per_byte, per_byte).swapaxes(1, 2).reshape(rows, dim)
        codes = np.pad(codes, ((0, 0), (0, -dim % _INPUTS)))
        sums = codes.sum(1, dtype=np.int64)
        blocks = codes.reshape(rows // ROWS, ROWS, -1, 4).swapaxes(1, 2)
        return cls(
            scores=_plain(scores, np.float32),
            codes=_plain(blocks, np.int8),
            constant=(low * unit * sums).astype(np.float32),
            factor=(step * unit).astype(np.float32),
            levels=levels,
            bits=bits,
            dim=dim,
            scales=_plain(scales, np.float32),
        )

    @property
    def inputs(self) -> int:
        """Dimensions, filled up."""
        return int(self.codes.shape[1]) * 4


def residual_maxsim(
    query: ResidualQuery,
    codes: Integer[ndarray, " t"],
    packed: UInt8[ndarray, "t b"],
    starts: Int64[ndarray, " n"],
    lengths: Int64[ndarray, " n"],
) -> Float32[ndarray, " n"]:
    """MaxSim of passages, straight from their packed residuals.

    Args:
        query: Prepared.
        codes: Centroid of every stored token, 16 or 32 bits.
        packed: Levels of every stored token, the first in the highest bits, and the scale's byte.
        starts: First token of each passage.
        lengths: Tokens of each passage, at least 1.
    """
    found = np.empty(len(starts), np.float32)
    rows = query.scores.shape[1]
    kernel = native.function("lfm2_search_residuals", _RESIDUALS, _T)
    if kernel is not None and rows <= _MOST_ROWS and query.inputs <= _MOST_INPUTS:
        codes, packed = _plain(codes, codes.dtype), _plain(packed, np.uint8)
        starts, lengths = _plain(starts, np.int64), _plain(lengths, np.int64)
        kernel(
            *(_at(query.codes), _at(query.constant), _at(query.factor), rows, query.inputs),
            *(_at(query.scores), _at(codes), codes.dtype.itemsize, _at(packed), packed.shape[1]),
            *(query.bits, _at(query.levels), _at(query.scales), _at(starts), _at(lengths)),
            *(len(starts), _at(found), native.threads()),
        )
        return found
    # whole numbers below 2^24: exact in fp32
    columns = query.codes.swapaxes(1, 2).reshape(rows, -1)[:, : query.dim].astype(np.float32).T
    for some, tokens, begins in _blocks(starts, lengths):
        levels = query.levels[unpacked(packed[tokens, :-1], query.bits)].astype(np.float32)
        dots = query.constant + query.factor * (levels @ columns)
        scores = query.scores[codes[tokens]] + query.scales[packed[tokens, -1]][:, None] * dots
        found[some] = np.maximum.reduceat(scores, begins, axis=0).sum(1)
    return found


def unpacked(packed: UInt8[ndarray, "t b"], bits: int) -> UInt8[ndarray, "t d"]:
    """Levels of packed bytes, plane by plane: the highest bits of all bytes first."""
    planes = [packed >> shift & ((1 << bits) - 1) for shift in range(8 - bits, -1, -bits)]
    return np.concatenate(planes, axis=1)


def _blocks(starts: NDArray[Any], lengths: NDArray[Any]) -> Any:
    """Runs of passages: which, their tokens, and where among these each begins."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(starts):
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _TOKENS, side="right")))
        some = slice(first, last)
        begins = ends[some] - lengths[some] - done
        yield some, _ranges(starts[some], lengths[some]), begins
        first = last


def _ranges(starts: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.int64]:
    """The numbers `start .. start + length` of all ranges, behind each other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total, dtype=np.int64)


def _plain(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    return np.ascontiguousarray(array, dtype)


def _at(array: NDArray[Any]) -> int:
    return array.ctypes.data
