"""lfm2_vision.tiling and lfm2_vision.prompt_text: sizes, grids and counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm2_vision.image_config import ImageConfig
from lfm2_vision.prompt_text import ImageTokens, placeholder_text
from lfm2_vision.tiling import plan

OFFICIAL = ImageConfig()
NANO = ImageConfig(patch_size=8, tile_size=128)


@pytest.mark.parametrize(
    ("size", "views", "tokens", "block"),
    [
        ((32, 32), 1, 64, 66),
        ((224, 224), 1, 64, 66),
        ((256, 384), 1, 96, 98),
        ((64, 2000), 1, 124, 126),
        ((4000, 100), 1, 202, 204),
        ((640, 480), 1, 234, 236),
        ((800, 600), 1, 234, 236),
        ((512, 512), 1, 256, 258),
        ((720, 720), 1, 256, 258),
        ((736, 736), 5, 1280, 1287),
        ((1024, 1024), 5, 1280, 1287),
        ((1000, 3000), 4, 1011, 1017),
        ((1920, 1080), 9, 2300, 2311),
        ((3024, 4032), 7, 1770, 1779),
    ],
)
def test_counts_of_the_reference(
    size: tuple[int, int], views: int, tokens: int, block: int
) -> None:
    layout = plan(*size, OFFICIAL)
    text = placeholder_text(layout, ImageTokens())
    assert (layout.n_views, layout.n_tokens, text.count("<")) == (views, tokens, block)
    assert text.count("<image>") == tokens


def test_a_tiled_image_in_full() -> None:
    layout = plan(1000, 3000, OFFICIAL)
    assert (layout.canvas, layout.rows, layout.cols) == ((512, 1536), 3, 1)
    assert [(view.kind, view.row, view.col, view.box) for view in layout.views] == [
        ("tile", 1, 1, (0, 0, 512, 512)),
        ("tile", 2, 1, (0, 512, 512, 1024)),
        ("tile", 3, 1, (0, 1024, 512, 1536)),
        ("thumbnail", 0, 0, (0, 0, 288, 864)),
    ]
    assert layout.thumbnail is layout.views[-1]
    assert layout.to_dict() == {
        "size": [1000, 3000],
        "resized": [512, 1536],
        "tiles": [1, 3],
        "thumbnail": [288, 864],
        "views": 4,
        "tokens": 1011,
    }
    tile = "<image>" * 256
    assert placeholder_text(layout, ImageTokens()) == (
        f"<|image_start|><|img_row_1_col_1|>{tile}<|img_row_2_col_1|>{tile}"
        f"<|img_row_3_col_1|>{tile}<|img_thumbnail|>{'<image>' * 243}<|image_end|>"
    )
    assert placeholder_text(layout, ImageTokens(markers=False)) == "<image>" * 1011


def test_tiles_run_row_by_row() -> None:
    places = [(view.row, view.col) for view in plan(1920, 1080, OFFICIAL).views]
    assert places == [(r, c) for r in (1, 2) for c in (1, 2, 3, 4)] + [(0, 0)]


def test_one_view_and_no_thumbnail() -> None:
    layout = plan(640, 480, OFFICIAL)
    assert layout.canvas == (576, 416) and not layout.tiled and layout.thumbnail is None
    assert (layout.views[0].patch_cols, layout.views[0].patch_rows) == (36, 26)
    assert layout.n_patches == 36 * 26 and layout.to_dict()["tiles"] is None


def test_rounding_goes_to_the_even_neighbour() -> None:
    assert plan(48 * 8, 80 * 8, OFFICIAL).canvas == (384, 640)
    assert plan(272, 336, OFFICIAL).canvas == (256, 320)  # 8.5 and 10.5 tokens
    assert plan(304, 368, OFFICIAL).canvas == (320, 384)  # 9.5 and 11.5 tokens


def test_equally_near_grids() -> None:
    """5:4 lies midway between 1x2 and 2x1; the reference's order of candidates decides."""
    few = OFFICIAL.with_budget(max_tiles=2)
    assert (plan(1280, 1024, few).cols, plan(1280, 1024, few).rows) == (2, 1)
    one = replace(OFFICIAL, min_tiles=1, max_tiles=4, max_pixels_tolerance=1.5)
    assert plan(704, 704, one).views[0].box == (0, 0, 512, 512)  # 1x1; 2x2 would be half empty
    assert plan(704, 704, one).n_views == 1 and plan(704, 704, one).n_tokens == 256
    assert plan(736, 736, one).n_views == 5


def test_switches() -> None:
    assert plan(1024, 1024, replace(OFFICIAL, use_thumbnail=False)).n_views == 4
    for off in (
        replace(OFFICIAL, do_image_splitting=False),
        replace(OFFICIAL, min_tiles=1, max_tiles=1),
        OFFICIAL.with_budget(max_tiles=1),
    ):
        assert plan(3000, 3000, off).canvas == (512, 512)
    assert plan(3000, 3000, OFFICIAL.with_budget(max_tiles=1, max_image_tokens=64)).n_tokens == 64


def test_nothing_assumes_the_official_sizes() -> None:
    assert plan(300, 210, NANO).canvas == (304, 208)
    layout = plan(600, 420, NANO)
    assert layout.canvas == (384, 256) and (layout.cols, layout.rows) == (3, 2)
    assert layout.views[0].n_tokens == 64 and layout.views[0].n_patches == 256


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([OFFICIAL, NANO, OFFICIAL.with_budget(max_image_tokens=100, max_tiles=5)]),
)
def test_every_plan_is_whole_tokens_and_covers_its_canvas(
    width: int, height: int, config: ImageConfig
) -> None:
    layout = plan(width, height, config)
    unit = config.token_side
    for view in layout.views:
        assert view.width % unit == 0 and view.height % unit == 0
        assert view.n_tokens * config.downsample_factor**2 == view.n_patches
        assert view.n_tokens * unit**2 == view.width * view.height
    seen = sum(v.width * v.height for v in layout.views if v.kind != "thumbnail")
    assert seen == layout.canvas[0] * layout.canvas[1]
    assert layout.rows * layout.cols <= config.max_tiles
    assert placeholder_text(layout, ImageTokens()).count("<image>") == layout.n_tokens


def test_no_size_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1 pixel, not 0x3"):
        plan(0, 3, OFFICIAL)


def test_token_names_come_from_the_checkpoint() -> None:
    assert ImageTokens.from_files({}) == ImageTokens()
    named = {
        "image_token": {"content": "<img>", "lstrip": False},
        "extra_special_tokens": {"image_start_token": "<s>", "image_token": "<other>"},
        "image_end_token": "</s>",
        "image_thumbnail_token": None,
    }
    tokens = ImageTokens.from_files(named, {"use_image_special_tokens": False})
    assert tokens == ImageTokens(image="<img>", start="<s>", end="</s>", markers=False)
    assert ImageTokens.from_files({"extra_special_tokens": ["<x>"]}) == ImageTokens()
    special = ImageTokens().special()
    assert len(special) == 104 and special[-1] == "<|img_row_10_col_10|>"
