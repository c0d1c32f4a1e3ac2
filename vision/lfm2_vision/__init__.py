"""lfm2_vision: pictures in, for LFM2-VL and LFM2.5-VL.

Importing the package imports no torch; `frontend` is what the core finds by entry point.
"""

from __future__ import annotations

from lfm2_vision.frontend import ImageEncoder, VisionFrontend, frontend
from lfm2_vision.grounding import Box, parse_boxes
from lfm2_vision.image_config import ImageConfig
from lfm2_vision.picture import Limits, Picture, open_picture
from lfm2_vision.tiling import Plan, plan

__all__ = [
    "Box",
    "ImageConfig",
    "ImageEncoder",
    "Limits",
    "Picture",
    "Plan",
    "VisionFrontend",
    "frontend",
    "open_picture",
    "parse_boxes",
    "plan",
]
