"""Outlines without a name: how near they are to shapes, and drawn at random. Knows no scene."""

from __future__ import annotations

import math
from random import Random

from .world import ALL_SHAPES, HELD_OUT_PAIRS, OUTLINES, REACH, UNNAMED
from .world import ring as ring_of

__all__ = ["LIKE", "blob", "difference", "nearest_shape", "radii"]

_RAYS = 72
_TURNS = range(-3, 4)  # rays by which things are turned, at most


def radii(points: tuple[tuple[float, float], ...]) -> tuple[float, ...]:
    """Distance of an outline from its centre, in `_RAYS` directions clockwise from the top."""
    found = []
    for i in range(_RAYS):
        a = 2 * math.pi * i / _RAYS
        x, y = math.sin(a), -math.cos(a)
        far = 0.0
        for (px, py), (qx, qy) in zip(points, (*points[1:], points[0]), strict=True):
            ex, ey = qx - px, qy - py
            across = x * ey - y * ex
            if abs(across) > 1e-12:
                along, part = (px * ey - py * ex) / across, (px * y - py * x) / across
                if -1e-9 <= part <= 1 + 1e-9:
                    far = max(far, along)
        found.append(far)
    return tuple(found)


_RADII = {shape: radii(points) for shape, points in OUTLINES.items()}
LIKE = 0.08
"""Root mean square, in units of r, up to which an outline is like that of a shape."""


def difference(one: tuple[float, ...], other: tuple[float, ...], turned: int = 0) -> float:
    """Root mean square between two outlines given by `radii`, the other turned by so many rays."""
    pairs = zip(one, (*other[turned:], *other[:turned]), strict=True)
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / _RAYS)


def nearest_shape(ring: tuple[float, ...]) -> tuple[str, float]:
    """The shape whose outline, turned by up to 15 degrees, differs least, and how much."""
    return min(
        ((shape, difference(ring, r, turned)) for shape, r in _RADII.items() for turned in _TURNS),
        key=lambda found: found[1],
    )


def blob(rng: Random, colour: str) -> tuple[tuple[float, float], ...]:
    """An outline at r = 1 like none of `OUTLINES`: a bulging ring, or halfway between two shapes.

    As stripes are to colours: features of shapes without the shape. None is nearest to a shape
    that is withheld in the colour.
    """
    while True:
        if rng.random() < 0.5:
            one, other = rng.sample(ALL_SHAPES, 2)
            share = rng.uniform(0.4, 0.6)
            rings = zip(_RADII[one], _RADII[other], strict=True)
            ring = tuple(share * a + (1 - share) * b for a, b in rings)
        else:
            ring = radii(_bulging(rng))
        shape, off = nearest_shape(ring)
        if off > LIKE and (shape, colour) not in HELD_OUT_PAIRS:
            return ring_of([2 * math.pi * i / _RAYS for i in range(_RAYS)], list(ring))


def _bulging(rng: Random) -> tuple[tuple[float, float], ...]:
    waves = [(k, rng.uniform(0.0, 1.0) / k**0.5, rng.uniform(0, 2 * math.pi)) for k in (2, 3, 4, 5)]
    corners = rng.choice((7, 9, 11, 48))
    angles = [2 * math.pi * i / corners for i in range(corners)]
    bulges = [sum(size * math.sin(k * a + phase) for k, size, phase in waves) for a in angles]
    low, high = min(bulges), max(bulges)
    depth = rng.uniform(0.4, 0.65)
    return ring_of(
        angles, [REACH[UNNAMED] * (1 - depth * (high - b) / (high - low)) for b in bulges]
    )
