"""Boxes in what a model wrote: LFM2.5-VL answers grounding questions with a JSON list.

The form is `[{"image_id": 0, "bbox_2d": [x1, y1, x2, y2], "label": "…"}]` with integers in
[0, 1000], a thousandth of the width or height each. It reads text and knows no image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["SCALE", "Box", "parse_boxes"]

SCALE = 1000
_MAX_CHARS = 32_768  # far more than a model writes
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Box:
    """A labelled rectangle.

    Attributes:
        bbox: (left, top, right, bottom) in thousandths of the image, ordered, in [0, 1000].
        label: What the model calls it; may be empty.
        image_id: Which image of the question, from 0.
    """

    bbox: tuple[int, int, int, int]
    label: str = ""
    image_id: int = 0

    def to_pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels of an image of this size, rounded."""
        left, top, right, bottom = self.bbox
        return (
            round(left * width / SCALE),
            round(top * height / SCALE),
            round(right * width / SCALE),
            round(bottom * height / SCALE),
        )

    def to_dict(self) -> dict[str, Any]:
        """The form the model writes."""
        return {"image_id": self.image_id, "bbox_2d": list(self.bbox), "label": self.label}


def parse_boxes(text: str) -> list[Box]:
    """Every valid box in a model's answer, in order; never raises.

    Words and code fences around the JSON are skipped. Of a list that breaks off or is damaged,
    the objects that are whole are kept. Swapped corners are put in order, coordinates out of
    range are clamped, fractions rounded. An object without four numbers under `bbox_2d` (or
    `bbox`) is left out.
    """
    boxes = []
    for found in _objects(text[:_MAX_CHARS]):
        box = _box(found)
        if box is not None:
            boxes.append(box)
    return boxes


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text that are complete, whatever stands around them."""
    at = text.find("{")
    while at >= 0:
        try:
            value, end = _DECODER.raw_decode(text, at)
        except RecursionError:
            return  # no model means this
        except ValueError:
            at = text.find("{", at + 1)  # an object may still be whole inside a broken one
            continue
        yield from _flatten(value)
        at = text.find("{", end)


def _flatten(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The object itself if it has a box, else the objects it holds, such as `{"boxes": […]}`."""
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if "bbox_2d" in item or "bbox" in item:
                yield item
            else:
                pending.extend(reversed(item.values()))
        elif isinstance(item, list):
            pending.extend(reversed(item))


def _box(item: dict[str, Any]) -> Box | None:
    corners = item.get("bbox_2d", item.get("bbox"))
    if not isinstance(corners, list) or len(corners) != 4:
        return None
    if not all(type(n) is int or (type(n) is float and math.isfinite(n)) for n in corners):
        return None
    x1, y1, x2, y2 = (round(min(max(n, 0), SCALE)) for n in corners)
    label, image = item.get("label"), item.get("image_id")
    return Box(
        bbox=(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)),
        label=label if isinstance(label, str) else str(label) if type(label) is int else "",
        image_id=image if type(image) is int and image >= 0 else 0,
    )
