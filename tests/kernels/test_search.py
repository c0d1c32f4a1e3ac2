"""Kernels of search against their twins in numpy, and the twins against the plainest arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_mm.kernels import native, search

PATHS = ("plain", "avx2", "avx512", "amx", "neon")


@pytest.fixture(autouse=True)
def _best_path_after() -> Iterator[None]:
    yield
    native.choose(None)


def twin(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(native, "function", lambda *_: None)
    return monkeypatch


def layout(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array(lengths, np.int64)
    return np.cumsum(counts) - counts, counts


def residuals(
    source: np.random.Generator, rows: int, dim: int, bits: int, tokens: int, wide: bool
) -> tuple[search.ResidualQuery, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A prepared query, codes and packed residuals; and the query and tokens in plain numbers."""
    centroids = source.standard_normal((40, dim)).astype(np.float32) / np.float32(dim**0.5)
    asked = source.standard_normal((rows, dim)).astype(np.float32) / np.float32(dim**0.5)
    query = search.filled(asked)
    weights = np.sort(source.standard_normal(1 << bits)).astype(np.float32)
    scales = np.geomspace(1e-3, 0.1, 256).astype(np.float32)
    scores = query @ centroids.T
    ready = search.ResidualQuery.prepare(query, scores.T.copy(), weights, scales)
    codes = source.integers(0, 40, tokens).astype(np.uint32 if wide else np.uint16)
    packed = source.integers(0, 256, (tokens, dim * bits // 8 + 1)).astype(np.uint8)
    numbers = np.unpackbits(packed[:, :-1], axis=1).reshape(tokens, dim, bits)
    buckets = numbers @ (1 << np.arange(bits - 1, -1, -1))
    back = centroids[codes] + weights[buckets] * scales[packed[:, -1]][:, None]
    return ready, codes, packed, query, back


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("rows", "dim", "bits"),
    [(1, 128, 4), (16, 128, 4), (17, 128, 4), (33, 64, 4), (50, 96, 4), (5, 8, 4), (3, 20, 4)]
    + [(20, 128, 2), (7, 48, 2), (20, 128, 8), (4, 10, 8), (9, 1024, 4), (256, 32, 4)],
)
def test_packed_residuals_as_the_twin_scores_them(
    path: native.CpuPath, rows: int, dim: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = np.random.default_rng(rows * dim + bits)
    lengths = [1, 7, 8, 9, 15, 16, 17, 1, 64, *source.integers(1, 40, 30).tolist()]
    starts, counts = layout(lengths)
    order = source.permutation(len(lengths))
    starts, counts = starts[order], counts[order]
    ready, codes, packed, query, back = residuals(
        source, rows, dim, bits, sum(lengths), wide=bool(rows % 2)
    )
    native.choose(path)
    found = search.residual_maxsim(ready, codes, packed, starts, counts)
    with twin(monkeypatch).context():
        wanted = search.residual_maxsim(ready, codes, packed, starts, counts)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-4)
    exact = [(query @ back[a : a + n].T).max(1).sum() for a, n in zip(starts, counts, strict=True)]
    # what 8 bits of a query and 7 of a level leave over, a row
    np.testing.assert_allclose(wanted, exact, atol=0.01 * rows)


def test_more_rows_or_dimensions_than_the_kernel_takes_are_the_twins() -> None:
    source = np.random.default_rng(1)
    starts, counts = layout([3, 5])
    for rows, dim in ((257, 16), (2, 1032)):
        ready, codes, packed, query, back = residuals(source, rows, dim, 4, 8, wide=False)
        found = search.residual_maxsim(ready, codes, packed, starts, counts)
        exact = [(query @ back[a : a + n].T).max(1).sum() for a, n in ((0, 3), (3, 5))]
        np.testing.assert_allclose(found, exact, atol=0.01 * rows)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=40),
    st.sampled_from([16, 32, 48, 64]),
    st.sampled_from(PATHS),
    st.booleans(),
)
def test_bytes_of_centroids_as_the_twin_adds_them(
    lengths: list[int], rows: int, path: native.CpuPath, wide: bool
) -> None:
    source = np.random.default_rng(sum(lengths))
    scores = source.integers(0, 256, (9, rows)).astype(np.uint8)
    codes = source.integers(0, 9, sum(lengths)).astype(np.uint32 if wide else np.uint16)
    starts, counts = layout(lengths)
    native.choose(path)
    found = search.centroid_maxsim(scores, codes, starts, counts)
    with pytest.MonkeyPatch.context() as patch:
        same = twin(patch) and search.centroid_maxsim(scores, codes, starts, counts)
    wanted = [scores[codes[a : a + n]].max(0).sum() for a, n in zip(starts, counts, strict=True)]
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(same, wanted)


