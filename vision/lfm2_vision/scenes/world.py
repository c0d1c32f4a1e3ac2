"""The vocabulary of the scene world: its shapes, colours, words, what is held out, and a scene.

Knows names and numbers only: neither how a scene is drawn, nor chosen, nor asked about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = [
    "ALL_COLOURS",
    "ALL_SHAPES",
    "ANCHORS",
    "COLOURS",
    "CORE_SHAPES",
    "EXTRA_COLOURS",
    "EXTRA_SHAPES",
    "GROUND_KINDS",
    "HELD_OUT_PAIRS",
    "HELD_OUT_WORDS",
    "JITTER",
    "MIN_CONTRAST",
    "OUTLINES",
    "REACH",
    "UNNAMED",
    "WORDS",
    "Ground",
    "Pair",
    "Rgb",
    "Scene",
    "Sign",
    "Split",
    "Thing",
    "allowed_pairs",
    "contrast",
    "nearest_colour",
    "ring",
    "visibly_different",
]

Rgb = tuple[int, int, int]
Pair = tuple[str, str]
"""(shape, colour)."""
Split = Literal["train", "held_out"]

CORE_SHAPES = ("circle", "square", "triangle", "star")
EXTRA_SHAPES = ("diamond", "hexagon", "cross", "heart")
ALL_SHAPES = CORE_SHAPES + EXTRA_SHAPES
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black")
EXTRA_COLOURS = ("pink", "brown", "grey", "white", "cyan")
"""Outside the core domain: no pair of theirs is held out, so that no colour rules a shape out."""
ALL_COLOURS = COLOURS + EXTRA_COLOURS

ANCHORS: Mapping[str, tuple[Rgb, ...]] = MappingProxyType(
    {
        "red": ((220, 40, 40), (255, 0, 0), (190, 20, 30)),
        "green": ((40, 165, 60), (0, 128, 0), (30, 205, 60)),
        "blue": ((50, 80, 220), (0, 0, 255), (25, 60, 175)),
        "yellow": ((240, 215, 40), (255, 255, 0), (250, 228, 65)),
        "orange": ((245, 135, 30), (255, 160, 0), (235, 118, 20)),
        "purple": ((150, 60, 180), (128, 0, 128), (115, 40, 165)),
        "black": ((30, 30, 30), (0, 0, 0), (42, 42, 42)),
        "pink": ((250, 150, 190), (255, 182, 193), (245, 120, 180)),
        "brown": ((130, 80, 40), (110, 65, 30), (150, 95, 55)),
        "grey": ((128, 128, 128), (105, 105, 105), (160, 160, 160)),
        "white": ((245, 245, 245), (255, 255, 255), (235, 235, 240)),
        "cyan": ((60, 205, 220), (0, 225, 235), (110, 215, 230)),
    }
)
"""Per colour: its base value first, then the other corners of the area its values come from."""
JITTER = 10
"""Levels by which each channel may leave the area between the anchors."""

HELD_OUT_PAIRS: frozenset[Pair] = frozenset(
    {
        ("circle", "orange"),
        ("circle", "blue"),
        ("square", "red"),
        ("square", "purple"),
        ("triangle", "green"),
        ("triangle", "black"),
        ("star", "yellow"),
        ("star", "blue"),
        ("diamond", "red"),
        ("hexagon", "green"),
        ("cross", "purple"),
        ("heart", "orange"),
    }
)
"""Fixed before any training: never drawn in the train split, nor asked about there."""

GROUND_KINDS = ("plain", "gradient", "noise", "speckle", "stripes", "checks")
MIN_CONTRAST = 60
"""Least contrast, in levels, between a thing and every tone of its ground."""

WORDS = tuple(
    (
        "AIR ANT APPLE ARM AXE BABY BAG BALL BANK BAR BATH BEACH BEAN BEAR BED BEE BELL BIKE BIRD "
        "BOAT BOOK BOX BOY BREAD BRIDGE BRUSH BUS CAFE CAKE CAMP CAR CARD CAT CAVE CHAIR CHALK "
        "CHEESE CITY CLOCK CLOUD COAT COFFEE COIN COW CUP DANCE DESK DOCTOR DOG DOLL DOOR DRESS "
        "DRUM DUCK EAGLE EAR EGG ENGINE EXIT EYE FACE FARM FIELD FIRE FISH FLAG FLOUR FLOWER FOOD "
        "FOOT FORK FOX FROG FRUIT GAME GATE GIFT GIRL GLASS GLOVE GOAT GOLD GRAPE GRASS GYM HAND "
        "HAT HILL HORSE HOTEL HOUSE ICE ISLAND JACKET JAM JAR JOB JUICE KEY KING KITE KNEE LAKE "
        "LAMP LEAF LEMON LETTER LION LOCK MAP MARKET METAL MILK MONEY MOON MOUSE MUSEUM NAIL "
        "NIGHT NOSE NUT OIL OX OVEN OWL PAPER PARK PEN PIANO PIG PLANE PLATE POLICE POND QUEEN "
        "QUIZ RABBIT RADIO RAIN RING RIVER ROAD ROOF ROPE SALT SCHOOL SEED SHIP SHOE SHOP SNOW "
        "SOAP SOUP SPOON STONE SUGAR SUN TABLE TAXI TEA TENT TOWER TRAIN TREE VAN VASE VIEW WALL "
        "WATER WAVE WHEEL WIND WOOD YARD ZOO"
    ).split()
)
HELD_OUT_WORDS = tuple(
    (
        "BUTTER CAMEL CHERRY COTTON DEER DESERT DRAGON FAMILY FENCE FOREST GARDEN GUITAR HEN "
        "HONEY JEWEL KNIFE LADDER MIRROR OCEAN PEAR POCKET RICE SHEEP STREET TIGER TOY VALLEY "
        "WINDOW WOLF ZEBRA"
    ).split()
)
"""Never written on a sign of the train split."""


def ring(angles: list[float], radii: list[float]) -> tuple[tuple[float, float], ...]:
    """Corners in these directions, clockwise from the top, at these distances."""
    return tuple((r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, radii, strict=True))


def _regular(corners: int, radius: float, turn: float = 0.0) -> tuple[tuple[float, float], ...]:
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return ring(angles, [radius] * corners)


def _heart() -> tuple[tuple[float, float], ...]:
    points = []
    for i in range(64):
        t = 2 * math.pi * i / 64
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16.0, -(y + 2.5) / 16.0))
    return tuple(points)


UNNAMED = "blob"
"""The shape of what has an outline of its own; no question names it."""
_CROSS = [(-0.36, -1.05), (0.36, -1.05), (0.36, -0.36), (1.05, -0.36), (1.05, 0.36), (0.36, 0.36)]
OUTLINES: Mapping[str, tuple[tuple[float, float], ...]] = MappingProxyType(
    {
        "circle": _regular(96, 1.0),
        "square": _regular(4, 0.84 * math.sqrt(2), math.pi / 4),
        "triangle": _regular(3, 1.2),
        "star": ring([math.pi * i / 5 for i in range(10)], [1.15, 0.53] * 5),
        "diamond": ((0.0, -1.18), (0.8, 0.0), (0.0, 1.18), (-0.8, 0.0)),
        "hexagon": _regular(6, 1.08),
        "cross": tuple(_CROSS + [(-x, -y) for x, y in _CROSS]),
        "heart": _heart(),
    }
)
"""Corners of each shape at r = 1, y downwards, clockwise from the top; areas are 1.8 to 3.2."""
REACH: Mapping[str, float] = MappingProxyType(
    {
        **{s: max(math.hypot(x, y) for x, y in points) for s, points in OUTLINES.items()},
        UNNAMED: 1.2,
    }
)
"""Distance from the centre to the farthest corner, in units of r."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One object: a shape in a colour, in canvas pixels (y downwards).

    Attributes:
        shape: One of `ALL_SHAPES`.
        colour: One of `ALL_COLOURS`.
        rgb: The fill; from the colour's area, or nearest to it in a scene without named colours.
        cx: Centre, from the left edge.
        cy: Centre, from the top edge.
        r: Half of the diameter.
        angle: Rotation in degrees, clockwise.
        edge: Width of a darker outline as a fraction of r; 0 for none.
        second: The other fill of a thing in stripes, whose colour has no name; None for one fill.
        stripes: How many stripes it has, and their direction in degrees.
        outline: Corners at r = 1, where the shape is `UNNAMED`.
    """

    shape: str
    colour: str
    rgb: Rgb
    cx: float
    cy: float
    r: float
    angle: float = 0.0
    edge: float = 0.0
    second: Rgb | None = None
    stripes: tuple[int, float] = (2, 0.0)
    outline: tuple[tuple[float, float], ...] | None = None

    @property
    def pair(self) -> Pair:
        """(shape, colour)."""
        return self.shape, self.colour

    def corners(self, scale: float = 1.0) -> list[tuple[float, float]]:
        """The outline in canvas pixels, shrunk or grown about the centre by `scale`."""
        turn = math.radians(self.angle)
        cos, sin, r = math.cos(turn), math.sin(turn), self.r * scale
        return [
            (self.cx + r * (x * cos - y * sin), self.cy + r * (x * sin + y * cos))
            for x, y in self.outline or OUTLINES[self.shape]
        ]

    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the outline in canvas pixels."""
        xs, ys = zip(*self.corners(), strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """A plate with one word in capitals.

    Attributes:
        word: As printed.
        box: Left, top, right (exclusive), bottom (exclusive) in whole pixels.
        size: Font size in pixels.
        plate: Colour of the plate.
        ink: Colour of the letters and of the rim.
    """

    word: str
    box: tuple[int, int, int, int]
    size: int
    plate: Rgb
    ink: Rgb


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """What lies behind the things: tones between two colours, placed by a kind and a seed.

    Attributes:
        kind: One of `GROUND_KINDS`.
        low: One end of the tones; the only tone of a plain ground.
        high: The other end.
        seed: Fixes every random choice of the texture.
    """

    kind: str
    low: Rgb
    high: Rgb
    seed: int = 0

    def tones(self) -> tuple[Rgb, Rgb, Rgb]:
        """Both ends and the mean."""
        middle = tuple((a + b) // 2 for a, b in zip(self.low, self.high, strict=True))
        return self.low, (middle[0], middle[1], middle[2]), self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture as data, enough to draw it and to answer every question about it.

    Attributes:
        width: Canvas width in pixels.
        height: Canvas height in pixels.
        things: The objects; label i + 1 of the label map is things[i].
        sign: At most one sign, which is not counted as an object.
        ground: What lies behind.
        split: The split it was made for; questions of a train scene avoid what is held out.
        shapes: The shapes that the questions may name; none if the outlines are of any shape.
        colours: The colours that the questions may name; none if the fills are of any colour.
    """

    width: int
    height: int
    things: tuple[Thing, ...]
    sign: Sign | None
    ground: Ground
    split: Split = "train"
    shapes: tuple[str, ...] = CORE_SHAPES
    colours: tuple[str, ...] = COLOURS

    @property
    def has_held_out_pair(self) -> bool:
        """Whether one of the things never occurs in training."""
        return any(thing.pair in HELD_OUT_PAIRS for thing in self.things)


def allowed_pairs(
    shapes: tuple[str, ...], split: Split, colours: tuple[str, ...] = COLOURS
) -> tuple[Pair, ...]:
    """The (shape, colour) pairs that a split may show and ask about, in a fixed order."""
    pairs = ((shape, colour) for shape in shapes for colour in colours)
    return tuple(p for p in pairs if split == "held_out" or p not in HELD_OUT_PAIRS)


def nearest_colour(rgb: Rgb) -> str:
    """The colour whose area lies nearest, by Euclidean distance."""
    return min(_AREAS, key=lambda name: min(_distance(rgb, point) for point in _AREAS[name]))


def _area(anchors: tuple[Rgb, ...], steps: int = 4) -> tuple[tuple[float, float, float], ...]:
    """Mixtures of three anchors, evenly spaced."""
    points = []
    for i in range(steps + 1):
        for j in range(steps + 1 - i):
            shares = (i / steps, j / steps, (steps - i - j) / steps)
            mixed = [
                sum(s * anchor[c] for s, anchor in zip(shares, anchors, strict=True))
                for c in range(3)
            ]
            points.append((mixed[0], mixed[1], mixed[2]))
    return tuple(points)


def _distance(a: Rgb, b: tuple[float, float, float]) -> float:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 + (a[2] - b[2]) ** 2


_AREAS = {name: _area(anchors) for name, anchors in ANCHORS.items()}


def contrast(a: Rgb, b: Rgb) -> int:
    """Largest difference of any channel, 0 to 255."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def visibly_different(a: Rgb, b: Rgb) -> bool:
    """Whether two colours differ by `MIN_CONTRAST` and also to the eye.

    To the eye means by 24 levels of luma or by 40 of chroma (BT.601 YCbCr), so that a lone step
    in the blue channel, which hardly shows, is not enough.
    """
    if contrast(a, b) < MIN_CONTRAST:
        return False
    red, green, blue = (x - y for x, y in zip(a, b, strict=True))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = math.hypot(0.564 * (blue - luma), 0.713 * (red - luma))
    return abs(luma) >= 24 or chroma >= 40
