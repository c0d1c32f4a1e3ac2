"""The codebook: centroids, and residuals of 2, 4 or 8 bits a dimension around them.

As in PLAID (arXiv 2205.09707): a token is its nearest centroid plus a residual, each dimension of
which falls into one of 2^bits buckets. Differences: PLAID's buckets have equal frequency, ours the
least squared error; tokens are very unequally near to their centroids, so buckets are of the
residual over its own size, which takes one byte more a token and a third off the error at 4 bits;
and 4 bits are those of the residuals' principal axes (see `Axes`). Knows no files but its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Integer, UInt8
from numpy import ndarray
from numpy.typing import NDArray

from lfm2_mm.errors import IndexMismatch, MissingExtra, SettingError
from lfm2_retrieval.index import files, kernels
from lfm2_retrieval.index.axes import Axes, allotted, refined
from lfm2_retrieval.index.files import Stored
from lfm2_retrieval.index.manifest import Codes

__all__ = ["BITS", "SAMPLE_PER_CENTROID", "Codebook", "Reservoir", "code_dtype", "n_centroids"]

BITS = (2, 4, 8)
SAMPLE_PER_CENTROID = 40
"""Training tokens a centroid, at most: below it k-means gets worse, above it only slower."""
_ROUGH = 1024
"""From this many centroids on, training and assignment go through a first, coarser level."""
_BLOCK = 1 << 14
_VALUES, _STEPS = 1 << 20, 60
_SCALES = 256
_WORTH = 0.95
"""Axes are taken where they lose at most this share of what plain dimensions lose."""
_FINEST = 1e-3
"""The smallest scale of a residual, as a share of the largest."""


def n_centroids(tokens: int) -> int:
    """PLAID's rule: 2^floor(log2(16 sqrt(tokens))), and never fewer than 8 tokens a centroid."""
    wanted = 16 * math.sqrt(max(tokens, 1))
    return 1 << max(0, int(math.log2(min(wanted, max(tokens / 8, 1)))))


def code_dtype(centroids: int) -> Any:
    """The type of stored centroid numbers."""
    return np.uint16 if centroids <= 1 << 16 else np.uint32


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtra(
            "faiss is not installed, which builds and searches indexes; run "
            "`pip install 'lfm2-mm[retrieval]'`"
        ) from error
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


class Reservoir:
    """A uniform sample of a stream of tokens, of bounded size (Vitter's algorithm R, in blocks).

    Args:
        size: Tokens kept at most.
        seed: Names the choice.
    """

    def __init__(self, size: int, dim: int, seed: int = 0) -> None:
        self._kept = np.empty((size, dim), np.float32)
        self._seen = 0
        self._random = np.random.default_rng(seed)

    def add(self, rows: NDArray[Any]) -> None:
        """Offer tokens, [n, d]."""
        size = len(self._kept)
        free = max(0, min(size - self._seen, len(rows)))
        self._kept[self._seen : self._seen + free] = rows[:free]
        rest = rows[free:]
        numbers = np.arange(self._seen + free, self._seen + len(rows))
        places = self._random.integers(0, numbers + 1) if len(rest) else numbers
        hit = places < size
        self._kept[places[hit]] = rest[hit]
        self._seen += len(rows)

    @property
    def sample(self) -> NDArray[np.float32]:
        """What is kept, [n, d]."""
        return self._kept[: min(self._seen, len(self._kept))]


