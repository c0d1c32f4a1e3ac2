"""Pictures for people: how an image was tiled, and the boxes a model found in it.

It draws what a plan or a list of boxes says and computes neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from lfm2_vision.grounding import Box
from lfm2_vision.tiling import Plan, View

__all__ = ["draw_boxes", "draw_tiles"]

_Color: TypeAlias = tuple[int, int, int]
_Rect: TypeAlias = tuple[int, int, int, int]
_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PAPER: _Color = (250, 250, 248)
_INK: _Color = (32, 36, 42)
_GREY: _Color = (110, 116, 124)
_GRID: _Color = (255, 255, 255)
_SHADE: _Color = (20, 24, 30)
# distinguishable with the common colour-vision deficiencies (after Okabe and Ito, 2008)
_PALETTE: tuple[_Color, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (240, 228, 66),
)
_LONGEST = 1280  # pixels of the longer side of the tiled image on the sheet
_SHORTEST = 640  # small images are enlarged to this, so that labels fit


def draw_tiles(image: Image.Image, plan: Plan) -> Image.Image:
    """A sheet that shows what the encoder sees: each tile with its place and token count.

    The image appears as stretched to the plan's canvas, with the thumbnail, if there is one,
    beside or below it at the same scale, and lines above that sum up.

    Args:
        image: The picture that the plan was made for.
        plan: The views.

    Returns:
        A new RGB image.
    """
    scale = _scale(*plan.canvas)
    shown = _scaled(plan.canvas, scale)
    size = 20  # of the text, in pixels
    pad, line = size, round(size * 1.5)
    font, small = _font(size), _font(round(size * 0.8))
    title, note = _summary(plan)
    thumb = plan.thumbnail
    side, place = (0, 0), (0, 0)  # of the thumbnail: its size, and its corner from the tiles'
    if thumb is not None:
        side = _scaled((thumb.width, thumb.height), scale)
        below = shown[0] > 2 * shown[1]
        place = (0, shown[1] + pad) if below else (shown[0] + pad, 0)
    captions = [_text_width(small, text) for text in _caption(thumb)] if thumb else []
    width = max(
        shown[0],
        place[0] + max([side[0], *captions]),
        _text_width(font, title),
        _text_width(small, note),
    )
    height = max(shown[1], place[1] + side[1] + 2 * line if thumb else 0)
    sheet = Image.new("RGB", (width + 2 * pad, height + 2 * line + 2 * pad), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((pad, pad // 2), title, fill=_INK, font=font)
    pen.text((pad, pad // 2 + line), note, fill=_GREY, font=small)
    left, top = pad, pad + 2 * line
    sheet.paste(image.convert("RGB").resize(shown, Image.Resampling.LANCZOS), (left, top))
    for view in plan.views:
        if view.kind == "tile":
            _draw_tile(sheet, view, (left, top), scale, small)
    if thumb is not None:
        x, y = left + place[0], top + place[1]
        sheet.paste(image.convert("RGB").resize(side, Image.Resampling.LANCZOS), (x, y))
        pen.rectangle((x, y, x + side[0] - 1, y + side[1] - 1), outline=_GREY)
        for row, text in enumerate(_caption(thumb)):
            below_it = y + side[1] + 6 + row * round(line * 0.8)
            pen.text((x, below_it), text, fill=_GREY if row else _INK, font=small)
    return sheet


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The image with each box outlined and named, one colour per label.

    Args:
        image: Any PIL image; it is not changed.
        boxes: In thousandths of the image. Coordinates beyond it are drawn at its edge.

    Returns:
        A new RGB image of the same size.
    """
    sheet = image.convert("RGB").copy()
    pen = ImageDraw.Draw(sheet)
    width, height = sheet.size
    stroke = max(2, round(min(width, height) / 160))
    font = _font(max(12, round(min(width, height) / 28)))
    colors: dict[str, _Color] = {}
    for box in boxes:
        colors.setdefault(box.label, _PALETTE[len(colors) % len(_PALETTE)])
    rects = [(box, _inside(box.to_pixels(width, height), width, height)) for box in boxes]
    for box, rect in rects:
        pen.rectangle(rect, outline=colors[box.label], width=stroke)
    taken: list[_Rect] = []  # labels last, so that no outline crosses them
    for box, rect in rects:
        if not box.label:
            continue
        text = _shortened(box.label, font, width - 12)
        plate = _plate(text, rect, font, (width, height), stroke, taken)
        taken.append(plate)
        _draw_plate(pen, plate, text, colors[box.label], font)
    return sheet


