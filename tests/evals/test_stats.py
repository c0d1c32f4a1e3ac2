"""Intervals and comparisons: known values, limits, and agreement with brute force."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_evals.stats import compare, mcnemar_exact, paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_wilson_gives_published_values(right: int, n: int, low: float, high: float) -> None:
    interval = wilson(right, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_own_equation_and_holds_the_share(case: tuple[int, int]) -> None:
    right, n = case
    interval, p, z = wilson(right, n), right / n, 1.959963984540054
    assert 0 <= interval.low <= p <= interval.high <= 1
    for bound in (interval.low, interval.high):
        if 0 < bound < 1:
            assert math.isclose(
                abs(p - bound), z * math.sqrt(bound * (1 - bound) / n), rel_tol=1e-6
            )


def test_wilson_of_nothing_is_everything_and_nonsense_is_refused() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 of 2 is no proportion; count from 0 to the number of"):
        wilson(3, 2)


def test_mcnemar_equals_counting_every_outcome() -> None:
    for n in range(9):
        for only_first in range(n + 1):
            uneven = abs(2 * only_first - n)
            cases = list(product((0, 1), repeat=n))
            extreme = sum(abs(2 * sum(case) - n) >= uneven for case in cases)
            assert math.isclose(mcnemar_exact(only_first, n - only_first), extreme / len(cases))


def test_mcnemar_of_many_items_is_still_a_number() -> None:
    assert mcnemar_exact(900, 900) == 1.0
    assert 0 < mcnemar_exact(1100, 900) < 1e-4


def test_bootstrap_is_repeatable_and_holds_the_difference() -> None:
    first, second = [True] * 60 + [False] * 40, [True] * 80 + [False] * 20
    interval = paired_bootstrap(first, second)
    assert interval == paired_bootstrap(first, second)
    assert 0.1 < interval.low < 0.2 < interval.high < 0.3
    assert paired_bootstrap(first, first) == paired_bootstrap([True], [True])
    with pytest.raises(ValueError, match="2 and 1 items cannot be paired"):
        paired_bootstrap([True, False], [True])


def test_compare_counts_what_only_one_got_right() -> None:
    found = compare([True] * 8 + [False] * 2, [False] * 8 + [False, True])
    assert (found.n, found.first, found.second) == (10, 0.8, 0.1)
    assert found.p == mcnemar_exact(8, 1)
    assert found.difference.high < 0
