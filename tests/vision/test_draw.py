"""lfm2_vision.draw: the sheets show what the plan or the boxes say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lfm2_vision.draw import draw_boxes, draw_tiles
from lfm2_vision.grounding import Box
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.tiling import plan

CONFIG = ImageConfig(patch_size=8, tile_size=128)


def pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.asarray(image).astype(np.int64)


def test_grid_lines_lie_on_the_tile_borders() -> None:
    image = Image.new("RGB", (256, 256), (200, 40, 40))
    layout = plan(256, 256, CONFIG.with_budget(max_image_tokens=64))
    assert (layout.cols, layout.rows) == (2, 2)
    sheet = draw_tiles(image, layout)
    found = pixels(sheet)
    red = np.argwhere((found == (200, 40, 40)).all(axis=2))
    top, left = red.min(axis=0) - 3  # outlines of the tiles are three pixels wide
    scale = 640 / 256
    middle = left + round(128 * scale)
    low = top + round(100 * scale)  # below the labels
    assert (found[low, middle - 3 : middle + 3] != (200, 40, 40)).any(axis=1).all()
    assert found[low, middle - 20].tolist() == found[low, middle + 20].tolist() == [200, 40, 40]


def test_the_thumbnail_stands_beside_the_tiles() -> None:
    image = Image.new("RGB", (256, 256), (200, 40, 40))
    config = CONFIG.with_budget(max_image_tokens=64)
    with_it = draw_tiles(image, plan(256, 256, config))
    without = draw_tiles(image, plan(256, 256, replace(config, use_thumbnail=False)))
    assert with_it.width > without.width + 100
    red = [(pixels(sheet) == (200, 40, 40)).all(axis=2).sum() for sheet in (with_it, without)]
    assert red[0] - red[1] > 0.8 * (128 * 640 / 256) ** 2


@pytest.mark.parametrize("size", [(2, 2), (40, 700), (900, 20), (5000, 300), (1920, 1080)])
def test_sheets_of_any_shape_stay_within_reason(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 40, 40))
    sheet = draw_tiles(image, plan(*size, CONFIG))
    assert sheet.mode == "RGB" and image.size == size
    assert 100 < sheet.width < 2200 and 60 < sheet.height < 2200


def test_boxes_are_outlined_in_one_colour_per_label() -> None:
    image = Image.new("RGB", (400, 300), "white")
    boxes = [Box((100, 200, 400, 800), "a"), Box((600, 200, 900, 800), "b"), Box((0, 0, 50, 50))]
    sheet = draw_boxes(image, [*boxes, Box((450, 850, 550, 950), "a")])
    found = pixels(sheet)
    assert found[150, 40].tolist() == [0, 114, 178] == found[270, 180].tolist()
    assert found[150, 240].tolist() == [213, 94, 0]
    assert found[150, 100].tolist() == [255, 255, 255]
    assert sheet.size == (400, 300) and pixels(image).min() == 255


def test_boxes_out_of_range_and_without_extent_are_drawn_at_the_edge() -> None:
    image = Image.new("L", (50, 40), 255)
    sheet = draw_boxes(image, [Box((-200, -5, 2000, 3000), "big"), Box((1000, 1000, 1000, 1000))])
    assert sheet.size == (50, 40)
    assert pixels(sheet)[39, 25].tolist() == [0, 114, 178]
    assert pixels(sheet)[39, 49].tolist() == [213, 94, 0]


def test_labels_of_boxes_that_touch_do_not_cover_each_other() -> None:
    image = Image.new("RGB", (400, 300), "white")
    sheet = draw_boxes(image, [Box((100, 300, 600, 900), "one"), Box((100, 300, 500, 800), "two")])
    found = pixels(sheet)
    plates = [
        (found[:, :, :] == color).all(axis=2).sum() for color in ((0, 114, 178), (213, 94, 0))
    ]
    assert min(plates) > 500


def test_long_labels_are_cut() -> None:
    image = Image.new("RGB", (60, 60), "white")
    sheet = draw_boxes(image, [Box((100, 500, 900, 900), "a label\nthat has " + "no end " * 50)])
    assert sheet.size == (60, 60)
    assert (pixels(sheet)[:6] == 255).all()  # one line, above its box
