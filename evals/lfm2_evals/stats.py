"""How sure a score is: intervals for a proportion, and whether two models really differ.

Counts and lists of right and wrong in, numbers out; it knows no task and no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

__all__ = [
    "Comparison",
    "Interval",
    "compare",
    "mcnemar_exact",
    "paired_bootstrap",
    "ratio_bootstrap",
    "wilson",
]

_Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True, slots=True)
class Interval:
    """A range that holds the true value 95 times in a hundred."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.low:.1f} to {100 * self.high:.1f}"


def wilson(right: int, n: int, z: float = _Z95) -> Interval:
    """Wilson's score interval of a proportion.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927), 209-212.

    Args:
        right: Successes.
        n: Trials; 0 gives the whole range.
        z: Quantile of the standard normal distribution; the default is that of 95 %.

    Raises:
        ValueError: if `right` is not between 0 and `n`.
    """
    if not 0 <= right <= n:
        raise ValueError(f"{right} of {n} is no proportion; count from 0 to the number of trials")
    if n == 0:
        return Interval(0.0, 1.0)
    p, zz = right / n, z * z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == n else middle + half
    return Interval(low, high)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split is if both are equally good.

    Source: Q. McNemar, Psychometrika 12 (1947), 153-157, with the binomial distribution itself in
    place of its approximation.

    Args:
        only_first: Items that the first alone got right.
        only_second: Items that the second alone got right.

    Returns:
        The p-value, at most 1.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, tail / (1 << n) * 2)


def paired_bootstrap(
    first: Sequence[bool], second: Sequence[bool], *, rounds: int = 2000, seed: int = 0
) -> Interval:
    """95 % percentile interval of `accuracy(second) - accuracy(first)` over the same items.

    Source: B. Efron, Annals of Statistics 7 (1979), 1-26; items are drawn with replacement.

    Raises:
        ValueError: if the lists differ in length or are empty.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"{len(first)} and {len(second)} items cannot be paired; score the same, at least one"
        )
    n = len(first)
    gains = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    rng = Random(seed)
    means = sorted(sum(rng.choices(gains, k=n)) / n for _ in range(rounds))
    return Interval(means[int(0.025 * rounds)], means[min(rounds - 1, int(0.975 * rounds))])


def ratio_bootstrap(
    parts: Sequence[int], wholes: Sequence[int], *, rounds: int = 2000, seed: int = 0
) -> Interval:
    """95 % percentile interval of `sum(parts) / sum(wholes)`, such as errors over words.

    Items are drawn with replacement, as in `paired_bootstrap`; without any item the whole range.
    """
    pairs = list(zip(parts, wholes, strict=True))
    if not sum(wholes):
        return Interval(0.0, 1.0)
    rng = Random(seed)
    ratios = []
    for _ in range(rounds):
        drawn = rng.choices(pairs, k=len(pairs))
        ratios.append(sum(part for part, _ in drawn) / max(1, sum(whole for _, whole in drawn)))
    ratios.sort()
    return Interval(ratios[int(0.025 * rounds)], ratios[min(rounds - 1, int(0.975 * rounds))])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same items.

    Attributes:
        n: Items both answered.
        first: Accuracy of the first.
        second: Accuracy of the second.
        difference: 95 % interval of second minus first, by paired bootstrap.
        p: Two-sided exact McNemar p-value.
    """

    n: int
    first: float
    second: float
    difference: Interval
    p: float


def compare(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
    """Compare two models item by item.

    Raises:
        ValueError: if the lists differ in length or are empty.
    """
    difference = paired_bootstrap(first, second)
    pairs = list(zip(first, second, strict=True))
    p = mcnemar_exact(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    n = len(pairs)
    return Comparison(n, sum(first) / n, sum(second) / n, difference, p)
