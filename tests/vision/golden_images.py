"""Images that are a pure function of their size, shared by the oracle and the default tests."""

from __future__ import annotations

import numpy as np
from PIL import Image

# name -> width, height, changes to the reference processor's default arguments
CASES: dict[str, tuple[int, int, dict[str, object]]] = {
    "small, enlarged": (100, 60, {}),
    "one view, shrunk": (640, 480, {}),
    "one view, bicubic": (301, 257, {"resample": 3}),
    "tiled, bilinear": (1100, 620, {}),
    "tiled, bicubic": (700, 1500, {"resample": 3}),
    "patch 8, tile 128": (600, 420, {"encoder_patch_size": 8, "tile_size": 128}),
    "patch 8, 64 tokens": (
        400,
        130,
        {"encoder_patch_size": 8, "tile_size": 128, "min_image_tokens": 16, "max_image_tokens": 64},
    ),
    "other mean and deviation": (
        130,
        90,
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ),
}


def picture(width: int, height: int) -> Image.Image:
    """Edges, slopes and fine texture from integer arithmetic alone."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    noise = (x * 7919 + y * 104729 + x * y * 31) % 251
    red = (x * 255 // max(1, width - 1) + noise // 4) % 256
    green = np.where((x // 17 + y // 23) % 2 == 0, noise, 255 - noise)
    blue = (y * 255 // max(1, height - 1)) ^ (noise & 63)
    return Image.fromarray(np.stack([red, green, blue], axis=2).astype(np.uint8))
