"""The arithmetic of LFM2-VL's views: how an image of some size is resized, tiled and counted.

Integers in, integers out, as transformers 5.23 computes them (models/lfm2_vl/
image_processing_lfm2_vl.py). It knows neither pixels nor tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from lfm2_vision.image_config import ImageConfig

__all__ = ["Plan", "View", "plan"]


@dataclass(frozen=True, slots=True)
class View:
    """One rectangle that the encoder sees.

    Attributes:
        kind: The whole image alone, a tile of it, or the whole image beside its tiles.
        row: Row of the tile from 1, else 0.
        col: Column of the tile from 1, else 0.
        box: (left, top, right, bottom) in pixels of the resized image it is cut from: the plan's
            canvas, or for a thumbnail its own size.
        patch_rows: Patches from top to bottom.
        patch_cols: Patches from left to right.
        n_tokens: Positions its features fill.
    """

    kind: Literal["single", "tile", "thumbnail"]
    row: int
    col: int
    box: tuple[int, int, int, int]
    patch_rows: int
    patch_cols: int
    n_tokens: int

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return self.box[2] - self.box[0]

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return self.box[3] - self.box[1]

    @property
    def n_patches(self) -> int:
        """Patches in all."""
        return self.patch_rows * self.patch_cols


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one image.

    Attributes:
        width: Pixels of the image as given.
        height: Pixels of the image as given.
        canvas: (width, height) that the image is stretched to before the tiles are cut, or that
            of the single view.
        rows: Rows of the grid; 1 without tiling.
        cols: Columns of the grid; 1 without tiling.
        views: In the order of their features: tiles row by row, then the thumbnail.
    """

    width: int
    height: int
    canvas: tuple[int, int]
    rows: int
    cols: int
    views: tuple[View, ...]

    @property
    def n_views(self) -> int:
        """Views in all."""
        return len(self.views)

    @property
    def n_tokens(self) -> int:
        """Positions that the features of all views fill."""
        return sum(view.n_tokens for view in self.views)

    @property
    def n_patches(self) -> int:
        """Patches of all views."""
        return sum(view.n_patches for view in self.views)

    @property
    def tiled(self) -> bool:
        """Whether the image is cut into more than one tile."""
        return self.rows * self.cols > 1

    @property
    def thumbnail(self) -> View | None:
        """The view of the whole image that follows the tiles, if any."""
        last = self.views[-1]
        return last if last.kind == "thumbnail" else None

    def to_dict(self) -> dict[str, Any]:
        """What a user may want to see, as plain JSON values."""
        thumb = self.thumbnail
        return {
            "size": [self.width, self.height],
            "resized": list(self.canvas),
            "tiles": [self.cols, self.rows] if self.tiled else None,
            "thumbnail": [thumb.width, thumb.height] if thumb else None,
            "views": self.n_views,
            "tokens": self.n_tokens,
        }


def plan(width: int, height: int, config: ImageConfig) -> Plan:
    """How an image of this size is seen.

    An image whose area, sides rounded to whole tokens, is over `max_pixels_tolerance` times that
    of `max_image_tokens` is stretched to the grid of tiles nearest its aspect ratio; any other is
    one view. Nothing is padded.

    Args:
        width: Pixels of the upright image, at least 1.
        height: Pixels of the upright image, at least 1.
        config: The checkpoint's values.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image has sides of at least 1 pixel, not {width}x{height}")
    fit = _fit(width, height, config)
    if not (config.tiles and _is_large(width, height, config)):
        view = _view("single", 0, 0, (0, 0, *fit), config)
        return Plan(width, height, fit, 1, 1, (view,))
    cols, rows = _grid(width, height, config)
    side = config.tile_size
    views = [
        _view("tile", r + 1, c + 1, (c * side, r * side, (c + 1) * side, (r + 1) * side), config)
        for r in range(rows)
        for c in range(cols)
    ]
    if rows * cols == 1:  # only where min_tiles is 1: one stretched tile, and no thumbnail
        views = [_view("single", 0, 0, views[0].box, config)]
    elif config.use_thumbnail:
        views.append(_view("thumbnail", 0, 0, (0, 0, *fit), config))
    return Plan(width, height, (cols * side, rows * side), rows, cols, tuple(views))


def _view(
    kind: Literal["single", "tile", "thumbnail"],
    row: int,
    col: int,
    box: tuple[int, int, int, int],
    config: ImageConfig,
) -> View:
    patch_rows = (box[3] - box[1]) // config.patch_size
    patch_cols = (box[2] - box[0]) // config.patch_size
    factor = config.downsample_factor
    n_tokens = (patch_rows // factor) * (patch_cols // factor)  # every view is whole tokens
    return View(kind, row, col, box, patch_rows, patch_cols, n_tokens)


def _fit(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """Size of the single view or thumbnail: whole tokens, between the two token limits."""
    unit = config.token_side
    least, most = config.min_image_tokens * unit**2, config.max_image_tokens * unit**2
    near = [max(unit, _round(side, unit)) for side in (width, height)]
    area = near[0] * near[1]
    if area > most:
        shrink = math.sqrt((height * width) / most)
        near = [max(unit, math.floor(n / shrink / unit) * unit) for n in (width, height)]
    elif area < least:
        enlarge = math.sqrt(least / (height * width))
        near = [math.ceil(n * enlarge / unit) * unit for n in (width, height)]
    return near[0], near[1]


def _is_large(width: int, height: int, config: ImageConfig) -> bool:
    unit, least = config.token_side, config.patch_size
    area = max(least, _round(width, unit)) * max(least, _round(height, unit))
    return area > config.max_image_tokens * unit**2 * config.max_pixels_tolerance


def _grid(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """Columns and rows of the grid nearest in aspect ratio.

    Of equally near grids the last whose area is under twice the image's is taken.
    """
    best, best_gap = (1, 1), math.inf
    for cols, rows in _grids(config.min_tiles, config.max_tiles):
        gap = abs(width / height - cols / rows)
        filled = width * height > 0.5 * (config.tile_size**2 * cols * rows)
        if gap < best_gap or (gap == best_gap and filled):
            best, best_gap = (cols, rows), gap
    return best


@lru_cache(maxsize=32)
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """All grids with `least` to `most` tiles, fewest tiles first.

    Two grids of equally many tiles can be equally near (an image of 5:4 between 1x2 and 2x1), and
    then their order decides. The reference takes it from iterating over a set; so does this, and
    fills the set in the same order, for only that gives the same answer.
    """
    shapes = {
        (cols, rows)
        for bound in range(least, most + 1)
        for cols in range(1, bound + 1)
        for rows in range(1, bound + 1)
        if least <= cols * rows <= most
    }
    return tuple(sorted(shapes, key=lambda shape: shape[0] * shape[1]))


def _round(side: int, unit: int) -> int:
    """The nearest multiple; halves go to the even neighbour, as Python's `round` does."""
    return round(side / unit) * unit