def _summary(plan: Plan) -> tuple[str, str]:
    """The two lines above the picture."""
    views = [f"{plan.cols}x{plan.rows} tiles" if plan.tiled else "one view"]
    if plan.thumbnail:
        views.append("thumbnail")
    title = f"{plan.width}x{plan.height}: {' + '.join(views)}, {plan.n_tokens:,} image tokens"
    return title, f"resized to {plan.canvas[0]}x{plan.canvas[1]}, {plan.n_patches:,} patches"


def _caption(thumb: View) -> tuple[str, str]:
    """The two lines under the thumbnail."""
    return "thumbnail", f"{thumb.width}x{thumb.height}, {thumb.n_tokens} tokens"


def _draw_tile(
    sheet: Image.Image,
    view: View,
    origin: tuple[int, int],
    scale: float,
    font: _Font,
) -> None:
    """Outline of one tile and, as far as it has room, its place and token count."""
    pen = ImageDraw.Draw(sheet)
    x, y = origin
    left, top, right, bottom = (round(side * scale) for side in view.box)
    rect = (x + left, y + top, x + right - 1, y + bottom - 1)
    pen.rectangle(rect, outline=_SHADE, width=3)
    pen.rectangle(rect, outline=_GRID, width=1)
    room = right - left - 16
    place = f"row {view.row} col {view.col}"
    for text in (f"{place} · {view.n_tokens} tokens", place, f"{view.row},{view.col}"):
        if _text_width(font, text) + 12 <= room:
            plate = (rect[0] + 8, rect[1] + 8, rect[0] + 20 + _text_width(font, text), 0)
            plate = (*plate[:3], plate[1] + _line_height(font) + 6)
            _draw_plate(pen, plate, text, _SHADE, font)
            return


def _plate(
    text: str,
    rect: _Rect,
    font: _Font,
    size: tuple[int, int],
    stroke: int,
    taken: Sequence[_Rect],
) -> _Rect:
    """Where a label goes: above its box, else inside its top, else below; off other labels."""
    wide = min(_text_width(font, text) + 12, size[0])
    high = _line_height(font) + 6
    left = max(0, min(rect[0], size[0] - wide))
    tops = [rect[1] - high, rect[1] + stroke, rect[3] + 1, rect[3] - high - stroke]
    fitting = [top for top in tops if 0 <= top <= size[1] - high] or [0]
    for top in fitting:
        plate = (left, top, left + wide, top + high)
        if not any(_overlap(plate, other) for other in taken):
            return plate
    return (left, fitting[0], left + wide, fitting[0] + high)


def _draw_plate(
    pen: ImageDraw.ImageDraw,
    plate: _Rect,
    text: str,
    color: _Color,
    font: _Font,
) -> None:
    """A filled label; its text is black or white, whichever contrasts more."""
    pen.rounded_rectangle(plate, radius=3, fill=color)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    pen.text(
        ((plate[0] + plate[2]) / 2, (plate[1] + plate[3]) / 2),
        text,
        fill=(0, 0, 0) if bright else (255, 255, 255),
        font=font,
        anchor="mm",
    )


def _inside(rect: _Rect, width: int, height: int) -> _Rect:
    """The rectangle clamped to the image, with at least one pixel."""
    left, top = max(0, min(rect[0], width - 1)), max(0, min(rect[1], height - 1))
    right, bottom = min(max(left, rect[2] - 1), width - 1), min(max(top, rect[3] - 1), height - 1)
    return left, top, right, bottom


def _overlap(a: _Rect, b: _Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _shortened(text: str, font: _Font, room: int) -> str:
    """The text on one line of at most 60 characters, cut where the room ends."""
    line = " ".join(text.split())[:60]
    if _text_width(font, line) <= room:
        return line
    while line and _text_width(font, line + "…") > room:
        line = line[:-1]
    return line + "…"


def _scale(width: int, height: int) -> float:
    """From canvas pixels to pixels on the sheet."""
    longest = max(width, height)
    return min(_LONGEST / longest, max(1.0, _SHORTEST / longest))


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _font(size: int) -> _Font:
    return ImageFont.load_default(size)


def _text_width(font: _Font, text: str) -> int:
    box = font.getbbox(text)
    return math.ceil(box[2] - box[0])


def _line_height(font: _Font) -> int:
    return math.ceil(font.getbbox("Ag")[3] - font.getbbox("Ag")[1]) + 4
