"""lfm2_vision: pictures in, for LFM2-VL and LFM2.5-VL.

This face is lazy: importing the package imports nothing else. The core finds
`lfm2_vision.frontend.frontend` by entry point.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "Box",
    "ImageConfig",
    "ImageEncoder",
    "Limits",
    "Picture",
    "Plan",
    "VisionFrontend",
    "open_picture",
    "parse_boxes",
    "plan",
]

_FACE = {
    "Box": "grounding",
    "ImageConfig": "image_config",
    "ImageEncoder": "frontend",
    "Limits": "picture",
    "Picture": "picture",
    "Plan": "tiling",
    "VisionFrontend": "frontend",
    "open_picture": "picture",
    "parse_boxes": "grounding",
    "plan": "tiling",
}

if TYPE_CHECKING:
    from lfm2_vision.frontend import ImageEncoder, VisionFrontend
    from lfm2_vision.grounding import Box, parse_boxes
    from lfm2_vision.image_config import ImageConfig
    from lfm2_vision.picture import Limits, Picture, open_picture
    from lfm2_vision.tiling import Plan, plan


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'lfm2_vision' has no attribute {name!r}")
    return getattr(import_module(f"lfm2_vision.{_FACE[name]}"), name)
