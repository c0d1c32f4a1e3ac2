"""Bytes become text: gzip within its limit, encodings by mark, by proof and by guess.

Binary content is refused whatever the file is called. This module knows no document format.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Limits

__all__ = ["clean", "decode", "unpack"]

# The longer mark first: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = [
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]
_UNWANTED = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")
_SAMPLE = 64 * 1024
_MAX_CONTROL = 0.02  # share of control characters above which content is binary


def unpack(data: bytes, limits: Limits) -> bytes:
    """What a gzip file holds.

    Raises:
        DocumentError: if it is damaged, or unpacks to more than `limits.bytes`.
    """
    try:
        with gzip.open(io.BytesIO(data)) as stream:
            plain = stream.read(limits.bytes + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DocumentError(f"its gzip data is damaged ({error}): pack it again") from error
    if len(plain) > limits.bytes:
        raise DocumentError(
            f"it unpacks to more than the {limits.bytes / 2**20:.4g} MiB that are allowed: "
            "unpack it and split it"
        )
    return plain


def clean(text: str) -> str:
    """Text with one kind of line end and a space for each control character or lone surrogate."""
    return _UNWANTED.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))


def decode(data: bytes, limits: Limits) -> str:
    """The text of a file's bytes: by byte order mark, as UTF-8, else by charset-normalizer.

    Raises:
        DocumentError: if the content is binary, its text too long, or in no known encoding.
    """
    text = _decode(data)
    sample = text[:_SAMPLE]
    if len(_UNWANTED.findall(sample.replace("\r", "\n"))) > 2 + _MAX_CONTROL * len(sample):
        raise _binary()
    if len(text) > limits.characters:
        raise DocumentError(
            f"its text has {len(text)} characters, more than the {limits.characters} that are "
            "allowed: split it"
        )
    return clean(text)


def _binary() -> DocumentError:
    return DocumentError("its content is binary, not text: give it the suffix of its real format")


def _decode(data: bytes) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    sample = data[:_SAMPLE]
    if b"\0" in sample:
        return _wide(data, sample)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return _guess(data, sample)


def _wide(data: bytes, sample: bytes) -> str:
    """Text in UTF-16 without a mark: one byte of each pair is mostly zero, the other never."""
    sample = sample[: len(sample) // 2 * 2]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if len(data) % 2 == 0 and max(even, odd) > 0.4 * len(sample) / 2 and min(even, odd) == 0:
        return data.decode("utf-16-le" if odd else "utf-16-be", "replace")
    raise _binary()


def _guess(data: bytes, sample: bytes) -> str:
    from charset_normalizer import from_bytes

    best = from_bytes(sample).best()
    if best is None:
        raise _binary()
    return data.decode(best.encoding, "replace")
