"""The principal axes of residuals, with 8, 6, 4 or no bits each where all would have 4.

Residuals of real tokens lie mostly in few directions, and queries look in some more than in others:
where both are much, a bit more counts, elsewhere it does not (transform coding: A. Gersho and
R. M. Gray, Vector Quantization and Signal Compression, 1992, chapter 8). Queries are taken to be
spread as tokens are: one model makes both. A token has d numbers of 4 bits: one for each of the
k axes that count most, in order; behind them 4 bits that refine an axis of the first, then 2 that
refine one of the next, two to a number. So kernels for 4 bits score all but the refinement. Knows
no centroids and no files.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from numpy.typing import NDArray

__all__ = ["Axes", "allotted", "refined"]

_LEAST = 1e-3
"""The smallest spread along an axis, as a share of the largest."""
_LOSS = 2.5
"""Squared error of the best b bits of a bell-shaped variable of variance 1, times 4^b; about."""


class Axes:
    """Directions, and what their numbers stand for.

    Args:
        directions: An axis a column, times the spread along it; the one that counts most first.
        eight: What the 256 numbers of 8 bits stand for, ascending; 16 each lie in a bucket of 4.
        six: The same of the 64 numbers of 6 bits.
        counts: How many axes have 8 bits, and how many pairs behind them have 6.
    """

    def __init__(
        self,
        directions: Float32[ndarray, "d k"],
        eight: Float32[ndarray, " eights"],
        six: Float32[ndarray, " sixes"],
        counts: tuple[int, int],
    ) -> None:
        self.directions, self.eight, self.six, self.counts = directions, eight, six, counts
        # the columns are orthogonal, so this is the inverse
        self._inverse = directions / np.maximum(np.square(directions).sum(0), 1e-12)

    @staticmethod
    def principal(
        residuals: Float32[ndarray, "n d"], tokens: Float32[ndarray, "m d"]
    ) -> tuple[Float32[ndarray, "d d"], Float32[ndarray, " d"]]:
        """The principal axes of residuals, times the spread along them, and how much each counts.

        The latter is its share of the residuals' variance times how far tokens reach along it.
        """
        values, axes = np.linalg.eigh(residuals.T @ residuals / len(residuals))
        reach = np.square(tokens @ axes).mean(0)
        counting = np.maximum(values, 0) * reach
        order = np.argsort(-counting, kind="stable")
        spread = np.sqrt(np.maximum(values, _LEAST**2 * max(float(values[-1]), 1e-12)))
        found: NDArray[np.float32] = np.ascontiguousarray((axes * spread)[:, order], np.float32)
        return found, counting[order].astype(np.float32)

    def places(self, residuals: Float32[ndarray, "n d"]) -> Float32[ndarray, "n k"]:
        """Where residuals lie along the axes, in units of the spread there."""
        found: NDArray[np.float32] = residuals @ self._inverse
        return found

    def numbers(
        self, residuals: Float32[ndarray, "n d"], cutoffs: Float32[ndarray, " 15"]
    ) -> UInt8[ndarray, "n d"]:
        """The numbers of 4 bits of residuals of size 1; `cutoffs` lie between the 16 buckets."""
        places = torch.from_numpy(self.places(residuals))
        eights, sixes = self.counts
        found = torch.empty(residuals.shape, dtype=torch.uint8)
        kept = places.shape[1]
        # of each part the levels, its first axis, and the bits that refine it
        parts = ((self.eight, 0, 4), (self.six, eights, 2), (None, eights + 2 * sixes, 0))
        ends = (eights, eights + 2 * sixes, kept)
        finer = []
        for (levels, begin, bits), end in zip(parts, ends, strict=True):
            cuts = torch.from_numpy(cutoffs if levels is None else _cutoffs(levels, cutoffs))
            values = places[:, begin:end].contiguous()
            number = torch.bucketize(values, cuts, out_int32=True, right=True)
            found[:, begin:end] = (number >> bits).to(torch.uint8)
            finer.append((number & (1 << bits) - 1).to(torch.uint8))
        found[:, kept : kept + eights] = finer[0]
        found[:, kept + eights :] = finer[1][:, ::2] << 2 | finer[1][:, 1::2]
        return found.numpy()

    def values(self, packed: UInt8[ndarray, "t b"], pairs: NDArray[Any]) -> Float32[ndarray, "t d"]:
        """Residuals of size 1 of packed numbers.

        Args:
            packed: Two numbers a byte.
            pairs: What a byte of two numbers of 4 bits stands for, as one wide element.
        """
        eights, sixes = self.counts
        half = self.directions.shape[1] // 2
        coarse, fine = packed[:, :half], packed[:, half:]
        places = np.empty((len(packed), half), np.complex64)  # two axes each
        wide, some = coarse[:, : eights // 2], fine[:, : eights // 2]
        first = self.eight[(wide & 0xF0) | some >> 4]
        places[:, : eights // 2] = first + 1j * self.eight[wide << 4 | some & 15]
        both = fine[:, eights // 2 :]
        two = np.stack([both >> 4, both & 15], axis=2).reshape(len(packed), -1)
        wide = coarse[:, eights // 2 : eights // 2 + sixes]
        places[:, eights // 2 : eights // 2 + sixes] = self._sixes[wide.astype(np.int64) << 4 | two]
        places[:, eights // 2 + sixes :] = pairs[coarse[:, eights // 2 + sixes :]].view(
            np.complex64
        )
        turned = torch.from_numpy(places.view(np.float32)) @ torch.from_numpy(self.directions).T
        found: NDArray[np.float32] = turned.numpy()
        return found

    @cached_property
    def _sixes(self) -> NDArray[np.complex64]:
        """Two axes of 6 bits, by their two numbers of 4 bits and the two of 2 bits."""
        at = np.arange(1 << 12)
        first = self.six[at >> 8 << 2 | at >> 2 & 3]
        found: NDArray[np.complex64] = (first + 1j * self.six[(at >> 4 & 15) << 2 | at & 3]).astype(
            np.complex64
        )
        return found

    def turned(self, query: Float32[ndarray, "r d"]) -> Float32[ndarray, "r d"]:
        """A query's products with the axes, for numbers that all stand for a bucket of 4 bits.

        What refines them counts nothing.
        """
        found = np.zeros(query.shape, np.float32)
        found[:, : self.directions.shape[1]] = query @ self.directions
        return found


def allotted(counting: Float32[ndarray, " d"]) -> tuple[int, int]:
    """How many axes should have 8 bits, and how many pairs 6, so that the least is lost.

    Bytes hold two numbers of 4 bits, so both are even.

    Args:
        counting: How much each axis counts, the most first.
    """
    dim = len(counting)
    before = np.concatenate([[0.0], np.cumsum(counting, dtype=np.float64)])
    best, lost = (0, 0), np.inf
    for eights in range(0, dim // 2 + 1, 2):
        for sixes in range(0, (dim - 2 * eights) // 3 + 1, 2):
            ends = [0, eights, eights + 2 * sixes, dim - eights - sixes, dim]
            error = (_LOSS / 4**8, _LOSS / 4**6, _LOSS / 4**4, 1.0)
            loss = float(np.diff(before[ends]) @ np.array(error))
            if loss < lost:
                best, lost = (eights, sixes), loss
    return best


def refined(
    places: Float32[ndarray, "n k"],
    cutoffs: Float32[ndarray, " 15"],
    weights: Float32[ndarray, " 16"],
    levels: int,
    fit: Any,
) -> Float32[ndarray, " values"]:
    """What numbers of more bits stand for, each bucket of 4 bits cut up by itself.

    Args:
        places: Places along axes that have as many bits.
        cutoffs: Between the 16 buckets.
        weights: What these stand for.
        levels: Into how many a bucket is cut.
        fit: Cutoffs and values of so many buckets of given values.
    """
    values = places.reshape(-1)
    bucket = np.searchsorted(cutoffs, values, "right")
    found = []
    for number, weight in enumerate(weights):
        mine = values[bucket == number]
        some = fit(mine, levels)[1] if len(mine) >= levels else np.full(levels, weight)
        found.append(some)
    return np.concatenate(found).astype(np.float32)


def _cutoffs(
    levels: Float32[ndarray, " values"], cutoffs: Float32[ndarray, " 15"]
) -> Float32[ndarray, " cuts"]:
    """Between levels that refine the 16 buckets: half-way, and the buckets' own cutoffs."""
    found: NDArray[np.float32] = (levels[1:] + levels[:-1]) / 2
    each = len(levels) // 16
    found[each - 1 :: each] = cutoffs
    return found
