"""One reader for each family of formats, found by a file's name.

A reader takes bytes and gives extracts; it opens no file. Readers run in a process of their own
(`lfm2_retrieval.documents.worker`); this face is light, so that the parent can ask `refusal`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import PurePosixPath

from lfm2_mm.errors import DocumentError
from lfm2_retrieval.documents.model import Extract, Limits

__all__ = ["family", "read", "refusal"]

_FAMILIES = {
    "plain": "txt text log",
    "markup": "md markdown mdown rst",
    "web": "html htm xhtml",
    "pdf": "pdf",
    "word": "docx",
    "rows": "csv tsv jsonl ndjson",
    "source": (
        "py pyi js mjs cjs ts tsx jsx java kt kts scala c h cc cpp cxx hpp hh cs go rs swift m mm "
        "rb php pl pm lua r jl hs ml mli ex exs erl clj el lisp dart zig nim v sv vhd sh bash zsh "
        "fish ps1 bat sql css scss less json yaml yml toml ini cfg conf xml tex cmake mk gradle "
        "proto graphql diff patch"
    ),
}
_SUFFIXES = {suffix: name for name, words in _FAMILIES.items() for suffix in words.split()}

_NO_DOCUMENTS = {
    "a picture": "png jpg jpeg gif webp bmp tif tiff heic heif avif ico svg psd raw",
    "sound": "wav mp3 flac ogg opus m4a aac wma",
    "a film": "mp4 mkv mov avi webm wmv",
    "an archive": "zip tar tgz bz2 xz zst 7z rar jar whl iso dmg",
    "a program": "exe dll so dylib o a class pyc pyo wasm bin",
    "model weights or arrays": "safetensors gguf pt pth onnx npy npz h5 parquet arrow pkl",
    "a font": "ttf otf woff woff2",
    "a database": "sqlite sqlite3 db",
    "an office format that is not read (save it as .docx, .pdf or .csv)": (
        "doc odt rtf xls xlsx ods ppt pptx odp epub mobi pages"
    ),
}
_REFUSED = {suffix: what for what, words in _NO_DOCUMENTS.items() for suffix in words.split()}


def _suffix(name: str) -> str:
    """The suffix that decides, lower case and without its dot; `a.csv.gz` gives `csv`."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem if path.suffix == ".gz" else path.name).suffix.lstrip(".")


def family(name: str) -> str:
    """The family that reads a file of this name; unknown names are taken for plain text."""
    return _SUFFIXES.get(_suffix(name), "plain")


def refusal(name: str) -> str | None:
    """Why a file of this name is not even opened; None if it is read."""
    suffix = _suffix(name)
    if suffix not in _REFUSED:
        return None
    return f".{suffix} is {_REFUSED[suffix]}: it is not read as a document"


def read(name: str, data: bytes, limits: Limits) -> Iterator[Extract]:
    """The extracts of a file.

    Raises:
        DocumentError: if it cannot be read; what was yielded before holds.
        ImportError: if the package that reads this format is missing.
    """
    from lfm2_retrieval.documents.readers.decoding import unpack

    if name.lower().endswith(".gz"):
        name, data = name[:-3], unpack(data, limits)
    if not data:
        raise DocumentError("it is empty: there is nothing to index")
    reader = import_module(f"lfm2_retrieval.documents.readers.{family(name)}")
    yield from reader.read(data, name, limits)
