"""The hot functions and the codec, against the plainest arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm2_mm.errors import CorruptIndex, IndexMismatch, SettingError
from lfm2_mm.kernels import search as fast
from lfm2_retrieval.index import kernels
from lfm2_retrieval.index.axes import Axes, allotted
from lfm2_retrieval.index.codec import Codebook, Reservoir, code_dtype, n_centroids
from lfm2_retrieval.index.manifest import Codes
from tests.retrieval.index_fakes import DIM, corpus, maxsim, unit


def layout(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array(lengths, np.int64)
    return np.cumsum(counts) - counts, counts


@settings(max_examples=25)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_maxsim_over_ragged_passages(lengths: list[int]) -> None:
    source = np.random.default_rng(1)
    vectors = source.standard_normal((sum(lengths), 8)).astype(np.float16)
    query = source.standard_normal((5, 8)).astype(np.float32)
    starts, counts = layout(lengths)
    found = kernels.flat_maxsim(query, vectors, starts, counts)
    wanted = [
        maxsim(query, vectors[a : a + n].astype(np.float32))
        for a, n in zip(starts, counts, strict=True)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_maxsim_of_many_passages_goes_in_batches() -> None:
    source = np.random.default_rng(2)
    lengths = source.integers(1, 600, 300).tolist()
    vectors = source.standard_normal((sum(lengths), 4)).astype(np.float16)
    query = source.standard_normal((3, 4)).astype(np.float32)
    starts, counts = layout(lengths)
    order = source.permutation(len(lengths))
    found = kernels.flat_maxsim(query, vectors, starts[order], counts[order])
    wanted = [
        maxsim(query, vectors[a : a + n].astype(np.float32))
        for a, n in zip(starts, counts, strict=True)
    ]
    np.testing.assert_allclose(found, np.array(wanted)[order], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_encoded_comes_back_nearly(bits: int) -> None:
    rows = np.concatenate(corpus(200))
    book = Codebook.train(rows.copy(), len(rows), bits)
    codes, packed = book.encode(rows)
    assert packed.shape == (len(rows), DIM * bits // 8 + 1)
    assert book.bits == bits
    back = book.decode(codes, packed)
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), 1, rtol=1e-5)
    cosines = np.einsum("td,td->t", back, rows)
    assert cosines.mean() > {2: 0.985, 4: 0.995, 8: 0.9995}[bits]
    assert book.axes is None  # these tokens differ alike along all axes
    # a bucket holds what lies between its cutoffs, in the order of the dimensions
    residual = rows[0] - book.centroids[codes[0]]
    buckets = np.searchsorted(book.cutoffs, residual / np.sqrt((residual**2).mean()), side="right")
    values = book.weights[buckets]
    scale = book.scales[packed[0, -1]]
    assert scale == pytest.approx((values @ residual) / (values @ values), rel=0.02)
    plain = book.centroids[codes[0]] + scale * values
    np.testing.assert_allclose(back[0], unit(plain[None])[0], rtol=1e-4, atol=1e-6)


def test_the_scale_helps_where_some_tokens_are_near_and_some_far() -> None:
    source = np.random.default_rng(5)
    topics = unit(source.standard_normal((16, 64)).astype(np.float32))
    noise = source.standard_normal((4000, 64), dtype=np.float32)
    sizes = np.where(np.arange(4000) % 2, 0.01, 0.1).astype(np.float32)
    rows = unit(topics[source.integers(0, 16, 4000)] + sizes[:, None] * noise)
    book = Codebook.train(rows.copy(), 256, 4)
    back = book.decode(*book.encode(rows))
    left = np.linalg.norm(rows - book.centroids[book.assign(rows)], axis=1)
    lost = np.linalg.norm(back - rows, axis=1)
    assert lost[::2].sum() < 0.12 * left[::2].sum()
    assert lost[1::2].sum() < 0.12 * left[1::2].sum()


def skewed(count: int, dim: int = 32) -> np.ndarray:
    """Tokens around 16 topics, spread as unevenly along hidden axes as real ones are."""
    source = np.random.default_rng(8)
    topics = unit(source.standard_normal((16, dim)).astype(np.float32))
    turn, _ = np.linalg.qr(source.standard_normal((dim, dim)))
    spread = np.geomspace(1, 0.02, dim) * turn
    noise = source.standard_normal((count, dim)) @ spread.T * 0.12
    return unit((topics[source.integers(0, 16, count)] + noise).astype(np.float32))


def along_dimensions(book: Codebook, rows: np.ndarray) -> Codebook:
    """The same codebook as format version 2 had it: 4 bits of each dimension of the vectors."""
    rest = rows - book.centroids[book.assign(rows)]
    sizes = np.sqrt((rest**2).mean(1, keepdims=True))
    weights = np.quantile(rest / sizes, (np.arange(16) + 0.5) / 16).astype(np.float32)
    return Codebook(book.centroids, (weights[1:] + weights[:-1]) / 2, weights, book.scales)


def test_axes_have_the_bits_where_tokens_differ() -> None:
    rows = skewed(6000)
    book = Codebook.train(rows.copy(), 256, 4)
    assert book.axes is not None
    axes, (eights, sixes) = book.axes.directions, book.axes.counts
    kept = axes.shape[1]
    assert kept + eights + sixes == 32 and eights + sixes > 0
    unit_axes = axes / np.linalg.norm(axes, axis=0)
    np.testing.assert_allclose(unit_axes.T @ unit_axes, np.eye(kept), atol=1e-4)
    old = along_dimensions(book, rows)
    assert old.residual_bytes == book.residual_bytes == 17
    # what queries spread like the tokens see of the error
    error = [(b.decode(*b.encode(rows)) - rows) @ rows[::50].T for b in (book, old)]
    assert np.square(error[0]).mean() < 0.4 * np.square(error[1]).mean()
    rest = rows - book.centroids[book.assign(rows)]
    rest /= np.sqrt((rest**2).mean(1, keepdims=True))
    packed, values = book._buckets_of(rest)
    wrong = np.abs(book.axes.places(rest) - book.axes.places(values)).mean(0)
    parts = np.split(wrong, [eights, eights + 2 * sixes])
    if eights and sixes:
        assert parts[0].mean() < 0.4 * parts[1].mean()
    if sixes and len(parts[2]):
        assert parts[1].mean() < 0.4 * parts[2].mean()
    np.testing.assert_array_equal(values, book.levels.values(packed))


@pytest.mark.parametrize("counts", [(0, 0), (0, 4), (2, 4), (4, 0), (8, 0), (2, 2)])
def test_packed_numbers_stand_for_the_nearest_values(counts: tuple[int, int]) -> None:
    source = np.random.default_rng(3)
    dim, (eights, sixes) = 16, counts
    kept = dim - eights - sixes
    turn, _ = np.linalg.qr(source.standard_normal((dim, dim)))
    rest = source.standard_normal((500, dim)).astype(np.float32)
    weights = np.linspace(-2.5, 2.5, 16, dtype=np.float32)
    cutoffs = (weights[1:] + weights[:-1]) / 2
    step = weights[1] - weights[0]
    eight, six = (
        (weights[:, None] + step * ((np.arange(n) + 0.5) / n - 0.5)).reshape(-1).astype(np.float32)
        for n in (16, 4)
    )
    axes = Axes(np.ascontiguousarray(turn[:, :kept], np.float32), eight, six, counts)
    book = Codebook(
        np.zeros((1, dim), np.float32), cutoffs, weights, np.ones(256, np.float32), axes
    )
    packed, values = book._buckets_of(rest)
    assert packed.shape == (500, dim // 2)
    places, found = axes.places(rest), axes.places(values)
    for number in range(kept):
        levels = eight if number < eights else six if number < eights + 2 * sixes else weights
        nearest = levels[np.abs(places[:, number, None] - levels).argmin(1)]
        np.testing.assert_allclose(found[:, number], nearest, atol=1e-5)
    # nothing is left along the axes that have no number
    np.testing.assert_allclose(values @ turn[:, kept:], 0, atol=1e-5)


def test_bits_go_where_they_count() -> None:
    assert allotted(np.ones(32, np.float32)) == (0, 0)
    eights, sixes = allotted(np.geomspace(1, 1e-6, 32, dtype=np.float32))
    assert eights > 0 and sixes > 0 and 2 * eights + 3 * sixes <= 32
    assert eights % 2 == sixes % 2 == 0
    first = np.full(32, 1e-9, np.float32)
    first[:8] = 1
    assert allotted(first)[0] >= 8


@pytest.mark.parametrize("dim", [12, 20, 40])
def test_any_dimension_is_trained_and_decoded(dim: int) -> None:
    rows = np.random.default_rng(0).standard_normal((4000, dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    book = Codebook.train(rows.copy(), 64, 4)
    assert book.axes is None or dim % 8 == 0
    assert np.square(book.decode(*book.encode(rows)) - rows).sum(1).mean() < 0.1


def test_the_kernel_for_4_bits_scores_what_axes_hold_but_for_the_last_bits() -> None:
    rows = skewed(3000)
    book = Codebook.train(rows.copy(), 256, 4)
    codes, packed = book.encode(rows)
    starts, counts = layout([20] * 150)
    query = fast.filled(rows[::200])
    scores = query @ book.centroids.T
    ready = fast.ResidualQuery.prepare(
        book.in_basis(query), np.ascontiguousarray(scores.T), book.weights, book.scales
    )
    found = fast.residual_maxsim(ready, codes, packed, starts, counts)
    near = kernels.residual_maxsim(
        query, book.centroids, codes, packed, book.levels, book.scales, starts, counts
    )
    assert np.corrcoef(found, near)[0, 1] > 0.99
    assert set(np.argsort(-near)[:5]) <= set(np.argsort(-found)[:15])


def test_an_older_codebook_is_read_without_axes(tmp_path: Path) -> None:
    rows = skewed(6000)
    new = Codebook.train(rows.copy(), 256, 4)
    old = along_dimensions(new, rows)
    for name, book in (("new", new), ("old", old)):
        stored = book.write(tmp_path / "codebooks" / name)
        codes = Codes(name=name, centroids=len(book.centroids), trained_tokens=1, files=stored)
        back = Codebook.read(tmp_path, codes, 32, 4)
        assert ("axes.bin" in stored) is (back.axes is not None) is (name == "new")
        assert back.axes is None or (new.axes and back.axes.counts == new.axes.counts)
        for one, other in zip(back.encode(rows), book.encode(rows), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(
            back.decode(*back.encode(rows)), book.decode(*book.encode(rows))
        )


def test_axes_of_format_version_3_are_refused(tmp_path: Path) -> None:
    rows = skewed(6000)
    stored = dict(Codebook.train(rows.copy(), 256, 4).write(tmp_path / "codebooks" / "old"))
    del stored["counts.bin"]
    codes = Codes(name="old", centroids=256, trained_tokens=1, files=stored)
    with pytest.raises(IndexMismatch, match="of format version 3, .* build the index anew$"):
        Codebook.read(tmp_path, codes, 32, 4)


def test_residual_maxsim_is_that_of_the_decoded_tokens() -> None:
    rows = np.concatenate(corpus(30))
    book = Codebook.train(rows.copy(), len(rows), 4)
    codes, packed = book.encode(rows)
    starts, counts = layout([10, 1, 25, 10])
    query = corpus(1, seed=9)[0]
    found = kernels.residual_maxsim(
        query, book.centroids, codes, packed, book.levels, book.scales, starts, counts
    )
    back = book.decode(codes, packed)
    wanted = [maxsim(query, back[a : a + n]) for a, n in zip(starts, counts, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_many_centroids_are_trained_in_two_levels_and_found_again() -> None:
    source = np.random.default_rng(4)
    topics = unit(source.standard_normal((400, 8)).astype(np.float32))
    noise = source.standard_normal((40_000, 8), dtype=np.float32)
    rows = unit(np.repeat(topics, 100, 0) + np.float32(0.1) * noise)
    book = Codebook.train(rows.copy(), 40_000, 4)
    assert len(book.centroids) == n_centroids(40_000) == 2048
    np.testing.assert_allclose(np.linalg.norm(book.centroids, axis=1), 1, rtol=1e-5)
    some = rows[::40]
    best = (some @ book.centroids.T).max(1)
    got = np.einsum("td,td->t", some, book.centroids[book.assign(some)])
    np.testing.assert_allclose(got, best, atol=1e-5)
    assert best.mean() > 0.97


def test_centroids_grow_with_the_root_of_the_tokens() -> None:
    assert n_centroids(10_000_000) == 32768  # 16 sqrt(1e7) = 50,596
    assert n_centroids(1_000_000) == 8192
    assert n_centroids(100) == 8
    assert n_centroids(1) == n_centroids(0) == 1
    assert code_dtype(65536) == np.uint16
    assert code_dtype(65537) == np.uint32


def test_a_codec_that_fills_no_bytes_is_refused() -> None:
    with pytest.raises(SettingError, match="2 bits for 3 dimensions were asked for; choose 2, 4"):
        Codebook.train(np.ones((4, 3), np.float32), 4, 2)


def test_the_reservoir_is_bounded_and_fair() -> None:
    kept = Reservoir(500, 1)
    for begin in range(0, 10_000, 130):
        kept.add(np.arange(begin, min(begin + 130, 10_000), dtype=np.float32)[:, None])
    assert kept.sample.shape == (500, 1)
    assert len(np.unique(kept.sample)) == 500
    assert 4200 < kept.sample.mean() < 5800
    few = Reservoir(500, 1)
    few.add(np.ones((3, 1), np.float32))
    assert few.sample.shape == (3, 1)


def test_a_codebook_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = np.concatenate(corpus(30))
    book = Codebook.train(rows.copy(), len(rows), 2)
    stored = book.write(tmp_path / "codebooks" / "one")
    codes = Codes(name="one", centroids=len(book.centroids), trained_tokens=1, files=stored)
    back = Codebook.read(tmp_path, codes, DIM, 2)
    for name in ("centroids", "cutoffs", "weights", "scales"):
        np.testing.assert_array_equal(getattr(back, name), getattr(book, name))
    (tmp_path / "codebooks" / "one" / "weights.bin").write_bytes(b"")
    with pytest.raises(CorruptIndex, match=r"weights.bin' has 0 bytes instead of 16; restore"):
        Codebook.read(tmp_path, codes, DIM, 2)
