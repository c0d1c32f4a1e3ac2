"""Chooses scenes: every sample is a pure function of (seed, index, split, profile).

Knows what a scene may contain and how likely; neither how it is drawn nor what is asked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from PIL import Image

from lfm2_mm.errors import SettingError

from .draw import render, sign_extent
from .fills import any_fill, mean, named_rgb
from .outlines import blob
from .questions import QA, for_evaluation, pick
from .world import (
    ALL_COLOURS,
    ALL_SHAPES,
    COLOURS,
    CORE_SHAPES,
    GROUND_KINDS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDS,
    REACH,
    UNNAMED,
    WORDS,
    Ground,
    Pair,
    Rgb,
    Scene,
    Sign,
    Split,
    Thing,
    allowed_pairs,
    nearest_colour,
    visibly_different,
)

__all__ = [
    "CORE",
    "EXTRA",
    "MORE_SHAPES",
    "SIGNS",
    "SMALL_THINGS",
    "Profile",
    "Sample",
    "canvas",
    "generate",
    "generate_scene",
    "stream",
]

LARGEST = 1 / 2.2
CORE_SMALLEST = 1 / 6
SMALLEST = 1 / 10
_NEAR_WHITE = (240, 242, 245)


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What scenes may contain.

    Attributes:
        canvas: Least and greatest side in pixels; both sides are drawn log-uniformly from it.
        max_aspect: Greatest ratio of the longer to the shorter side.
        size: Exact width and height, instead of both of the above.
        things: Least and greatest number of things.
        shapes: Shapes that may occur and be asked about.
        colours: Colours that may occur and be asked about.
        sign_probability: Share of scenes with a sign.
        small_probability: Share of things whose diameter is 1/10 to 1/6 of the shorter side
            instead of 1/6 to 1/2.2.
        grounds: Kinds of ground.
        any_colour: Share of scenes whose fills are of any colour at all, and whose questions name
            none. No shape takes a fill that is nearest to a colour withheld from it.
        striped: Share of the things of such scenes that have stripes of two colours; it is their
            mean that is not nearest to a colour withheld from the shape.
        any_shape: Share of the other scenes whose outlines are like none of the shapes, and whose
            questions name colours only.

    Raises:
        SettingError: A value is out of its range.
    """

    canvas: tuple[int, int] = (128, 1024)
    max_aspect: float = 8.0
    size: tuple[int, int] | None = None
    things: tuple[int, int] = (1, 5)
    shapes: tuple[str, ...] = CORE_SHAPES
    colours: tuple[str, ...] = COLOURS
    sign_probability: float = 0.0
    small_probability: float = 0.0
    grounds: tuple[str, ...] = GROUND_KINDS
    any_colour: float = 0.0
    striped: float = 0.0
    any_shape: float = 0.0

    def __post_init__(self) -> None:
        _need(64 <= self.canvas[0] <= self.canvas[1] <= 4096, "canvas", self.canvas, "64 to 4096")
        _need(1 <= self.max_aspect, "max_aspect", self.max_aspect, "at least 1")
        _need(1 <= self.things[0] <= self.things[1] <= 5, "things", self.things, "1 to 5")
        _need(
            bool(self.shapes) and set(self.shapes) <= set(ALL_SHAPES),
            "shapes",
            self.shapes,
            ", ".join(ALL_SHAPES),
        )
        _need(
            bool(self.colours) and set(self.colours) <= set(ALL_COLOURS),
            "colours",
            self.colours,
            ", ".join(ALL_COLOURS),
        )
        _need(
            bool(self.grounds) and set(self.grounds) <= set(GROUND_KINDS),
            "grounds",
            self.grounds,
            ", ".join(GROUND_KINDS),
        )
        for name in ("sign_probability", "small_probability", "any_colour", "striped", "any_shape"):
            _need(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")


def _need(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise SettingError(f"Profile.{name} is {value!r}; choose from {allowed}.")


CORE = Profile()
"""The domain with a floor."""
MORE_SHAPES = Profile(shapes=ALL_SHAPES)
SMALL_THINGS = Profile(small_probability=1.0)
SIGNS = Profile(sign_probability=0.7, things=(1, 3))
EXTRA = Profile(shapes=ALL_SHAPES, sign_probability=0.4, small_probability=0.25)
"""Everything at once; the tiers beyond the core are reported without a floor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A scene, its picture and questions about it.

    Attributes:
        scene: What is to be seen.
        image: Mode RGB, size (scene.width, scene.height).
        questions: Packed training questions (train), or one per core kind (held_out).
    """

    scene: Scene
    image: Image.Image
    questions: tuple[QA, ...]


def stream(seed: int, index: int, split: Split, purpose: str) -> Random:
    """A random stream that depends on nothing but its arguments, on every machine."""
    name = f"{seed}/{index}/{split}/{purpose}".encode()
    return Random(int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big"))


def generate(
    seed: int,
    index: int,
    *,
    split: Split = "train",
    profile: Profile = CORE,
    questions: int = 6,
    weights: Mapping[str, float] | None = None,
) -> Sample:
    """Make one sample: scene, picture and questions.

    Args:
        seed: Names the data set.
        index: Names the sample in it.
        split: "train" never contains a held-out pair, word or wording; "held_out" contains all.
        profile: What the scene may contain.
        questions: About how many questions a training sample packs.
        weights: How often a training sample asks each kind, where not as usual.

    Raises:
        SettingError: The split is unknown.
    """
    scene = generate_scene(seed, index, split=split, profile=profile)
    rng = stream(seed, index, split, "questions")
    asked = pick(scene, rng, questions, weights) if split == "train" else for_evaluation(scene, rng)
    return Sample(scene=scene, image=render(scene), questions=tuple(asked))


def generate_scene(
    seed: int, index: int, *, split: Split = "train", profile: Profile = CORE
) -> Scene:
    """Make the scene of `generate` without drawing it.

    Raises:
        SettingError: The split is unknown.
    """
    if split not in ("train", "held_out"):
        raise SettingError(f"The split is {split!r}; choose 'train' or 'held_out'.")
    rng = stream(seed, index, split, "scene")
    width, height = profile.size or canvas(rng, profile)
    pairs = _pairs(rng, profile, split)
    free = profile.any_colour > 0 and rng.random() < profile.any_colour
    if free:
        fills = [any_fill(rng, shape, profile.striped) for shape, _ in pairs]
        pairs = [
            (shape, nearest_colour(mean(fill)))
            for (shape, _), fill in zip(pairs, fills, strict=True)
        ]
    else:
        fills = [[named_rgb(rng, colour)] for _, colour in pairs]
    shapeless = not free and profile.any_shape > 0 and rng.random() < profile.any_shape
    if shapeless:
        pairs = [(UNNAMED, colour) for _, colour in pairs]
    sign_word = None
    if rng.random() < profile.sign_probability:
        held = split == "held_out" and rng.random() < 0.5
        sign_word = rng.choice(HELD_OUT_WORDS if held else WORDS)
    attempt = 0
    while True:
        sign = None if sign_word is None else _sign(rng, sign_word, width, height)
        circles = _place(rng, profile, [s for s, _ in pairs], width, height, sign, attempt)
        if circles is not None:
            break
        attempt += 1
    things = tuple(
        Thing(
            shape=shape,
            colour=colour,
            rgb=fill[0],
            cx=cx,
            cy=cy,
            r=r,
            angle=angle,
            edge=rng.uniform(0.06, 0.12) if rng.random() < 0.2 else 0.0,
            second=fill[1] if fill[1:] else None,
            stripes=(rng.randint(2, 7), rng.uniform(0, 180)) if fill[1:] else (2, 0.0),
            outline=blob(rng, colour) if shapeless else None,
        )
        for (shape, colour), fill, (cx, cy, r, angle) in zip(pairs, fills, circles, strict=True)
    )
    return Scene(
        width=width,
        height=height,
        things=things,
        sign=sign,
        ground=_ground(rng, profile, [rgb for fill in fills for rgb in fill]),
        split=split,
        shapes=() if shapeless else profile.shapes,
        colours=() if free else profile.colours,
    )


def _log_uniform(rng: Random, low: float, high: float) -> float:
    ratio: float = (high / low) ** rng.random()
    return low * ratio


def canvas(rng: Random, profile: Profile) -> tuple[int, int]:
    """Width and height drawn as the profile says."""
    low, high = profile.canvas
    first = round(_log_uniform(rng, low, high))
    near = max(low, math.ceil(first / profile.max_aspect))
    far = min(high, math.floor(first * profile.max_aspect))
    second = round(_log_uniform(rng, near, max(near, far)))
    return (first, second) if rng.random() < 0.5 else (second, first)


def _pairs(rng: Random, profile: Profile, split: Split) -> list[Pair]:
    """Draw the pairs so that shapes and colours repeat, which makes counting meaningful.

    Each further thing takes, by chance, the shape or the colour of the first; its other half is
    uniform over what is allowed. That leaves every pair equally likely at every place.
    """
    trained = allowed_pairs(profile.shapes, "train", profile.colours)
    every = allowed_pairs(profile.shapes, "held_out", profile.colours)
    unseen = [p for p in every if p in HELD_OUT_PAIRS]
    number = rng.randint(*profile.things)
    with_unseen = split == "held_out" and bool(unseen) and rng.random() < 0.5
    if not trained:
        trained = tuple(unseen)
    while True:
        pool = [*trained, *unseen] if with_unseen else list(trained)
        same_shape, same_colour = rng.choice(
            ((0.9, 0.0), (0.7, 0.0), (0.0, 0.9), (0.0, 0.7), (0.35, 0.35), (0.45, 0.45), (0.1, 0.1))
        )
        pairs = [rng.choice(pool)]
        while len(pairs) < number:
            u, (shape, colour) = rng.random(), pairs[0]
            if u < same_shape:
                pairs.append(rng.choice([p for p in pool if p[0] == shape]))
            elif u < same_shape + same_colour:
                pairs.append(rng.choice([p for p in pool if p[1] == colour]))
            else:
                pairs.append(rng.choice(pool))
        rng.shuffle(pairs)
        if not with_unseen or any(p in HELD_OUT_PAIRS for p in pairs):
            return pairs


def _place(
    rng: Random,
    profile: Profile,
    shapes: list[str],
    width: int,
    height: int,
    sign: Sign | None,
    attempt: int,
) -> list[tuple[float, float, float, float]] | None:
    """Sizes, then places from the largest on; None when no place was found for some thing."""
    short = min(width, height)
    gap = max(2.0, 0.02 * short)
    found: list[tuple[float, float, float, float] | None] = [None] * len(shapes)
    top = 1.0 if len(shapes) < 3 else 0.9
    sizes = []
    for _ in shapes:
        if rng.random() < profile.small_probability:
            share = _log_uniform(rng, SMALLEST, CORE_SMALLEST)
        else:
            share = CORE_SMALLEST * (LARGEST / CORE_SMALLEST) ** (
                rng.random() * top * 0.93 ** min(attempt, 60)
            )
        sizes.append(share * short / 2)
    for i in sorted(range(len(shapes)), key=lambda k: -sizes[k]):
        r, reach = sizes[i], sizes[i] * REACH[shapes[i]]
        limit = 10.0 if shapes[i] == "diamond" else 15.0
        for _ in range(20):
            angle = rng.uniform(-limit, limit)
            x = rng.uniform(reach + 1, width - reach - 1)
            y = rng.uniform(reach + 1, height - reach - 1)
            apart = all(
                math.hypot(x - other[0], y - other[1]) >= reach + other[2] * REACH[shape] + gap
                for other, shape in zip(found, shapes, strict=True)
                if other is not None
            )
            if apart and (sign is None or _to_box(x, y, sign.box) >= reach + gap):
                found[i] = (x, y, r, angle)
                break
        else:
            return None
    return [circle for circle in found if circle is not None]


def _to_box(x: float, y: float, box: tuple[int, int, int, int]) -> float:
    left, top, right, bottom = box
    return math.hypot(max(left - x, 0.0, x - right), max(top - y, 0.0, y - bottom))


def _sign(rng: Random, word: str, width: int, height: int) -> Sign:
    size = max(14, round(rng.uniform(0.11, 0.2) * min(width, height)))
    wide, high = sign_extent(word, size)
    while wide > 0.9 * width and size > 10:
        size -= 1
        wide, high = sign_extent(word, size)
    left = rng.randint(1, max(1, width - wide - 1))
    top = rng.randint(1, max(1, height - high - 1))
    plate, ink = rng.choice(
        (
            ((255, 255, 255), (20, 20, 20)),
            ((250, 246, 225), (60, 35, 15)),
            ((235, 240, 248), (15, 30, 80)),
            ((225, 228, 225), (10, 60, 35)),
        )
    )
    box = (left, top, min(left + wide, width), min(top + high, height))
    return Sign(word=word, box=box, size=size, plate=plate, ink=ink)


def _ground(rng: Random, profile: Profile, rgbs: list[Rgb]) -> Ground:
    """Draw grounds until every thing stands out from every tone; the last resort is near white.

    Where even that hides a thing (a white one), mid tones and near black are tried.
    """
    kind = rng.choice(profile.grounds)
    seed = rng.getrandbits(63)
    for _ in range(24):
        u = rng.random()
        low, high = (200, 255) if u < 0.6 else (105, 195) if u < 0.8 else (5, 85)
        grey = rng.uniform(low, high)
        tint = 0.0 if rng.random() < 0.3 else 22.0
        one = _tone([grey + rng.uniform(-tint, tint) for _ in range(3)])
        ground = _with_span(rng, kind, one, seed)
        if _stands_out(ground, rgbs):
            return ground
    for tone in (_NEAR_WHITE, (75, 78, 82), (196, 198, 200), (12, 14, 18)):
        ground = _with_span(rng, kind, tone, seed)
        if _stands_out(ground, rgbs):
            return ground
    return _with_span(rng, "plain", _NEAR_WHITE, seed)


def _with_span(rng: Random, kind: str, one: Rgb, seed: int) -> Ground:
    """The other end of the tones: far for a gradient, near for a texture, none for plain."""
    if kind == "plain":
        return Ground(kind=kind, low=one, high=one, seed=seed)
    span = rng.uniform(15, 45) if kind == "gradient" else rng.uniform(8, 30)
    sign = 1 if sum(one) < 384 else -1
    other = _tone([value + sign * span * rng.uniform(0.75, 1.0) for value in one])
    return Ground(kind=kind, low=one, high=other, seed=seed)


def _tone(channels: list[float]) -> Rgb:
    red, green, blue = (min(255, max(0, round(value))) for value in channels)
    return red, green, blue


def _stands_out(ground: Ground, rgbs: list[Rgb]) -> bool:
    return all(visibly_different(tone, rgb) for tone in ground.tones() for rgb in rgbs)