class Codebook:
    """Centroids and buckets; turns tokens into codes and back.

    Args:
        centroids: Normalised.
        cutoffs: Between the buckets, ascending.
        weights: What each bucket stands for, times the residual's scale.
        scales: What the byte behind the buckets stands for, ascending.
        axes: What the dimensions of 4 bits are; None for those of the vectors, as with 2 and 8 bits
            and in older indexes.
    """

    def __init__(
        self,
        centroids: Float32[ndarray, "c d"],
        cutoffs: Float32[ndarray, " cuts"],
        weights: Float32[ndarray, " levels"],
        scales: Float32[ndarray, " 256"],
        axes: Axes | None = None,
    ) -> None:
        self.centroids, self.cutoffs = centroids, cutoffs
        self.weights, self.scales, self.axes = weights, scales, axes
        self._nearest: Any = None

    @property
    def dim(self) -> int:
        """Length of a token's vector."""
        return int(self.centroids.shape[1])

    @property
    def bits(self) -> int:
        """Bits a dimension."""
        return (len(self.weights) - 1).bit_length()

    @property
    def residual_bytes(self) -> int:
        """Bytes of a token's residual, its scale included."""
        return self.dim * self.bits // 8 + 1

    @classmethod
    def train(cls, sample: Float32[ndarray, "n d"], tokens: int, bits: int) -> Codebook:
        """Train on a sample; a twentieth of it, at most 50,000 tokens, only sees the buckets.

        Args:
            sample: Normalised tokens; they are shuffled in place.
            tokens: How many tokens the index is expected to hold: decides the centroids.
            bits: 2, 4 or 8.

        Raises:
            SettingError: if there is no such codec.
        """
        if bits not in BITS or sample.shape[1] * bits % 8:
            raise SettingError(
                f"{bits} bits for {sample.shape[1]} dimensions were asked for; choose 2, 4 or 8 "
                "bits so that a vector fills whole bytes"
            )
        np.random.default_rng(0).shuffle(sample)
        held = min(50_000, max(1, len(sample) // 20))
        fitted = sample[held:] if len(sample) > 20 else sample
        count = min(n_centroids(tokens), 1 << max(0, int(math.log2(max(1, len(fitted) // 8)))))
        none = np.zeros(0, np.float32)
        book = cls(_centroids(fitted, count), none, none, np.ones(_SCALES, np.float32))
        probe = sample[:held]
        residuals = probe - book.centroids[book.assign(probe)]
        sizes = _sizes(residuals)
        book._train_buckets(residuals / sizes[:, None], probe, bits)
        book.scales = np.geomspace(
            _FINEST * sizes.max(), 1.25 * sizes.max(), _SCALES, dtype=np.float32
        )
        return book

    def _train_buckets(
        self, residuals: Float32[ndarray, "n d"], tokens: Float32[ndarray, "n d"], bits: int
    ) -> None:
        """Buckets of residuals of size 1: along their axes only where that loses less.

        What is lost is measured as queries see it that are spread as tokens are.
        """
        choices: list[tuple[Axes | None, NDArray[Any], NDArray[Any]]]
        choices = [(None, *_buckets(residuals, 1 << bits))]
        fitting, judging = (np.ascontiguousarray(residuals[i::2]) for i in range(2))
        # bytes hold two numbers, so that a quarter of the bytes must be an eighth of the axes
        if bits == 4 and self.dim % 8 == 0 and len(fitting) >= 2 * self.dim:
            choices.append(_axes(fitting, tokens))
        seen = tokens.T @ tokens
        lost = []
        for self.axes, self.cutoffs, self.weights in choices:
            error = self._buckets_of(judging)[1] - judging
            lost.append(float(np.einsum("nd,de,ne->", error, seen, error, optimize=True)))
        turned = lost[-1] <= _WORTH * lost[0]
        self.axes, self.cutoffs, self.weights = choices[-1 if turned else 0]

    def assign(self, rows: Float32[ndarray, "n d"]) -> Integer[ndarray, " n"]:
        """The nearest centroid of each token; with many centroids nearly always the nearest."""
        if self._nearest is None:
            self._nearest = _nearest(self.centroids)
        found = np.empty(len(rows), code_dtype(len(self.centroids)))
        for at in range(0, len(rows), _BLOCK):
            block = np.ascontiguousarray(rows[at : at + _BLOCK], np.float32)
            found[at : at + _BLOCK] = self._nearest.search(block, 1)[1][:, 0]
        return found

    def encode(
        self, rows: Float32[ndarray, "n d"]
    ) -> tuple[Integer[ndarray, " n"], UInt8[ndarray, "n b"]]:
        """Codes and packed residuals of tokens."""
        codes = self.assign(rows)
        packed = np.empty((len(rows), self.residual_bytes), np.uint8)
        between = torch.from_numpy(np.sqrt(self.scales[1:] * self.scales[:-1]))
        for at in range(0, len(rows), _BLOCK):
            some = slice(at, at + _BLOCK)
            rest = rows[some] - self.centroids[codes[some]]
            packed[some, :-1], values = self._buckets_of(rest / _sizes(rest)[:, None])
            # the scale with which these buckets come nearest
            products = np.einsum("td,td->t", values, rest)
            fitted = products / np.maximum(np.einsum("td,td->t", values, values), 1e-12)
            packed[some, -1] = torch.bucketize(
                torch.from_numpy(fitted), between, out_int32=True
            ).numpy()
        return codes, packed

    def _buckets_of(
        self, residuals: Float32[ndarray, "n d"]
    ) -> tuple[UInt8[ndarray, "n b"], Float32[ndarray, "n d"]]:
        """Packed buckets of residuals of size 1, and what these stand for."""
        cutoffs = torch.from_numpy(self.cutoffs)
        if self.axes is not None:
            numbers = self.axes.numbers(residuals, self.cutoffs)
        else:
            found = torch.bucketize(
                torch.from_numpy(residuals), cutoffs, out_int32=True, right=True
            )
            numbers = found.to(torch.uint8).numpy()
        parts = numbers.reshape(len(residuals), -1, 8 // self.bits)
        packed = parts[:, :, 0]
        for number in range(1, parts.shape[2]):
            packed = packed << self.bits | parts[:, :, number]
        return packed, kernels.Levels.of(self.weights, self.axes).values(packed)

    @cached_property
    def levels(self) -> kernels.Levels:
        """What packed buckets stand for."""
        return kernels.Levels.of(self.weights, self.axes)

    def decode(
        self, codes: Integer[ndarray, " n"], packed: UInt8[ndarray, "n b"]
    ) -> Float32[ndarray, "n d"]:
        """Tokens from codes and packed residuals, normalised."""
        return kernels.decode(self.centroids, codes, packed, self.levels, self.scales)

    def in_basis(self, query: Float32[ndarray, "r d"]) -> Float32[ndarray, "r d"]:
        """A query in the basis of the buckets, for `lfm2_mm.kernels.search.ResidualQuery`."""
        return query if self.axes is None else self.axes.turned(query)

    def write(self, folder: Path) -> Mapping[str, Stored]:
        """Write into a new folder, durably."""
        files.new_folder(folder)
        stored = {}
        arrays = {
            name: getattr(self, name) for name in ("centroids", "cutoffs", "weights", "scales")
        }
        if self.axes is not None:
            arrays |= {"axes": self.axes.directions, "counts": np.array(self.axes.counts)}
            arrays |= {"eight": self.axes.eight, "six": self.axes.six}
        for name, array in arrays.items():
            writer = files.FileWriter(folder / f"{name}.bin")
            try:
                writer.write(np.ascontiguousarray(array, "<f4"))
                stored[f"{name}.bin"] = writer.close()
            finally:
                writer.abandon()
        files.sync_folder(folder)
        return stored

    @classmethod
    def read(cls, folder: Path, codes: Codes, dim: int, bits: int) -> Codebook:
        """Read what `write` wrote.

        Raises:
            CorruptIndex: if a file is missing or of another size.
        """
        shapes = {
            "centroids": (codes.centroids, dim),
            "cutoffs": ((1 << bits) - 1,),
            "weights": (1 << bits,),
            "scales": (_SCALES,),
        }
        where = folder / "codebooks" / codes.name
        turned = "axes.bin" in codes.files
        if turned and "counts.bin" not in codes.files:
            raise IndexMismatch(
                f"the codebook {str(where)!r} is of format version 3, whose axes are not read any "
                "more; build the index anew"
            )
        if turned:
            kept = codes.files["axes.bin"].size // (4 * dim)
            shapes |= {"axes": (dim, kept), "counts": (2,), "eight": (256,), "six": (64,)}
        parts = [
            np.array(files.map_array(where / f"{n}.bin", "<f4", shape), np.float32)
            for n, shape in shapes.items()
        ]
        centroids, cutoffs, weights, scales, *turns = parts
        axes = None
        if turned:
            directions, counts, eight, six = turns
            axes = Axes(directions, eight, six, (int(counts[0]), int(counts[1])))
        return cls(centroids, cutoffs, weights, scales, axes)


def _axes(
    residuals: Float32[ndarray, "n d"], tokens: Float32[ndarray, "m d"]
) -> tuple[Axes, NDArray[np.float32], NDArray[np.float32]]:
    """The axes of residuals of size 1, and the cutoffs and weights of the buckets there."""
    directions, counting = Axes.principal(residuals, tokens)
    eights, sixes = counts = allotted(counting)
    directions = np.ascontiguousarray(directions[:, : len(directions) - eights - sixes])
    none = np.zeros(0, np.float32)
    places = Axes(directions, none, none, counts).places(residuals)
    cutoffs, weights = _buckets(places, 16)
    parts = ((places[:, :eights], 16), (places[:, eights : eights + 2 * sixes], 4))
    eight, six = (refined(part, cutoffs, weights, each, _buckets) for part, each in parts)
    return Axes(directions, eight, six, counts), cutoffs, weights


def _sizes(residuals: NDArray[Any]) -> NDArray[np.float32]:
    """Root mean square of each residual."""
    squares = np.einsum("td,td->t", residuals, residuals) / residuals.shape[1]
    sizes: NDArray[np.float32] = np.maximum(np.sqrt(squares), 1e-9).astype(np.float32)
    return sizes


def _buckets(
    residuals: NDArray[Any], levels: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cutoffs and values of buckets: from equal frequencies on, Lloyd's steps to the least error.

    (S. P. Lloyd, Least squares quantization in PCM, 1982.)
    """
    chosen = np.random.default_rng(0).permutation(residuals.size)[:_VALUES]
    values = np.sort(residuals.reshape(-1)[chosen])
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    weights = np.quantile(values, (np.arange(levels) + 0.5) / levels)
    cutoffs = np.quantile(values, np.arange(1, levels) / levels)
    for _ in range(_STEPS):
        edges = np.concatenate([[0], np.searchsorted(values, cutoffs, "right"), [len(values)]])
        filled = np.diff(edges)
        means = np.diff(sums[edges]) / np.maximum(filled, 1)
        weights = np.sort(np.where(filled > 0, means, weights))
        cutoffs = (weights[1:] + weights[:-1]) / 2
    return cutoffs.astype(np.float32), weights.astype(np.float32)


def _kmeans(rows: NDArray[Any], count: int, rounds: int) -> NDArray[np.float32]:
    faiss = _faiss()
    if count >= len(rows):
        return np.ascontiguousarray(rows, np.float32)
    means = faiss.Kmeans(
        rows.shape[1],
        count,
        niter=rounds,
        spherical=True,
        seed=1,
        min_points_per_centroid=1,
        max_points_per_centroid=256,
    )
    means.train(np.ascontiguousarray(rows, np.float32))
    return np.asarray(means.centroids, np.float32)


def _centroids(rows: NDArray[Any], count: int) -> NDArray[np.float32]:
    """Spherical k-means; for many centroids in two levels, each cell by its share of the tokens.

    One level of 16,384 centroids takes 50 times the arithmetic of two.
    """
    if count < _ROUGH:
        return _unit(_kmeans(rows, count, rounds=8))
    rough = _unit(_kmeans(rows, max(16, 1 << int(math.log2(count) / 2)), rounds=8))
    home = _search(_nearest(rough), rows)
    sizes = np.bincount(home, minlength=len(rough))
    shares = sizes * (count / len(rows))
    counts = np.minimum(np.maximum(np.floor(shares).astype(int), sizes > 0), sizes)
    # the rounding's rest goes to the cells that lost most by it
    for cell in np.argsort(counts - shares, kind="stable"):
        if counts.sum() >= count:
            break
        counts[cell] += counts[cell] < sizes[cell]
    order = np.argsort(home, kind="stable")
    begins = np.cumsum(sizes) - sizes
    fine = [
        _kmeans(rows[order[begin : begin + size]], int(number), rounds=8)
        for begin, size, number in zip(begins, sizes, counts, strict=True)
        if number
    ]
    return _unit(np.concatenate(fine)[: max(count, 1)])


def _search(index: Any, rows: NDArray[Any]) -> NDArray[Any]:
    blocks = range(0, len(rows), _BLOCK)
    found = [
        index.search(np.ascontiguousarray(rows[at : at + _BLOCK]), 1)[1][:, 0] for at in blocks
    ]
    return np.concatenate(found)


def _nearest(centroids: NDArray[Any]) -> Any:
    """A FAISS index over the centroids: exhaustive if they are few, else in cells itself."""
    faiss = _faiss()
    count, dim = centroids.shape
    flat = faiss.IndexFlatIP(dim)
    if count < 4 * _ROUGH:
        flat.add(centroids)
        return flat
    cells = faiss.IndexIVFFlat(flat, dim, int(math.sqrt(count)), faiss.METRIC_INNER_PRODUCT)
    cells.cp.niter = 8
    cells.cp.min_points_per_centroid = 1
    cells.cp.spherical = True
    cells.train(centroids)
    cells.add(centroids)
    cells.nprobe = 8
    return cells


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.maximum(norms, 1e-12), np.float32)
