"""Proof that our image preprocessing equals `Lfm2VlImageProcessor`, bit for bit.

Runs in an environment of its own (`make test-interop`): transformers' processor needs torchvision,
which beside a CPU build of torch imports only once two operator schemas exist. `--write-golden`
rewrites tests/vision/golden_patches.json, which the default tests compare with.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "vision")]

import torch  # noqa: E402

_SCHEMAS = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from tokenizers import Tokenizer, models  # noqa: E402
from transformers import (  # noqa: E402
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    PreTrainedTokenizerFast,
)

from lfm2_vision.image_config import ImageConfig  # noqa: E402
from lfm2_vision.patches import patchify, views  # noqa: E402
from lfm2_vision.prompt_text import ImageTokens, placeholder_text  # noqa: E402
from lfm2_vision.tiling import plan  # noqa: E402

GOLDEN = ROOT / "tests" / "vision" / "golden_patches.json"
SHARED = runpy.run_path(str(ROOT / "tests" / "vision" / "golden_images.py"))
picture, CASES = SHARED["picture"], SHARED["CASES"]

# width, height -> views, image tokens, positions of the block with its markers
TABLE = {
    (32, 32): (1, 64, 66),
    (224, 224): (1, 64, 66),
    (256, 384): (1, 96, 98),
    (64, 2000): (1, 124, 126),
    (4000, 100): (1, 202, 204),
    (640, 480): (1, 234, 236),
    (800, 600): (1, 234, 236),
    (512, 512): (1, 256, 258),
    (720, 720): (1, 256, 258),
    (736, 736): (5, 1280, 1287),
    (1024, 1024): (5, 1280, 1287),
    (1000, 3000): (4, 1011, 1017),
    (1920, 1080): (9, 2300, 2311),
    (3024, 4032): (7, 1770, 1779),
}
EDGES = [(1, 1), (2, 2), (1, 50), (720, 736), (1536, 512), (1280, 1024), (16, 16), (48, 80)]
DRAW = random.Random(0)
SIZES = [*TABLE, *EDGES]
SIZES += [(DRAW.randint(8, 1400), DRAW.randint(8, 1400)) for _ in range(50 - len(SIZES))]
FEW = [(1280, 1024), (1024, 1280), (1100, 620), (300, 200), (40, 700), (1024, 1024), (736, 736)]
NANO = {"encoder_patch_size": 8, "tile_size": 128}
VARIANTS: list[dict[str, object]] = [
    *({"max_tiles": most} for most in range(2, 10)),
    {"min_tiles": 1, "max_tiles": 1},
    {"min_tiles": 1, "max_tiles": 4, "max_pixels_tolerance": 1.5},
    {"do_image_splitting": False},
    {"use_thumbnail": False, "resample": 3},
    {"max_pixels_tolerance": 1.5},
    {"min_image_tokens": 32, "max_image_tokens": 64},
    {"encoder_patch_size": 14, "tile_size": 392},
    {"downsample_factor": 1, "encoder_patch_size": 32},
    {"downsample_factor": 4, "min_image_tokens": 16, "max_image_tokens": 64},
    {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    {"do_normalize": False},
    {"do_rescale": False, "image_mean": [120.0, 110.5, 99.25], "image_std": [58.0, 57.5, 61.0]},
    {"rescale_factor": 1 / 127.5},
    {**NANO, "min_image_tokens": 16, "max_image_tokens": 64, "max_tiles": 6},
]


def reference(changes: dict[str, object]) -> Lfm2VlProcessor:
    """The processor of transformers with a tokenizer that knows all markers."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": ImageTokens().special()})
    return Lfm2VlProcessor(Lfm2VlImageProcessor(**changes), tokenizer)


def compare(processor: Lfm2VlProcessor, config: ImageConfig, size: tuple[int, int]) -> int:
    """Check one image; the number of views compared."""
    image = picture(*size)
    layout = plan(*size, config)
    wanted = processor.image_processor([image], return_tensors="pt", return_row_col_info=True)
    mine = views(image, layout, config)
    shapes = [[view.patch_rows, view.patch_cols] for view in layout.views]
    assert wanted["spatial_shapes"].tolist() == shapes, (size, config)
    for at, view in enumerate(mine):
        rows = patchify(view, config)
        assert rows.shape[0] == layout.views[at].n_patches
        assert torch.equal(rows, wanted["pixel_values"][at, : len(rows)]), (size, at, config)
        assert not wanted["pixel_values"][at, len(rows) :].any()
    text = placeholder_text(layout, ImageTokens())
    lone_tile = len(mine) == 1 and config.tiles and mine[0].shape[1:] == (config.tile_size,) * 2
    if not (lone_tile and config.min_tiles == 1):  # there the reference miscounts its own features
        assert text == processor.replace_image_token(wanted, 0, use_image_special_tokens=True)
    assert text.count("<image>") == layout.n_tokens
    return len(mine)


def plain(settings: dict[str, object]) -> dict[str, object]:
    """Settings as a JSON file would hold them."""
    return json.loads(json.dumps(settings))


def check_config(processor: Lfm2VlProcessor) -> ImageConfig:
    """Our reading of the reference's settings, of its saved files, and our own writing."""
    settings = processor.image_processor.to_dict()
    config = ImageConfig.from_files({"image_processor": settings})
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        assert ImageConfig.from_files(folder) == config
        Path(folder, "processor_config.json").unlink()
        Path(folder, "preprocessor_config.json").write_text(json.dumps(config.to_dict()))
        again = plain(Lfm2VlImageProcessor.from_pretrained(folder).to_dict())
    for key, value in config.to_dict().items():
        assert again[key] == plain(settings)[key] == value, (key, value, again[key])
    return config


def golden() -> dict[str, object]:
    """Digests of the reference's patches for the shared images."""
    found: dict[str, object] = {}
    for name, (width, height, changes) in CASES.items():
        out = Lfm2VlImageProcessor(**changes)([picture(width, height)], return_tensors="pt")
        shapes = out["spatial_shapes"].tolist()
        real = [out["pixel_values"][i, : h * w] for i, (h, w) in enumerate(shapes)]
        digests = [hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest() for rows in real]
        found[name] = {"spatial_shapes": shapes, "sha256": digests}
    return found


def main() -> None:
    """Run every comparison, or write the golden file."""
    if "--write-golden" in sys.argv[1:]:
        GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
        print(f"wrote {GOLDEN.relative_to(ROOT)}")
        return
    assert json.loads(GOLDEN.read_text()) == golden(), "golden_patches.json is out of date"
    n_views = 0
    for changes in ({}, {"resample": 3}, NANO):
        processor = reference(changes)
        config = check_config(processor)
        for size in SIZES:
            n_views += compare(processor, config, size)
    for size, (count, tokens, block) in TABLE.items():
        layout = plan(*size, ImageConfig())
        text = placeholder_text(layout, ImageTokens())
        assert (layout.n_views, layout.n_tokens) == (count, tokens), size
        assert text.count("<") == block, size
    for changes in VARIANTS:
        processor = reference(changes)
        config = check_config(processor)
        for size in FEW:
            n_views += compare(processor, config, size)
    for most in range(1, 11):  # the budget of ours is the same arguments of theirs
        config = ImageConfig().with_budget(max_tiles=most, max_image_tokens=128)
        processor = reference(
            {"max_tiles": most, "min_tiles": min(2, most), "max_image_tokens": 128}
        )
        assert replace(config, do_image_splitting=True) == check_config(processor)
        n_views += compare(processor, config, (1280, 1024))
    print(f"{n_views} views, 0 unequal")


if __name__ == "__main__":
    main()
