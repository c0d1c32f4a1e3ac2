"""The principal axes of residuals, with 6, 4 or 2 bits each where all would have 4.

Residuals of real tokens lie mostly in few directions: there a bucket more counts, elsewhere fewer
do (transform coding: A. Gersho and R. M. Gray, Vector Quantization and Signal Compression, 1992,
chapter 8). Of d axes the first quarter has 6 bits and the last quarter 2. A token has d numbers of
4 bits: one for each of the first three quarters, and d/4 that hold 2 bits of an axis of the last
quarter and, below them, 2 bits that refine an axis of the first. So kernels for 4 bits score all
but the refinement. Knows no centroids and no files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from numpy.typing import NDArray

__all__ = ["Axes"]

_LEAST = 1e-3
"""The smallest spread along an axis, as a share of the largest."""


class Axes:
    """Directions, and what their numbers of 2 bits stand for.

    Args:
        directions: An axis a column, times the spread along it; the widest first.
        fine: Values of an axis of the last quarter; and what is added to one of the first.
    """

    def __init__(self, directions: Float32[ndarray, "d d"], fine: Float32[ndarray, "2 4"]) -> None:
        self.directions, self.fine = directions, fine
        self.few = len(directions) // 4
        # the columns are orthogonal, so this is the inverse
        self._inverse = directions / np.maximum(np.square(directions).sum(0), 1e-12)
        self._cutoffs = torch.from_numpy(np.ascontiguousarray((fine[:, 1:] + fine[:, :-1]) / 2))

    @staticmethod
    def principal(residuals: Float32[ndarray, "n d"]) -> Float32[ndarray, "d d"]:
        """The principal axes of residuals, times the spread along them."""
        values, axes = np.linalg.eigh(residuals.T @ residuals / len(residuals))
        spread = np.sqrt(np.maximum(values[::-1], _LEAST**2 * max(float(values[-1]), 1e-12)))
        found: NDArray[np.float32] = np.ascontiguousarray(axes[:, ::-1] * spread, np.float32)
        return found

    def places(self, residuals: Float32[ndarray, "n d"]) -> Float32[ndarray, "n d"]:
        """Where residuals lie along the axes, in units of the spread there."""
        found: NDArray[np.float32] = residuals @ self._inverse
        return found

    def numbers(
        self, residuals: Float32[ndarray, "n d"], cutoffs: Any, weights: Float32[ndarray, " 16"]
    ) -> UInt8[ndarray, "n d"]:
        """The numbers of 4 bits of residuals.

        Args:
            residuals: Of size 1.
            cutoffs: Between the 16 buckets, a tensor.
            weights: What a bucket stands for.
        """
        places = torch.from_numpy(self.places(residuals))
        most = places.shape[1] - self.few
        found = torch.empty(places.shape, dtype=torch.uint8)
        coarse = torch.bucketize(places[:, :most].contiguous(), cutoffs, out_int32=True, right=True)
        found[:, :most] = coarse.to(torch.uint8)
        left = places[:, : self.few] - torch.from_numpy(weights)[coarse[:, : self.few]]
        last, refined = (
            torch.bucketize(values.contiguous(), cuts, out_int32=True, right=True)
            for values, cuts in zip((places[:, most:], left), self._cutoffs, strict=True)
        )
        found[:, most:] = (last << 2 | refined).to(torch.uint8)
        return found.numpy()

    def turned(
        self, query: Float32[ndarray, "r d"], weights: Float32[ndarray, " 16"]
    ) -> Float32[ndarray, "r d"]:
        """A query's products with the axes, for numbers that all stand for a weight.

        An axis of the last quarter stands in the higher half of its number: the weight of the whole
        is taken for it, times what makes it nearest on average.
        """
        values = np.repeat(self.fine[0], 4)
        gain = float(values @ weights) / max(float(weights @ weights), 1e-12)
        found: NDArray[np.float32] = query @ self.directions
        found[:, len(self.directions) - self.few :] *= np.float32(gain)
        return found
