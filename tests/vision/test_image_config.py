"""lfm2_vision.image_config: merging a checkpoint's files, budgets, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lfm2_mm.errors import CheckpointError, SettingError
from lfm2_vision.image_config import ImageConfig


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_defaults_are_those_of_the_reference_class() -> None:
    assert ImageConfig.from_files({}) == ImageConfig()
    assert ImageConfig().to_dict() == {
        "image_processor_type": "Lfm2VlImageProcessor",
        "do_resize": True,
        "encoder_patch_size": 16,
        "downsample_factor": 2,
        "do_image_splitting": True,
        "min_tiles": 2,
        "max_tiles": 10,
        "tile_size": 512,
        "use_thumbnail": True,
        "min_image_tokens": 64,
        "max_image_tokens": 256,
        "max_pixels_tolerance": 2.0,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def test_two_files_are_merged(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        processor_config={
            "processor_class": "Lfm2VlProcessor",
            "max_tiles": 3,
            "min_tiles": 1,
            "image_processor": {"resample": 3, "use_thumbnail": False, "do_resize": False},
        },
        preprocessor_config={"resample": 2, "max_tiles": 4, "max_pixels_tolerance": 1.5},
        config={"model_type": "lfm2_vl", "vision_config": {"patch_size": 16}},
    )
    assert ImageConfig.from_files(folder) == ImageConfig(
        resample="bicubic",
        use_thumbnail=False,
        max_tiles=4,
        min_tiles=1,
        max_pixels_tolerance=1.5,
    )


def test_either_file_may_be_absent(tmp_path: Path) -> None:
    write(tmp_path, preprocessor_config={"max_image_tokens": 128, "size": {"height": 1}})
    assert ImageConfig.from_files(tmp_path) == ImageConfig(max_image_tokens=128)
    (tmp_path / "preprocessor_config.json").unlink()
    write(tmp_path, config={"max_image_tokens": 100, "vision_config": {"patch_size": 8}})
    assert ImageConfig.from_files(tmp_path) == ImageConfig(max_image_tokens=100, patch_size=8)


def test_model_config_fills_only_what_it_must(tmp_path: Path) -> None:
    model = {"max_tiles": 3, "downsample_factor": 4, "vision_config": {"patch_size": 8}}
    assert ImageConfig.from_files({"resample": "bicubic"}, model) == ImageConfig(
        patch_size=8, downsample_factor=4, resample="bicubic"
    )
    with pytest.raises(CheckpointError) as caught:
        ImageConfig.from_files({}, model, preprocessor={"encoder_patch_size": 16})
    assert str(caught.value) == (
        "the processor config say encoder_patch_size is 16 but config.json says 8; "
        "the files belong to different checkpoints, so download it again"
    )


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    config = ImageConfig(
        patch_size=8,
        tile_size=128,
        max_tiles=6,
        resample="bicubic",
        image_mean=(0.1, 0.2, 0.3),
        do_image_splitting=False,
    )
    text = json.loads(json.dumps(config.to_dict()))
    assert ImageConfig.from_files({}, preprocessor=text) == config
    folder = write(tmp_path, processor_config={"image_processor": text})
    assert ImageConfig.from_files(folder) == config


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"resample": 1}, "resample is 1; only 2 (bilinear) and 3 (bicubic) are supported"),
        ({"tile_size": 500}, "tile_size is 500; it must be a multiple of patch_size times"),
        ({"tile_size": "512"}, "tile_size is '512'; it must be an integer of at least 1"),
        ({"min_tiles": 5, "max_tiles": 4}, "min_tiles is 5 and max_tiles is 4; the first must"),
        ({"min_image_tokens": 0}, "min_image_tokens is 0; it must be an integer of at least 1"),
        ({"image_mean": [0.5]}, "image_mean is [0.5]; it must hold one value per RGB channel"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is (0.5, 0.0, 0.5); each value must be above 0"),
        ({"use_thumbnail": "no"}, "use_thumbnail is 'no'; it must be true or false"),
        ({"rescale_factor": 0}, "rescale_factor is 0.0; it must be above 0"),
        ({"max_pixels_tolerance": "much"}, "could not convert string to float"),
    ],
)
def test_unusable_values_name_the_file(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ImageConfig.from_files({"image_processor": settings})
    assert str(caught.value).startswith("the processor config cannot be used: ")
    assert text in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json' cannot be read as JSON"):
        ImageConfig.from_files(tmp_path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object; download the checkpoint"):
        ImageConfig.from_files(tmp_path)


def test_budgets() -> None:
    config = ImageConfig()
    assert config.with_budget() == config
    assert config.with_budget(max_image_tokens=32) == ImageConfig(
        min_image_tokens=32, max_image_tokens=32
    )
    off = config.with_budget(max_tiles=1)
    assert not off.tiles and off.max_image_tokens == 256
    assert off.with_budget(max_tiles=4).tiles
    assert config.with_budget(max_tiles=2).min_tiles == 2


@pytest.mark.parametrize("value", [0, -3, 11, True])
def test_bad_tile_budget(value: Any) -> None:
    with pytest.raises(SettingError) as caught:
        ImageConfig().with_budget(max_tiles=value)
    assert str(caught.value) == f"max_tiles is {value!r}; it must be an integer from 1 to 10"


def test_bad_token_budget() -> None:
    with pytest.raises(SettingError, match="max_image_tokens is 5000; it must be an integer from"):
        ImageConfig().with_budget(max_image_tokens=5000)
