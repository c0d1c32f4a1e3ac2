"""Anything that names an image becomes one RGB picture: path, URL, bytes, file, PIL image, stdin.

Knows file formats, orientation, alpha, bit depths and the limits that keep hostile files cheap;
knows nothing of tiles, tokens or torch.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np
from PIL import Image

from lfm2_mm.errors import ImageError
from lfm2_mm.fetch import fetch, is_url, shown
from lfm2_vision.filetypes import advice

if TYPE_CHECKING:
    import httpx2

__all__ = ["DEFAULT_LIMITS", "ImageSource", "Limits", "Picture", "Readable", "open_picture"]


@runtime_checkable
class Readable(Protocol):
    """A binary file, or anything that reads like one."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes."""
        ...


ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Readable | Image.Image
)

# Only readers that parse the bytes themselves: EPS, for one, would run another program.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000", "QOI")
_UPRIGHT = {  # EXIF orientation -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its remarks reach stderr
_WARNING_FILTERS = threading.Lock()  # they are global to the process


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is accepted; sizes are checked from the file's header, before anything is decoded.

    Attributes:
        max_pixels: Width times height.
        max_bytes: Bytes of the file, upload or download.
        max_side: Pixels of the longer side.
        min_side: Pixels of the shorter side. The arithmetic of the model works from 1 on; the
            default refuses tracking pixels and the like, which show nothing.
        timeout: Seconds that a download may take.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 64 * 1024 * 1024
    max_side: int = 65_535
    min_side: int = 2
    timeout: float = 30.0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Picture:
    """An upright, opaque RGB image and what identifies it.

    Attributes:
        image: PIL image of mode RGB, 8 bits a channel.
        digest: SHA-256 (hex) of its size and pixels: equal digests mean equal pictures, whatever
            file or format they came from.
        source: Where it came from, as a message would name it.
    """

    image: Image.Image
    digest: str
    source: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size


def open_picture(
    source: ImageSource,
    *,
    limits: Limits = DEFAULT_LIMITS,
    client: httpx2.Client | None = None,
) -> Picture:
    """Read an image from wherever it is.

    The first frame of an animation is taken, EXIF orientation applied, transparency composited on
    white, and 16-bit grey scaled to 8 bits.

    Args:
        source: A path; an http, https or data URL; `-` for standard input; the bytes of an image
            file; a binary file object; or a PIL image.
        limits: What is accepted.
        client: Sends the request when the source is a URL (see `lfm2_mm.fetch`).

    Raises:
        ImageError: if it cannot be read, is no image, or is over a limit.
        FetchError: if the source is a URL that cannot be fetched.
    """
    if isinstance(source, Image.Image):
        name = "the PIL image"
        _check_size(source.size, name, limits)
        rgb = _decode(source, name)
        rgb = rgb.copy() if rgb is source else rgb
    else:
        data, name = _read(source, limits, client)
        header = _parse_header(data, name)
        _check_size(header.size, name, limits)
        rgb = _decode(header, name)
    rgb.info = {}
    digest = hashlib.sha256(b"%d %d\n" % rgb.size)
    digest.update(rgb.tobytes())
    return Picture(image=rgb, digest=digest.hexdigest(), source=name)


def _read(source: object, limits: Limits, client: httpx2.Client | None) -> tuple[bytes, str]:
    """The bytes of the file, and how messages name it."""
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "the image given as bytes"
    elif isinstance(source, str) and is_url(source):
        name = shown(source)
        data = fetch(source, max_bytes=limits.max_bytes, timeout=limits.timeout, client=client)
    elif isinstance(source, str) and source == "-":
        data, name = sys.stdin.buffer.read(limits.max_bytes + 1), "the image on standard input"
    elif isinstance(source, str | os.PathLike):
        data, name = _read_file(source, limits)
    elif isinstance(source, Readable):
        given = getattr(source, "name", None)
        name = repr(given) if isinstance(given, str) else "the image in the file object"
        data = source.read(limits.max_bytes + 1)
        if not isinstance(data, bytes):
            raise ImageError(f"{name} was opened as text; open it in binary mode ('rb')")
    else:
        raise ImageError(
            f"an image cannot be read from a value of type {type(source).__name__}; "
            "give a path, a URL, bytes, a binary file or a PIL image"
        )
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); save or download it again")
    if len(data) > limits.max_bytes:
        raise ImageError(_too_many_bytes(name, limits))
    return data, name


