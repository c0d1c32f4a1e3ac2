"""Pixels become patches, bit for bit as `Lfm2VlImageProcessor` of transformers 5.23 makes them.

It follows a plan without judging it, needs torch alone (no torchvision), and adds no padding:
the encoder computes only patches that exist.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lfm2_vision.image_config import ImageConfig
from lfm2_vision.tiling import Plan

__all__ = ["patchify", "views"]


def views(image: Image.Image, plan: Plan, config: ImageConfig) -> list[UInt8[Tensor, "3 h w"]]:
    """The resized pixels of each view, in the plan's order.

    Args:
        image: RGB image of the size that the plan was made for.
        plan: Where each view lies.
        config: Names the interpolation; `uint8` pixels are interpolated as such, with antialias.

    Returns:
        One uint8 tensor `[3, height, width]` per view.
    """
    if image.mode != "RGB" or image.size != (plan.width, plan.height):
        raise ValueError(
            f"the plan is for an RGB image of {plan.width}x{plan.height} pixels, "
            f"not {image.mode} of {image.width}x{image.height}"
        )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    canvas = _resize(pixels, plan.canvas, config)
    out = []
    for view in plan.views:
        if view.kind == "thumbnail":
            out.append(_resize(pixels, (view.width, view.height), config)[0])
        else:
            left, top, right, bottom = view.box
            out.append(canvas[0, :, top:bottom, left:right])
    return out


def patchify(view: UInt8[Tensor, "3 h w"], config: ImageConfig) -> Float[Tensor, "n p"]:
    """Cut one view into patches and scale its values.

    Args:
        view: Pixels whose sides are multiples of the patch size P.
        config: Patch size and scaling.

    Returns:
        float32 `[rows · cols, P · P · 3]`: patches row by row, each flattened (row, col, channel).
    """
    side = config.patch_size
    _, height, width = view.shape
    rows, cols = height // side, width // side
    cells = view.permute(1, 2, 0).reshape(rows, side, cols, side, 3).transpose(1, 2)
    values = cells.reshape(rows * cols, side * side, 3).to(torch.float32)
    return _scale(values, config).reshape(rows * cols, side * side * 3)


def _resize(
    pixels: UInt8[Tensor, "1 3 _ _"], size: tuple[int, int], config: ImageConfig
) -> UInt8[Tensor, "1 3 _ _"]:
    width, height = size
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(
        pixels, size=(height, width), mode=config.resample, align_corners=False, antialias=True
    )


def _scale(values: Float[Tensor, "n q 3"], config: ImageConfig) -> Float[Tensor, "n q 3"]:
    """Rescale and normalise; in one step where both are asked for, which rounds differently."""
    factor = 1.0
    if config.do_rescale:
        if not config.do_normalize:
            return values.mul_(config.rescale_factor)
        factor = 1.0 / config.rescale_factor
    if config.do_normalize:
        mean = torch.tensor(config.image_mean) * factor
        std = torch.tensor(config.image_std) * factor
        values.sub_(mean).div_(std)
    return values
