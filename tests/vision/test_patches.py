"""lfm2_vision.patches, against digests of what transformers' own processor produced."""

from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lfm2_vision.image_config import ImageConfig
from lfm2_vision.patches import patchify, views
from lfm2_vision.tiling import plan

HERE = Path(__file__).parent
SHARED = runpy.run_path(str(HERE / "golden_images.py"))
GOLDEN: dict[str, dict[str, Any]] = json.loads((HERE / "golden_patches.json").read_text())


@pytest.mark.parametrize("name", list(SHARED["CASES"]))
def test_patches_are_bit_exact(name: str) -> None:
    width, height, changes = SHARED["CASES"][name]
    config = ImageConfig.from_files({"image_processor": changes})
    layout = plan(width, height, config)
    shapes = [[view.patch_rows, view.patch_cols] for view in layout.views]
    assert shapes == GOLDEN[name]["spatial_shapes"]
    rows = [patchify(v, config) for v in views(SHARED["picture"](width, height), layout, config)]
    digests = [hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest() for part in rows]
    assert digests == GOLDEN[name]["sha256"]


def test_golden_file_covers_every_case() -> None:
    assert list(GOLDEN) == list(SHARED["CASES"])
    assert sum(len(case["sha256"]) for case in GOLDEN.values()) >= 20


def test_a_patch_is_flattened_row_column_channel() -> None:
    config = ImageConfig(patch_size=2, downsample_factor=1, tile_size=2, do_normalize=False)
    view = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
    rows = patchify(view, config)
    assert rows.shape == (6, 12) and rows.dtype == torch.float32
    patch = view[:, 2:4, 4:6]  # second row of patches, third column
    wanted = patch.permute(1, 2, 0).reshape(-1).float() * config.rescale_factor
    assert torch.equal(rows[5], wanted)


def test_scaling_to_plus_minus_one() -> None:
    config = ImageConfig(patch_size=1, downsample_factor=1, tile_size=1)
    view = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 1, 1)
    assert patchify(view, config).tolist() == [[-1.0] * 3, [1.0] * 3]
    raw = ImageConfig(
        patch_size=1, downsample_factor=1, tile_size=1, do_rescale=False, do_normalize=False
    )
    assert patchify(view, raw).tolist() == [[0.0] * 3, [255.0] * 3]


def test_tiles_are_cut_from_the_canvas_and_the_thumbnail_is_the_whole() -> None:
    config = ImageConfig(patch_size=8, tile_size=128)
    image = Image.new("RGB", (256, 256), "red")
    image.paste("blue", (128, 0, 256, 128))
    layout = plan(256, 256, config.with_budget(max_image_tokens=64))
    first, second, third, fourth, whole = views(image, layout, config)
    assert first[:, 0, 0].tolist() == third[:, 9, 9].tolist() == [255, 0, 0]
    assert fourth.float().mean(dim=(1, 2)).tolist() == [255.0, 0.0, 0.0]
    assert second.float().mean(dim=(1, 2)).tolist() == [0.0, 0.0, 255.0]
    assert whole.shape == (3, 128, 128) and whole[:, 0, 127].tolist() == [0, 0, 255]


def test_plan_of_another_image_is_refused() -> None:
    config = ImageConfig()
    with pytest.raises(ValueError, match="RGB image of 64x64 pixels, not RGB of 32x64"):
        views(Image.new("RGB", (32, 64)), plan(64, 64, config), config)
    with pytest.raises(ValueError, match="not L of 64x64"):
        views(Image.new("L", (64, 64)), plan(64, 64, config), config)