def _read_file(source: str | os.PathLike[str], limits: Limits) -> tuple[bytes, str]:
    name = repr(os.fspath(source))
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise ImageError(f"{name} is a folder, not an image; name the files in it")
        with path.open("rb") as file:
            return file.read(limits.max_bytes + 1), name
    except FileNotFoundError:
        raise ImageError(f"there is no file {name}; check the path") from None
    except PermissionError:
        raise ImageError(f"{name} may not be read by this user; change its permissions") from None
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be read ({why}); check the path") from None


def _parse_header(data: bytes, name: str) -> Image.Image:
    """Open the file without decoding it and without Pillow's own size check.

    `Image.open` would warn or raise in words of its own before the size is known here.
    """
    refusal = advice(data, name)
    if refusal is not None:
        raise ImageError(refusal)
    Image.preinit()
    if any(form not in Image.OPEN for form in _FORMATS):
        Image.init()
    why: Exception | None = None
    with _quiet():
        for form in _FORMATS:
            factory, accept = Image.OPEN.get(form, (None, None))
            verdict = accept(data[:16]) if accept is not None else True
            if factory is None or not verdict or isinstance(verdict, str):
                continue
            try:
                return factory(io.BytesIO(data), "")
            except Exception as error:  # readers raise whatever they trip over
                why = error
    if why is not None:
        raise ImageError(_damaged(name, why))
    start = data[:16].decode("latin-1").split("\n")[0]
    raise ImageError(
        f"{name} is not an image that can be read here (it begins with {start!r}); "
        "PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF files work"
    )


def _check_size(size: tuple[int, int], name: str, limits: Limits) -> None:
    width, height = size
    if min(size) < limits.min_side:
        raise ImageError(
            f"{name} is {width}x{height} pixels, too small to show anything; "
            f"use an image of at least {limits.min_side}x{limits.min_side}"
        )
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{name} is {width}x{height} pixels, {width * height:,} in all and over the limit of "
            f"{limits.max_pixels:,}; scale it down first"
        )
    if max(size) > limits.max_side:
        raise ImageError(
            f"{name} is {width}x{height} pixels, with a side over the limit of "
            f"{limits.max_side:,}; scale it down or cut it into parts first"
        )


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):
            with _quiet():  # some readers check the size again while decoding
                image.load()
        else:
            image.load()
        with _quiet():
            turn = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:  # readers raise whatever they trip over
        raise ImageError(_damaged(name, error)) from error


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block must not cost the picture
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_to_8_bit(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_to_8_bit(image: Image.Image) -> Image.Image:
    """Grey images of 16 or 32 bits or floats, which Pillow itself would clip at 255.

    Integers up to 65535 are taken as 16-bit and floats in [0, 1] as fractions of white; anything
    else is stretched from its own minimum to its own maximum.
    """
    exact = np.float64 if image.mode == "F" else np.float32  # the latter holds 16 bits exactly
    values = np.nan_to_num(np.asarray(image).astype(exact), posinf=0.0, neginf=0.0)
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    if values.min() < low or values.max() > high:
        low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) * 255.0
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep remarks of file readers ("corrupt EXIF data") off the user's terminal."""
    with _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _damaged(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return f"{name} is damaged or cut short ({reason}); save or download it again"


def _too_many_bytes(name: str, limits: Limits) -> str:
    return (
        f"{name} holds more than the limit of {limits.max_bytes:,} bytes; "
        "scale it down or save it with more compression"
    )
