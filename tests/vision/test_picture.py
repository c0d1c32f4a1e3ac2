"""lfm2_vision.picture and lfm2_vision.filetypes: what is read, how, and what is refused."""

from __future__ import annotations

import base64
import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from lfm2_mm.errors import ImageError
from lfm2_vision import picture
from lfm2_vision.picture import Limits, open_picture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def corners() -> Image.Image:
    """4x6: red at the top left, green at the top right, blue at the bottom left."""
    image = Image.new("RGB", (4, 6), WHITE)
    for at, color in (((0, 0), RED), ((3, 0), GREEN), ((0, 5), BLUE)):
        image.putpixel(at, color)
    return image


def refusal(source: Any, **limits: Any) -> str:
    with pytest.raises(ImageError) as caught:
        open_picture(source, limits=Limits(**limits))
    text = str(caught.value)
    assert "\n" not in text
    return text


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header announces any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(corners())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, content=data))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with httpx2.Client(transport=transport) as client, path.open("rb") as file:
        pictures = [
            open_picture(path),
            open_picture(str(path)),
            open_picture(data),
            open_picture(memoryview(data)),
            open_picture(file),
            open_picture(io.BytesIO(data)),
            open_picture(corners()),
            open_picture("data:image/png;base64," + base64.b64encode(data).decode()),
            open_picture("https://h/a.png?key=secret", client=client),
            open_picture("-"),
        ]
    assert len({seen.digest for seen in pictures}) == 1
    assert all(seen.image.mode == "RGB" and seen.size == (4, 6) for seen in pictures)
    assert pictures[0].source == repr(str(path))
    assert pictures[8].source == "https://h/a.png"
    assert pictures[9].source == "the image on standard input"


def test_digest_tells_pixels_and_shape_apart() -> None:
    flat = Image.new("RGB", (4, 6), WHITE)
    digests = {
        open_picture(flat).digest,
        open_picture(flat.resize((6, 4))).digest,
        open_picture(corners()).digest,
    }
    assert len(digests) == 3
    lossless = [encoded(corners(), form) for form in ("PNG", "BMP", "TIFF", "PPM")]
    assert len({open_picture(data).digest for data in lossless}) == 1


def test_the_callers_image_is_neither_changed_nor_shared() -> None:
    mine = corners()
    mine.info["note"] = 1
    seen = open_picture(mine)
    mine.putpixel((0, 0), BLUE)
    assert seen.image.getpixel((0, 0)) == RED and mine.info == {"note": 1}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = corners() if undo is None else corners().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = open_picture(encoded(stored, exif=exif))
    assert upright.size == (4, 6) and upright.digest == open_picture(corners()).digest


