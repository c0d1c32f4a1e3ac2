"""Log magnitudes and phases become samples: inverse STFT with "same" padding, whole or streamed.

Each row of spectrum is `[log magnitude | phase]`; rows lie `hop` samples apart, and `(n_fft - hop)
/ 2` samples are cut from each end, so that `n` rows give exactly `n * hop` samples. Source of the
form: Vocos (arXiv 2306.00814). Knows no network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["OverlapAdd", "inverse_stft", "windowed_frames"]


def windowed_frames(
    spectrum: Float[Tensor, "*n w"], window: Float[Tensor, " f"]
) -> Float[Tensor, "*n f"]:
    """The windowed samples of each row alone.

    Args:
        spectrum: `f / 2 + 1` natural logarithms of magnitudes, then as many phases in radians.
        window: Of `f` samples, the length of the transform.
    """
    magnitude, phase = spectrum.float().chunk(2, dim=-1)
    bins = torch.polar(magnitude.exp(), phase)
    frames: Tensor = torch.fft.irfft(bins, n=len(window)) * window
    return frames


def inverse_stft(
    spectrum: Float[Tensor, "b n w"], window: Float[Tensor, " f"], hop: int
) -> Float[Tensor, "b m"]:
    """All samples of complete sequences, `m = n * hop`; differentiable."""
    frames = windowed_frames(spectrum, window)
    weights = window.square().expand(1, frames.shape[1], len(window))
    trim = (len(window) - hop) // 2
    inside = slice(trim, trim + frames.shape[1] * hop)
    return _overlapped(frames, hop)[:, inside] / _overlapped(weights, hop)[:, inside]


def _overlapped(frames: Tensor, hop: int) -> Tensor:
    """Sum of rows `[b, n, f]`, each `hop` samples after the one before: `[b, (n-1)*hop + f]`."""
    n, width = frames.shape[1:]
    summed = F.fold(frames.transpose(1, 2), (1, (n - 1) * hop + width), (1, width), stride=(1, hop))
    return summed[:, 0, 0]


class OverlapAdd:
    """`inverse_stft` of one sequence whose rows come bit by bit; keeps one frame of samples.

    Args:
        window: Of `f` samples, fp32.
        hop: Samples from one row to the next.
    """

    def __init__(self, window: Float[Tensor, " f"], hop: int) -> None:
        self._window, self._hop = window, hop
        self._trim = (len(window) - hop) // 2
        self._reset()

    def _reset(self) -> None:
        self._skip = self._trim
        self._sum = self._window.new_zeros(len(self._window) - self._hop)
        self._weight = torch.zeros_like(self._sum)

    def push(self, spectrum: Float[Tensor, "n w"]) -> Float[Tensor, " m"]:
        """The samples that no later row can change: the last `trim` are held back."""
        n = len(spectrum)
        if not n:
            return self._window.new_zeros(0)
        frames = windowed_frames(spectrum, self._window)
        summed = _overlapped(frames[None], self._hop)[0]
        weight = _overlapped(self._window.square().expand(1, n, -1), self._hop)[0]
        summed[: len(self._sum)] += self._sum
        weight[: len(self._sum)] += self._weight
        done = n * self._hop
        self._sum, self._weight = summed[done:].clone(), weight[done:].clone()
        begin = min(self._skip, done)
        self._skip -= begin
        return summed[begin:done] / weight[begin:done]

    def flush(self) -> Float[Tensor, " m"]:
        """The samples held back; then a new sequence begins."""
        begun = self._skip < self._trim
        rest = self._sum[self._skip : self._trim] / self._weight[self._skip : self._trim]
        self._reset()
        return rest if begun else rest[:0]
