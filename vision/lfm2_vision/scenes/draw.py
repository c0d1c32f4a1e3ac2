"""Draws a scene, and the map of which pixel belongs to which thing, from the same geometry.

Knows nothing of how scenes are chosen, nor of questions.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFont

from .world import Ground, Scene, Sign, Thing

__all__ = ["SIGN_LABEL", "label_map", "render", "sign_extent"]

SIGN_LABEL = 255
"""Value of the sign's pixels in a label map."""


def render(scene: Scene) -> Image.Image:
    """Draw a scene: antialiased, mode RGB, a pure function of the scene."""
    image = _ground(scene.ground, scene.width, scene.height)
    for thing in scene.things:
        if thing.edge:
            dark = (thing.rgb[0] * 3 // 5, thing.rgb[1] * 3 // 5, thing.rgb[2] * 3 // 5)
            mask, at = _coverage(thing)
            image.paste(dark, _at(at, mask), mask)
            mask, at = _coverage(thing, 1.0 - thing.edge)
        else:
            mask, at = _coverage(thing)
        image.paste(thing.rgb, _at(at, mask), mask)
        if thing.second is not None:
            striped = ImageChops.multiply(mask, _bands(thing, at, mask))
            image.paste(thing.second, _at(at, mask), striped)
    if scene.sign is not None:
        _draw_sign(image, scene.sign)
    return image


def label_map(scene: Scene) -> NDArray[np.uint8]:
    """Name the owner of each pixel.

    Returns:
        uint8 [height, width]: 0 ground, i + 1 for things[i] where it covers at least half of the
        pixel, `SIGN_LABEL` for the sign.
    """
    labels = Image.new("L", (scene.width, scene.height), 0)
    for i, thing in enumerate(scene.things):
        mask, at = _coverage(thing)
        labels.paste(i + 1, _at(at, mask), mask.point([0] * 128 + [255] * 128))
    if scene.sign is not None:
        labels.paste(SIGN_LABEL, scene.sign.box)
    return np.array(labels, dtype=np.uint8)


def sign_extent(word: str, size: int) -> tuple[int, int]:
    """Width and height in pixels of the plate that a word needs at a font size."""
    left, _, right, _ = _font(size).getbbox(word)
    return math.ceil(right - left) + max(6, size * 3 // 4), round(1.45 * size)


def _at(at: tuple[int, int], mask: Image.Image) -> tuple[int, int, int, int]:
    return at[0], at[1], at[0] + mask.width, at[1] + mask.height


def _coverage(thing: Thing, scale: float = 1.0) -> tuple[Image.Image, tuple[int, int]]:
    """Share of each pixel that a thing covers, as an L crop, and the crop's corner."""
    corners = thing.corners(scale)
    xs, ys = zip(*corners, strict=True)
    left, top = math.floor(min(xs)), math.floor(min(ys))
    wide, high = math.ceil(max(xs)) - left, math.ceil(max(ys)) - top
    fine = 4 if thing.r < 48 else 3 if thing.r < 96 else 2
    mask = Image.new("L", (wide * fine, high * fine), 0)
    points = [((x - left) * fine - 0.5, (y - top) * fine - 0.5) for x, y in corners]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask.reduce(fine), (left, top)


def _bands(thing: Thing, at: tuple[int, int], mask: Image.Image) -> Image.Image:
    """255 in every second stripe across a thing, as an L crop of the mask's place and size."""
    number, direction = thing.stripes
    turn = math.radians(direction)
    x = np.arange(mask.width, dtype=np.float32) + (at[0] - thing.cx)
    y = np.arange(mask.height, dtype=np.float32)[:, None] + (at[1] - thing.cy)
    along = (math.cos(turn) * x + math.sin(turn) * y) / (2 * thing.r) + 0.5
    return Image.fromarray(np.where(np.floor(along * number) % 2 == 1, 255, 0).astype(np.uint8))


def _ground(ground: Ground, width: int, height: int) -> Image.Image:
    """Tones t in 0..255 by kind, then each channel is looked up between low and high."""
    if ground.kind == "plain":
        return Image.new("RGB", (width, height), ground.low)
    rng = np.random.Generator(np.random.PCG64(ground.seed))
    if ground.kind == "speckle":
        tones = [_noise(rng, width, height, 1) for _ in range(3)]
    elif ground.kind == "noise":
        tones = [_noise(rng, width, height, 1 + int(4 * rng.random()))] * 3
    else:
        tones = [Image.fromarray(_pattern(ground.kind, rng, width, height))] * 3
    bands = [
        tone.point([round(low + (high - low) * t / 255) for t in range(256)])
        for tone, low, high in zip(tones, ground.low, ground.high, strict=True)
    ]
    return Image.merge("RGB", bands)


def _noise(rng: np.random.Generator, width: int, height: int, grain: int) -> Image.Image:
    wide, high = -(-width // grain), -(-height // grain)
    values = np.frombuffer(rng.bytes(wide * high), dtype=np.uint8).reshape(high, wide)
    image = Image.fromarray(values)
    return image if grain == 1 else image.resize((width, height), Image.Resampling.BILINEAR)


def _pattern(kind: str, rng: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    turn, period, phase = 2 * math.pi * rng.random(), 6 + 26 * rng.random(), rng.random()
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    if kind == "gradient":
        ramp = math.cos(turn) * (x / width) + math.sin(turn) * (y / height)
        low, high = float(ramp.min()), float(ramp.max())
        wave = (ramp - low) / max(high - low, 1e-6)
    elif kind == "stripes":
        along = (math.cos(turn) * x + math.sin(turn) * y) / period + phase
        wave = 0.5 + 0.5 * np.sin(2 * math.pi * along)
    else:
        wave = (np.floor(x / period + phase) + np.floor(y / period + phase)) % 2
    return np.asarray(255 * wave, dtype=np.uint8)


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _draw_sign(image: Image.Image, sign: Sign) -> None:
    left, top, right, bottom = sign.box
    draw = ImageDraw.Draw(image)
    rim = max(1, sign.size // 12)
    draw.rectangle((left, top, right - 1, bottom - 1), fill=sign.plate, outline=sign.ink, width=rim)
    middle = ((left + right) / 2, (top + bottom) / 2)
    draw.text(middle, sign.word, fill=sign.ink, font=_font(sign.size), anchor="mm")