def test_broken_exif_costs_nothing() -> None:
    data = encoded(corners(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage")
    assert open_picture(data).size == (4, 6)


def test_transparency_is_composited_on_white() -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    half.putpixel((0, 0), (0, 0, 0, 0))
    for data in (encoded(half), encoded(half, "WEBP", lossless=True, exact=True)):
        image = open_picture(data).image
        assert image.getpixel((0, 0)) == WHITE and image.getpixel((1, 1)) == (255, 127, 127)
    grey = Image.merge("LA", [Image.new("L", (2, 2), 0), Image.new("L", (2, 2), 0)])
    assert open_picture(encoded(grey)).image.getpixel((1, 1)) == WHITE
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([*RED, *GREEN])
    palette.putpixel((0, 0), 0)
    seen = open_picture(encoded(palette, transparency=0)).image
    assert seen.getpixel((0, 0)) == WHITE and seen.getpixel((1, 1)) == GREEN
    keyed = encoded(Image.new("RGB", (2, 2), BLUE), transparency=BLUE)
    assert open_picture(keyed).image.getpixel((0, 0)) == WHITE


def test_modes() -> None:
    assert open_picture(encoded(Image.new("1", (2, 2), 1))).image.getpixel((0, 0)) == WHITE
    assert open_picture(encoded(Image.new("L", (2, 2), 77))).image.getpixel((0, 0)) == (77,) * 3
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert open_picture(encoded(cmyk, "TIFF")).image.getpixel((0, 0)) == RED
    red, green, _ = np.asarray(open_picture(encoded(cmyk, "JPEG", quality=95)).image)[0, 0]
    assert red > 240 and green < 15


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form: str) -> None:
    values = np.array([[0, 257, 32768], [65535, 128, 129]], dtype=np.uint16)
    pixels = np.asarray(open_picture(encoded(Image.fromarray(values), form)).image)
    assert pixels[..., 0].tolist() == [[0, 1, 128], [255, 0, 1]]


def test_32_bit_and_float_grey() -> None:
    def first_channel(array: np.ndarray[Any, Any]) -> Any:
        return np.asarray(open_picture(Image.fromarray(array)).image)[..., 0].tolist()

    assert first_channel(np.array([[0, 65535], [257, 514]], np.int32)) == [[0, 255], [1, 2]]
    assert first_channel(np.array([[-100, 100], [0, 0]], np.int32)) == [[0, 255], [128, 128]]
    unit = np.array([[0.0, 1.0], [0.2, np.nan]], np.float32)
    assert first_channel(unit) == [[0, 255], [51, 0]]
    assert first_channel(np.array([[0, 500], [100, 250]], np.float32)) == [[0, 255], [51, 128]]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert open_picture(data).image.getpixel((4, 4)) == RED


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.png")
    assert refusal(missing) == f"there is no file {missing!r}; check the path"
    assert refusal(tmp_path) == (
        f"{str(tmp_path)!r} is a folder, not an image; name the files in it"
    )
    assert refusal("a\0b").startswith("'a\\x00b' cannot be read (")
    empty = tmp_path / "empty.png"
    empty.touch()
    assert refusal(empty) == f"{str(empty)!r} is empty (0 bytes); save or download it again"
    assert refusal(b"") == (
        "the image given as bytes is empty (0 bytes); save or download it again"
    )


def test_sources_of_another_kind() -> None:
    with pytest.raises(ImageError, match="cannot be read from a value of type int; give a path"):
        picture._read(3, Limits(), None)  # as JSON from elsewhere may bring it
    assert "opened as text; open it in binary mode" in refusal(io.StringIO("x"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_truncated_files(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    for keep in (len(data) // 2, 40):
        text = refusal(data[:keep])
        assert text.startswith("the image given as bytes is damaged or cut short (")
        assert text.endswith("); save or download it again")


def test_text_named_png(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("hello, this is text\nand more")
    assert refusal(path) == (
        f"{str(path)!r} is not an image that can be read here (it begins with "
        "'hello, this is t'); PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF files work"
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99, "is a HEIC photo, which cannot be"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + b"\0" * 99, "`heif-convert in.heic out.jpg`"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + b"\0" * 99, "is a video; take a frame out"),
        (b"%PDF-1.7\n%\xe2\xe3", "is a PDF document, not an image; turn its pages into images"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "is an SVG drawing, which has no pixels"),
        (b"\xef\xbb\xbf <svg width='3'>", "is an SVG drawing"),
        (b"<!DOCTYPE html><html><svg/></html>", "is an HTML page, not an image; use the address"),
    ],
)
def test_files_that_are_told_apart(data: bytes, text: str) -> None:
    assert text in refusal(data)


def test_avif_is_read_where_pillow_can_and_named_where_it_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(Image.new("RGB", (16, 16), RED), "AVIF")
    assert open_picture(data).size == (16, 16)
    monkeypatch.setattr("lfm2_vision.filetypes.features.check", lambda _: False)
    assert "is an AVIF image, which this build of Pillow cannot read" in refusal(data)


def test_sizes_are_refused_from_the_header_alone() -> None:
    assert refusal(huge_png(30000, 30000)) == (
        "the image given as bytes is 30000x30000 pixels, 900,000,000 in all and over the limit of "
        "100,000,000; scale it down first"
    )
    assert refusal(huge_png(70000, 10)) == (
        "the image given as bytes is 70000x10 pixels, with a side over the limit of 65,535; "
        "scale it down or cut it into parts first"
    )
    assert "is damaged or cut short" in refusal(huge_png(10000, 9500))  # allowed, but no pixels
    assert "over the limit of 20" in refusal(encoded(corners()), max_pixels=20)
    assert "over the limit of 20" in refusal(corners(), max_pixels=20)


def test_gif_between_pillows_limit_and_ours_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert open_picture(encoded(corners(), "GIF")).size == (4, 6)


def test_bytes_are_limited(tmp_path: Path) -> None:
    data = encoded(corners())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (data, path, io.BytesIO(data)):
        assert "holds more than the limit of 20 bytes" in refusal(source, max_bytes=20)


def test_one_pixel_is_refused_unless_asked_for() -> None:
    dot = Image.new("RGB", (1, 1), RED)
    assert refusal(encoded(dot)) == (
        "the image given as bytes is 1x1 pixels, too small to show anything; "
        "use an image of at least 2x2"
    )
    assert open_picture(dot, limits=Limits(min_side=1)).size == (1, 1)
