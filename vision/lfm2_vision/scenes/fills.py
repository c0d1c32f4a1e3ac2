"""Chooses the colours of fills: of a name, or of any kind. Knows no scene."""

from __future__ import annotations

import colorsys
from random import Random

from .world import ANCHORS, HELD_OUT_PAIRS, JITTER, Rgb, nearest_colour, visibly_different

__all__ = ["any_fill", "mean", "named_rgb"]


def named_rgb(rng: Random, colour: str) -> Rgb:
    """A random mixture of the colour's anchors, then jitter."""
    shares = [rng.expovariate(1.0) for _ in ANCHORS[colour]]
    total = sum(shares)
    channels = [
        round(
            sum(s * anchor[c] for s, anchor in zip(shares, ANCHORS[colour], strict=True)) / total
            + rng.uniform(-JITTER, JITTER)
        )
        for c in range(3)
    ]
    red, green, blue = (min(255, max(0, value)) for value in channels)
    return red, green, blue


def any_fill(rng: Random, shape: str, striped: float) -> list[Rgb]:
    """One colour, or two that differ; their mean is nearest to none withheld from the shape."""
    two = striped > 0 and rng.random() < striped
    while True:
        fill = [_any_rgb(rng) for _ in range(1 + two)]
        if two and not visibly_different(*fill):
            continue
        if (shape, nearest_colour(mean(fill))) not in HELD_OUT_PAIRS:
            return fill


def _any_rgb(rng: Random) -> Rgb:
    """Any colour, every second one vivid."""
    if rng.random() < 0.5:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)
    vivid = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.7, 1.0), rng.uniform(0.4, 1.0))
    return round(255 * vivid[0]), round(255 * vivid[1]), round(255 * vivid[2])


def mean(fill: list[Rgb]) -> Rgb:
    """Channel by channel."""
    red, green, blue = (sum(channel) // len(fill) for channel in zip(*fill, strict=True))
    return red, green, blue
