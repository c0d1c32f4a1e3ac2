"""Files that people take for images and that cannot be read here, told by their first bytes.

It knows signatures and what to do about each; it opens nothing.
"""

from __future__ import annotations

from PIL import features

__all__ = ["advice"]

_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF = {b"avif", b"avis"}
_VIDEO = {b"isom", b"iso2", b"mp41", b"mp42", b"avc1", b"qt  ", b"M4V ", b"dash", b"3gp4", b"3gp5"}


def advice(data: bytes, name: str) -> str | None:
    """One sentence that refuses the file and says what to do, or None if it may be an image.

    Args:
        data: The file, or at least its first few kilobytes.
        name: How the message names it.
    """
    brands = _brands(data)
    if brands & _AVIF:
        if not features.check("avif"):
            return (
                f"{name} is an AVIF image, which this build of Pillow cannot read; "
                "convert it to PNG or JPEG first, for instance with `magick in.avif out.png`"
            )
        return None
    if brands & _HEIC:
        return (
            f"{name} is a HEIC photo, which cannot be read here; convert it to JPEG or PNG first, "
            "for instance with `heif-convert in.heic out.jpg` or `magick in.heic out.png`"
        )
    if brands & _VIDEO:
        return (
            f"{name} is a video; take a frame out of it first, "
            "for instance with `ffmpeg -i in.mp4 -frames:v 1 out.png`"
        )
    head = data[:2048].removeprefix(b"\xef\xbb\xbf")
    if b"%PDF-" in head[:1024]:
        return (
            f"{name} is a PDF document, not an image; turn its pages into images first, "
            "for instance with `pdftoppm -png in.pdf page`"
        )
    opening = head.lstrip().lower()
    if opening.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return f"{name} is an HTML page, not an image; use the address of the image itself"
    if opening.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in opening:
        return (
            f"{name} is an SVG drawing, which has no pixels; render it first, "
            "for instance with `rsvg-convert in.svg -o out.png`"
        )
    return None


def _brands(data: bytes) -> set[bytes]:
    """Major and compatible brands of an ISO media file (ISO/IEC 14496-12, box `ftyp`)."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), len(data), 256)
    return {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}