def test_steps_keep_the_order_of_scores() -> None:
    scores = np.array([[0.9, 0.5], [-0.4, -0.1], [0.8996, 0.1]], np.float32)
    steps = search.centroid_bytes(scores)
    # from 0.9 down, a range of 1: what is below -0.1 is all alike
    np.testing.assert_array_equal(steps, [[255, 153], [0, 0], [255, 51]])
    np.testing.assert_array_equal(search.centroid_bytes(np.zeros((2, 1), np.float32)), [[0], [0]])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cells_as_the_twin_gathers_them(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.random.default_rng(3)
    passages = 500
    lists = [np.flatnonzero(source.random(passages) < 0.2).astype(np.int32) for _ in range(30)]
    lists[4] = lists[4][:0]
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    cells = np.stack([source.permutation(30)[:6] for _ in range(7)]).astype(np.int64)
    gains = np.sort(source.random((7, 6)).astype(np.float32), axis=1)
    given_lists = np.concatenate(lists)
    with monkeypatch.context() as patch:
        patch.setattr(native, "threads", lambda: threads)
        found = search.accumulate_cells(given_lists, offsets, cells, gains, passages)
    wanted = np.zeros(passages, np.float32)
    for row, worth in zip(cells, gains, strict=True):
        best = np.zeros(passages, np.float32)
        for cell, gain in zip(row, worth, strict=True):
            best[lists[cell]] = np.maximum(best[lists[cell]], gain)
        wanted += best
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    with twin(monkeypatch).context():
        same = search.accumulate_cells(given_lists, offsets, cells, gains, passages)
    np.testing.assert_allclose(same, wanted, rtol=1e-6)


def test_cells_give_each_row_its_best_gain_once() -> None:
    # cell 0: passages 0 and 2; cell 1: passage 2; cell 2: passages 1 and 2
    passages, offsets = np.array([0, 2, 2, 1, 2], np.int32), np.array([0, 2, 3, 5])
    cells = np.array([[1, 0], [2, 1]])
    gains = np.array([[0.25, 0.5], [0.0, 2.0]], np.float32)
    found = search.accumulate_cells(passages, offsets, cells, gains, 4)
    np.testing.assert_array_equal(found, np.array([0.5, 0.0, 2.5, 0.0], np.float32))


def test_nothing_to_score_is_nothing() -> None:
    none = np.zeros(0, np.int64)
    codes = np.zeros(0, np.uint16)
    assert len(search.centroid_maxsim(np.zeros((1, 16), np.uint8), codes, none, none)) == 0
    ready, *_ = residuals(np.random.default_rng(0), 1, 8, 4, 1, wide=False)
    packed = np.zeros((0, 5), np.uint8)
    assert len(search.residual_maxsim(ready, codes, packed, none, none)) == 0


def test_a_query_is_filled_up_with_zeros() -> None:
    rows = search.filled(np.ones((17, 4), np.float32))
    assert rows.shape == (32, 4) and rows[:17].all() and not rows[17:].any()
    assert search.filled(np.ones((16, 4), np.float32)).shape == (16, 4)
